"""`save_pretrained` of an adapted model: it writes the adapter, or the merged model, never one without the adapter."""

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, ConfigError, MergeError
from tests.kit import adapter_values, all_bits, fill, untouched


class Saver(nn.Module):
    """A module with the method of transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).tanh())
        return y

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> str:
        Path(save_directory).mkdir(exist_ok=True)
        torch.save(self.state_dict(), Path(save_directory, "model.pt"))
        return "its own result"


class Both(Saver):
    """A module whose method calls another, as a SentenceTransformer's does."""

    def save(self, path: str | Path, **options: Any) -> str:
        return Saver.save_pretrained(self, path, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str:
        return self.save(save_directory, **options)


def outer_model() -> Any:
    """Return a module of the user's around models."""
    return nn.ModuleDict({"inner": Saver(), "head": nn.Linear(8, 2), "aside": Both()})


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    model = Saver() if model is None else model
    randlora.inject(model, **{"r": 4, "targets": "all-linear", **options})
    return fill(model)


def same_adapter(directory: Path, expected: nn.Module, plain: nn.Module) -> bool:
    randlora.load(plain, directory)
    return all_bits(adapter_values(plain)) == all_bits(adapter_values(expected))


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, pickled], ids=["itself", "deepcopy", "pickle"])
def test_the_adapter_is_written_and_that_is_said_or_what_was_chosen_is_done(copied: Any, tmp_path: Path) -> None:
    model = fill(copied(adapted()), seed=7)
    with pytest.warns(UserWarning, match=r"wrote adapter 'default' to .* not the model: .* save_pretrained='adapter'"):
        assert model.save_pretrained(tmp_path) is None
    assert not (tmp_path / "model.pt").exists()
    assert same_adapter(tmp_path, model, Saver())
    model = copied(adapted(save_pretrained="adapter"))
    model.save_pretrained(save_directory=tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    loaded = Saver()
    randlora.load(loaded, tmp_path, save_pretrained="error")
    for model in (copied(adapted(save_pretrained="error")), loaded):
        with pytest.raises(AdapterError, match=r"without its adapters: call randlora.save\(model, directory\)"):
            model.save_pretrained(tmp_path / "none")
        assert not (tmp_path / "none").exists()
    model = copied(adapted(save_pretrained="model"))
    assert model.save_pretrained(tmp_path) == "its own result"
    assert any("randlora" in name for name in torch.load(tmp_path / "model.pt"))


@pytest.mark.parametrize("kind", [Saver, Both])
def test_a_model_without_adapters_has_its_own_method(kind: type[nn.Module], tmp_path: Path) -> None:
    model: Any = kind()
    before = set(vars(model))
    for end in (randlora.eject, lambda model: randlora.remove(model, "default"), randlora.merge):
        held = adapted(model).save_pretrained
        end(model)
        assert set(vars(model)) == before
        assert model.save_pretrained(tmp_path) == held(tmp_path) == "its own result"
        assert set(torch.load(tmp_path / "model.pt")) == set(Saver().state_dict())
    model.save_pretrained = own = lambda _: "own"  # set on the module, which is given back
    adapted(model, save_pretrained="error")
    with pytest.raises(AdapterError):
        model.save_pretrained(tmp_path)
    randlora.eject(model)
    assert model.save_pretrained is own


@pytest.mark.parametrize(("kind", "choice"), [(Saver, None), (Both, "error"), (Saver, "adapter")])
def test_while_merged_the_merged_model_is_written(kind: type[nn.Module], choice: Any, tmp_path: Path) -> None:
    model = adapted(kind(), save_pretrained=choice, train_also=["up.bias"])
    x = torch.randn(3, 8)
    (tmp_path / "file").touch()
    with randlora.merged(model):
        expected, before = model(x), all_bits(model.state_dict())
        with pytest.raises(FileExistsError):
            model.save_pretrained(tmp_path / "file")
        with pytest.raises(MergeError, match=r"Λ and Γ beside the weights of the base: .*merged_tensors"):
            model.save_pretrained(tmp_path / "none", state_dict=model.state_dict())
        given = dict(randlora.merged_tensors(model))
        for options in ({}, {"state_dict": given}):
            assert model.save_pretrained(tmp_path, **options) == "its own result"
        assert all_bits(model.state_dict()) == before
    assert not (tmp_path / "none").exists()
    plain = kind()
    plain.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(plain(x), expected)


def test_a_model_in_a_module_is_guarded_and_one_beside_it_is_not(tmp_path: Path, monkeypatch: Any) -> None:
    outer = adapted(outer_model(), targets=["head"])
    assert outer.inner.save_pretrained(str(tmp_path)) == "its own result"
    randlora.inject(outer, r=4, targets=["inner"], name="later", save_pretrained="error")
    with pytest.raises(AdapterError, match="without its adapters"):
        outer.inner.save_pretrained(tmp_path)
    randlora.eject(outer)
    adapted(outer, targets=["inner", "head"], save_pretrained="adapter")
    outer.inner.save_pretrained(tmp_path)
    assert same_adapter(tmp_path, outer, outer_model())
    assert outer.aside.save_pretrained(str(tmp_path)) == "its own result"
    for part in (copy.deepcopy(outer.inner), pickled(outer.inner)):
        with pytest.raises(AdapterError, match="a part of an adapted model that was copied or pickled"):
            part.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("randlora.model.save_guard.METHODS", ("save_pretrained", 3))  # so that the second guard fails
    outer = outer_model()
    with untouched(outer), pytest.raises(TypeError):
        randlora.inject(outer, r=4, targets=["aside"])


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    model = adapted(save_pretrained="adapter")
    averages = {name: value / 2 for name, value in model.state_dict().items()}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"save_directory": tmp_path, "push_to_hub": True}, "push_to_hub='user/repo'"),
        ({}, "given no directory"),
        ({"save_directory": tmp_path, "state_dict": averages}, "has a different up.randlora_.* load it into the model"),
        ({"save_directory": tmp_path, "state_dict": Saver().state_dict()}, "has no up.randlora_.* load it into the "),
    ]
    for options, message in refused:
        with pytest.raises(AdapterError, match=message):
            model.save_pretrained(**options)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert same_adapter(tmp_path, model, Saver())
    randlora.inject(model, r=4, targets=["up"], name="second")
    with pytest.raises(AdapterError, match=r"one of several adapters \(default, second\).*name="):
        model.save_pretrained(tmp_path)
    for verb in (randlora.inject, randlora.plan):
        with untouched(model), pytest.raises(ConfigError, match="save_pretrained"):
            verb(model, r=4, save_pretrained="both", name="third")  # type: ignore[arg-type]


def test_a_guarded_model_is_freed_without_the_collector() -> None:
    model = adapted(Both())
    gone, method = weakref.ref(model), model.save_pretrained
    gc.disable()
    try:
        del model
        assert gone() is None
        with pytest.raises(AdapterError, match="a model that was deleted"):
            method("nowhere")
        with pytest.raises(AdapterError, match=r"assign it to a variable first, .*model\.save_pretrained\(directory\)"):
            adapted().save_pretrained("nowhere")
    finally:
        gc.enable()

"""`save_pretrained` of an adapted model: it writes the adapter, or the merged model, never one without the adapter."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, ConfigError, MergeError
from randlora.model.save_guard import SaveGuard
from tests.kit import adapter_values, all_bits, fill, snapshot


class Saver(nn.Module):
    """A module with the method of transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

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


class Outer(nn.Module):
    """A module of the user's around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Saver()
        self.head = nn.Linear(8, 2)
        self.aside = Both()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(x))
        return y


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    model = Saver() if model is None else model
    randlora.inject(model, **{"r": 4, "targets": "all-linear", **options})
    return fill(model)


def same_adapter(directory: Path, expected: nn.Module, plain: nn.Module) -> bool:
    randlora.load(plain, directory)
    return all_bits(adapter_values(plain)) == all_bits(adapter_values(expected))


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved_by_torch,
}


@pytest.mark.parametrize("made", COPIES)
def test_the_adapter_is_written_and_that_is_said(made: str, tmp_path: Path) -> None:
    model = COPIES[made](adapted())
    with pytest.warns(UserWarning, match=r"wrote adapter 'default' to .* not the model: .* save_pretrained='adapter'"):
        assert model.save_pretrained(tmp_path) is None
    assert not (tmp_path / "model.pt").exists()
    assert same_adapter(tmp_path, model, Saver())


@pytest.mark.parametrize("made", COPIES)
def test_a_choice_is_followed_and_stays_in_copies(made: str, tmp_path: Path) -> None:
    model = COPIES[made](adapted(save_pretrained="adapter"))
    model.save_pretrained(save_directory=tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    model = COPIES[made](adapted(save_pretrained="error"))
    with pytest.raises(AdapterError, match=r"without its adapters: call randlora.save\(model, directory\)"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    model = COPIES[made](adapted(save_pretrained="model"))
    assert model.save_pretrained(tmp_path) == "its own result"
    assert any("randlora" in name for name in torch.load(tmp_path / "model.pt"))


def test_copies_save_their_own_values(tmp_path: Path) -> None:
    model = adapted(save_pretrained="adapter")
    other = copy.deepcopy(model)
    fill(other, seed=7)
    other.save_pretrained(tmp_path)
    assert same_adapter(tmp_path, other, Saver())
    assert all_bits(adapter_values(other)) != all_bits(adapter_values(model))


@pytest.mark.parametrize("kind", [Saver, Both])
@pytest.mark.parametrize("end", [randlora.eject, randlora.merge, lambda model: randlora.remove(model, "default")])
def test_a_model_without_adapters_has_its_own_method(
    kind: type[nn.Module], end: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    model: Any = kind()
    before = set(vars(model))
    held = adapted(model).save_pretrained
    end(model)
    assert set(vars(model)) == before
    assert model.save_pretrained(tmp_path) == held(tmp_path) == "its own result"
    assert set(torch.load(tmp_path / "model.pt")) == set(Saver().state_dict())


def test_a_method_set_on_the_module_is_given_back(tmp_path: Path) -> None:
    model: Any = Saver()
    model.save_pretrained = own = lambda _: "own"
    adapted(model, save_pretrained="error")
    with pytest.raises(AdapterError):
        model.save_pretrained(tmp_path)
    randlora.eject(model)
    assert model.save_pretrained is own


@pytest.mark.parametrize("choice", [None, "error", "adapter"])
@pytest.mark.parametrize("kind", [Saver, Both])
def test_while_merged_the_merged_model_is_written(kind: type[nn.Module], choice: Any, tmp_path: Path) -> None:
    model = adapted(kind(), save_pretrained=choice, train_also=["up.bias"])
    x = torch.randn(3, 8)
    with randlora.merged(model):
        expected = model(x)
        assert model.save_pretrained(tmp_path) == "its own result"
        assert any("randlora" in name for name in model.state_dict())
    plain = kind()
    plain.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(plain(x), expected)


def test_a_method_that_raises_leaves_state_dicts_as_they_were(tmp_path: Path) -> None:
    model = adapted()
    with randlora.merged(model):
        before = all_bits(model.state_dict())
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError):
            model.save_pretrained(tmp_path / "file")
        assert all_bits(model.state_dict()) == before
        assert not any(module._state_dict_hooks for module in model.modules())


def test_a_model_in_a_module_is_guarded_and_one_beside_it_is_not(tmp_path: Path) -> None:
    outer = Outer()
    adapted(outer, targets=["inner", "head"], save_pretrained="adapter")
    outer.inner.save_pretrained(tmp_path)
    assert same_adapter(tmp_path, outer, Outer())
    assert outer.aside.save_pretrained(str(tmp_path)) == "its own result"
    copied = copy.deepcopy(outer)
    fill(copied, seed=3)
    copied.inner.save_pretrained(tmp_path)
    assert same_adapter(tmp_path, copied, Outer())


@pytest.mark.parametrize("take", [lambda outer: copy.deepcopy(outer.inner), lambda outer: pickled(outer.inner)])
def test_a_part_that_was_copied_alone_refuses(take: Callable[[Any], Any], tmp_path: Path) -> None:
    outer = adapted(Outer(), targets=["inner", "head"])
    part = take(outer)
    with pytest.raises(AdapterError, match="a part of an adapted model that was copied or pickled"):
        part.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_added_later_are_guarded_too_and_change_the_choice(tmp_path: Path) -> None:
    outer = adapted(Outer(), targets=["head"])
    assert outer.inner.save_pretrained(str(tmp_path)) == "its own result"
    randlora.inject(outer, r=4, targets=["inner"], name="second", save_pretrained="error")
    with pytest.raises(AdapterError, match="without its adapters"):
        outer.inner.save_pretrained(tmp_path)
    randlora.remove(outer, "second")
    randlora.inject(outer, r=4, targets=["inner"], name="third", save_pretrained="model")
    assert outer.inner.save_pretrained(str(tmp_path)) == "its own result"


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    model = adapted(save_pretrained="adapter")
    with pytest.raises(AdapterError, match="push_to_hub='user/repo'"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(AdapterError, match="given no directory"):
        model.save_pretrained()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []
    randlora.inject(model, r=4, targets=["up"], name="second")
    with pytest.raises(AdapterError, match=r"one of several adapters \(default, second\).*name="):
        model.save_pretrained(tmp_path)


def test_a_state_dict_with_the_models_own_values_is_accepted_and_with_others_refused(tmp_path: Path) -> None:
    model = adapted(save_pretrained="adapter")
    model.save_pretrained(tmp_path / "own", state_dict=model.state_dict())
    assert same_adapter(tmp_path / "own", model, Saver())
    averages = {name: value / 2 for name, value in model.state_dict().items()}
    for given, message in ((averages, "has a different up.randlora_"), (Saver().state_dict(), "has no up.randlora_")):
        with pytest.raises(AdapterError, match=f"{message}.* load it into the model first"):
            model.save_pretrained(tmp_path / "none", state_dict=given)
    assert not (tmp_path / "none").exists()


def test_a_state_dict_taken_of_a_merged_model_which_is_that_of_the_base_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with randlora.merged(model):
        with pytest.raises(MergeError, match=r"Λ and Γ beside the weights of the base: .*merged_tensors"):
            model.save_pretrained(tmp_path / "none", state_dict=model.state_dict())
        given = dict(randlora.merged_tensors(model))
        assert model.save_pretrained(tmp_path / "merged", state_dict=given) == "its own result"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", [randlora.inject, randlora.plan])
def test_another_choice_is_refused(verb: Callable[..., Any]) -> None:
    model = Saver()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="save_pretrained"):
        verb(model, r=4, save_pretrained="both")
    assert snapshot(model) == before


def test_a_call_that_raises_leaves_no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Saver()
    before = set(vars(model))
    monkeypatch.setattr(SaveGuard, "__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        randlora.inject(model, r=4, targets="all-linear")
    assert set(vars(model)) == before
    assert randlora.adapters(model) == []


def test_a_call_that_raises_between_two_guards_leaves_none_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, made = Outer(), SaveGuard.__init__
    before = set(vars(outer.aside))

    def failing(guard: SaveGuard, name: str, *args: Any) -> None:
        made(guard, name, *args)
        if name == "save":
            raise MemoryError

    monkeypatch.setattr(SaveGuard, "__init__", failing)
    with pytest.raises(MemoryError):
        randlora.inject(outer, r=4, targets=["aside"])
    assert set(vars(outer.aside)) == before


def test_load_takes_the_choice(tmp_path: Path) -> None:
    randlora.save(adapted(), tmp_path)
    model = Saver()
    randlora.load(model, tmp_path, save_pretrained="error")
    with pytest.raises(AdapterError, match="without its adapters"):
        model.save_pretrained(str(tmp_path))


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

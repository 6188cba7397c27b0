"""An adapter outside of its model: its state, other values for it in place, and what `save_pretrained` writes."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import randlora
from randlora.checkpoint.contents import AdapterState
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError
from randlora.places import Whole
from randlora.state import attached_state
from tests import checkpoint_files as files
from tests.checkpoint_files import HEADED, LINEAR, Case, every_case, read_fields, read_tensors, trained
from tests.kit import Same, adapt, adapter_values, all_bits, fill, untouched

X = torch.linspace(-1, 1, 18).view(3, 6)


def model_with(values: int = 0, *, name: str = "a", **options: Any) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Identity(), nn.Linear(9, 4), nn.Linear(4, 9))
    options = {"r": 3, "targets": "all-linear", "stream": "portable", **options, "name": name}
    return adapt(model, values=values, spread=0.5, **options)


@pytest.mark.parametrize("bases", ["seed", "stored"])
@every_case
def test_a_state_is_what_the_files_hold(case: Case, bases: Literal["seed", "stored"], tmp_path: Path) -> None:
    model, twin = trained(case), case.build()
    randlora.save(model, tmp_path, bases=bases)
    state = randlora.adapter_state(model, bases=bases)
    tensors, metadata = read_tensors(tmp_path)
    assert (all_bits(state.tensors), state.metadata) == (all_bits(tensors), metadata)
    assert state.config == read_fields(tmp_path)
    assert state.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert all(each.is_contiguous() and each.is_leaf and not each.requires_grad for each in state.tensors.values())
    randlora.load(twin, state)
    assert torch.equal(case.output(twin), case.output(model))
    if bases == "seed":  # other values are given in any dtype
        halved = state.with_tensors({name: tensor.double() / 2 for name, tensor in tensors.items()})
        assert all_bits(halved.tensors) == all_bits({name: tensor / 2 for name, tensor in tensors.items()})
    again = randlora.adapter_state(twin, bases=bases)
    assert (all_bits(again.tensors), again.metadata, again.config) == (all_bits(tensors), metadata, state.config)


def test_a_state_belongs_to_no_model_and_is_sent_as_bytes(tmp_path: Path) -> None:
    model, twin, odd = trained(HEADED), HEADED.build(), LINEAR.build()
    randlora.load(odd, files.foreign(tmp_path))
    own = LINEAR.output(odd)
    for tensor in randlora.adapter_state(odd, bases="stored").tensors.values():
        tensor.zero_()
    assert torch.equal(LINEAR.output(odd), own)
    state, expected = randlora.adapter_state(model, bases="stored"), HEADED.output(model)
    before, sent = all_bits(state.tensors), pickle.loads(pickle.dumps(state))
    raw = safetensors.torch.save(state.tensors, state.metadata)
    randlora.load(twin, state)
    fill(model, seed=1)
    fill(twin, seed=2)
    assert all_bits(state.tensors) == before
    received = AdapterState(safetensors.torch.load(raw), state.metadata, state.config)
    randlora.load(model, received, name="later", active=True, trainable=True)
    randlora.swap(twin, sent)
    for tensor in sent.tensors.values():
        tensor.zero_()
    assert torch.equal(HEADED.output(model), expected)
    assert torch.equal(HEADED.output(twin), expected)


def test_trained_parameters_are_swapped_too_and_files_are_as_good_as_states(tmp_path: Path) -> None:
    model, other = trained(HEADED), fill(trained(HEADED), seed=5)

    def held() -> list[Same]:
        bank = attached_state(model).bank  # type: ignore[union-attr]
        copies = [each for basis in bank for pair in basis._copies.values() for each in pair]
        return [Same(each) for each in (*model.parameters(), *bank, *copies)]

    HEADED.output(model)
    kept, versions = held(), [each._version for each in adapter_values(model).values()]
    randlora.save(other, tmp_path / "other")
    files.edit_fields(tmp_path / "other", {"base_model_name_or_path": "org/model", "added_by": "a newer PEFT"})
    with randlora.disabled(model):
        plain = HEADED.output(model)
    randlora.swap(model, tmp_path, subfolder="other")
    assert held() == kept  # nothing but values has changed
    assert all(map(int.__gt__, (each._version for each in adapter_values(model).values()), versions))
    assert torch.equal(HEADED.output(model), HEADED.output(other))
    randlora.save(model, tmp_path / "again")
    assert read_fields(tmp_path / "again") == read_fields(tmp_path / "other")
    paths = [tmp_path / name / "adapter_model.safetensors" for name in ("again", "other")]
    assert len({path.read_bytes() for path in paths}) == 1
    with randlora.disabled(model):
        assert torch.equal(HEADED.output(model), plain)


def test_another_spec_is_refused_with_every_difference(tmp_path: Path) -> None:
    model = model_with()
    different: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"targets": ["0", "3"]}, ("the files have no layer 2",)),
        ({"train_also": ["2.bias"]}, ("the adapter has no trained parameter 2.bias",)),
        ({"r": 2}, ("0 has r=3 and alpha=60, but in the files r=2 and alpha=40", "2 has r=3", "3 has r=3")),
        ({"alpha": 6}, ("0 has r=3 and alpha=60, but in the files r=3 and alpha=6", "2 has", "3 has")),
        ({"seed": 1}, ("the bases are", "and in the files", "seed=1")),
        ({"basis": "block"}, ("the bases are dense bases", "and in the files block bases")),
        ({"train": "lambda"}, ('the adapter has train="both", and the files train="lambda"',)),
    ]
    for number, (options, messages) in enumerate(different):
        randlora.save(model_with(1, **options), tmp_path / str(number))
        with untouched(model), pytest.raises(CheckpointError) as error:
            randlora.swap(model, tmp_path / str(number), name="a")
        for message in (*messages, "or load it as a separate adapter", str(tmp_path)):
            assert message in str(error.value)


def test_what_cannot_be_swapped_is_refused(tmp_path: Path) -> None:
    model, one = model_with(), trained(LINEAR)
    state, own = randlora.adapter_state(model), randlora.adapter_state(one)
    files.peft_directory(tmp_path / "peft")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 9), nn.Identity(), nn.Linear(9, 4), nn.Linear(4, 9))
    randlora.inject(empty, r=3, targets="all-linear", stream="portable", name="a")
    changed = {name: tensor + 1 for name, tensor in own.tensors.items()}
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in own.tensors.items()}
    odd: Any = {"one": 1}
    calls: list[tuple[nn.Module, Any, dict[str, Any], type[Exception], str]] = [
        (model, state, {"name": "b"}, AdapterError, "no adapter named 'b': it has a"),
        (model, tmp_path / "none", {"name": "a"}, CheckpointError, r"cannot load .*cannot read"),
        (one, tmp_path / "peft", {}, CheckpointError, r"randlora.save did not write these files"),
        (model, state, {"revision": "main"}, CheckpointError, "no revision, subfolder or stream, got 'main'"),
        (empty, state, {}, CheckpointError, "no values to write to"),
        (trained(HEADED), own, {}, CheckpointError, "the adapter has no layer 0, 2"),
        (one, replace(own, tensors=changed), {}, CheckpointError, "checksum.* changed with AdapterState.with_tensors"),
        (one, replace(own, metadata={"format": "pt"}), {}, CheckpointError, "the metadata of the state has no 'randl"),
        (one, replace(own, tensors={}), {}, CheckpointError, "names other targets|do not match its checksum"),
        (one, replace(own, tensors=odd), {}, CheckpointError, r"tensors\['one'\] must be Tensor, got 1"),
        (one, replace(own, config={**own.config, "r": "2"}), {}, CheckpointError, "config.r must be an integer, got"),
        (one, own.with_tensors(nan), {}, CheckpointError, "holds NaN or infinite values"),
        (one, own.tensors, {}, ConfigError, r"source must be .*AdapterState, got"),
    ]
    for each, source, options, error, message in calls:
        with untouched(each), pytest.raises(error, match=message):
            randlora.swap(each, source, **options)
    with randlora.merged(model), pytest.raises(AdapterError, match="while the adapters are merged"):
        randlora.swap(model, state, name="a")
    with randlora.serving.routed(model, ["a"] * 3), ThreadPoolExecutor(1) as pool:
        for swap in (randlora.swap, lambda *given: pool.submit(randlora.swap, *given).result()):
            with untouched(model), pytest.raises(AdapterError, match=r"in an open block of .*, which uses it"):
                swap(model, state)
    loss = model(X).square().sum()
    with randlora.serving.routed(model, [None] * 3):
        randlora.swap(model, randlora.adapter_state(model_with(1)), name="a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_no_state_of_an_adapter_is_refused() -> None:
    model = trained(LINEAR)
    state = randlora.adapter_state(model)
    first, value = next(iter(state.tensors.items()))
    randlora.inject(model, r=2, name="b")
    with torch.no_grad():
        adapter_values(model, "b")["0.randlora_gamma"].fill_(float("inf"))
    of, given, odd = partial(randlora.adapter_state, model), state.with_tensors, cast("Any", None)
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (of, AdapterError, r"several adapters \(default, b\): give name="),
        (lambda: of("b"), CheckpointError, r"return the state of an adapter.*NaN or infinite"),
        (lambda: of("default", bases=odd), ConfigError, "bases must be one of seed, stored, got None"),
        (lambda: given({}), CheckpointError, f"{first} has no values, expected shape"),
        (lambda: given({**state.tensors, "other": value}), CheckpointError, "other has shape .*, expected no such"),
        (lambda: given({**state.tensors, first: value[:1]}), CheckpointError, f"{first} has shape .*, expected shape"),
        (lambda: given(odd), ConfigError, "tensors must be a mapping, got None"),
    ]
    for call, error, message in calls:
        with untouched(model), pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("failing", [0, 5])
def test_a_failure_while_values_are_written_leaves_the_old_ones(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = model_with(), randlora.adapter_state(model_with(1))
    write, written = Whole.write, list[Tensor]()

    def interrupted(self: Whole, value: Tensor) -> None:
        written.append(value)
        if len(written) == failing + 1:
            self.read().view(-1)[:1] = value.view(-1)[:1]
            raise KeyboardInterrupt
        write(self, value)

    monkeypatch.setattr(Whole, "write", interrupted)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        randlora.swap(model, state, name="a")


def test_threads_that_swap_take_turns() -> None:
    model, others = model_with(), [model_with(seed) for seed in range(4)]
    states = [randlora.adapter_state(other) for other in others]
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(lambda state: randlora.swap(model, state, name="a"), states * 5)]
    assert all_bits(adapter_values(model, "a")) in [all_bits(adapter_values(other, "a")) for other in others]


class Saver(nn.Module):
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
    def save(self, path: str | Path, **options: Any) -> str:
        return Saver.save_pretrained(self, path, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str:
        return self.save(save_directory, **options)


def outer_model() -> Any:
    return nn.ModuleDict({"inner": Saver(), "head": nn.Linear(8, 2), "aside": Both()})


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    model = Saver() if model is None else model
    return adapt(model, **{"r": 4, "targets": "all-linear", **options})


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
def test_while_merged_nothing_is_written(kind: type[nn.Module], choice: Any, tmp_path: Path) -> None:
    model = adapted(kind(), save_pretrained=choice, train_also=["up.bias"])
    with randlora.merged(model), pytest.raises(MergeError, match=r"are merged: call .*save_merged"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    monkeypatch.setattr("randlora.model.instance_methods.METHODS", ("save_pretrained", 3))  # the second guard fails
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

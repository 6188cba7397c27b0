"""Other values for an adapter in place: the same parameters, bases and programs."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.places import Whole
from randlora.state import attached_state
from tests.checkpoint_files import HEADED, LINEAR, edit_fields, peft_directory, read_fields, trained
from tests.kit import Same, adapter_values, all_bits, fill, untouched
from tests.laws import assert_close
from tests.layer_kinds import LayerKind, every_kind


def model_with(values: int = 0, *, name: str = "a", **options: Any) -> nn.Sequential:
    """Make the same model always, with an adapter of other values for each seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Identity(), nn.Linear(9, 4), nn.Linear(4, 9))
    randlora.inject(model, **{"r": 3, "targets": "all-linear", "stream": "portable", **options}, name=name)
    return fill(model, name, seed=values, spread=0.5)


X = torch.linspace(-1, 1, 18).view(3, 6)


def swapped(model: nn.Module, other: nn.Module, run: Callable[[nn.Module], Tensor], name: str = "default") -> None:
    """Swap in what another model has, and check that nothing but values has changed, and these to the last bit."""
    state = attached_state(model)
    assert state is not None
    before = run(model)
    parameters, bases = [Same(each) for each in model.parameters()], [Same(each) for each in state.bank]
    copies = [Same(held) for basis in state.bank for pair in basis._copies.values() for held in pair]
    versions = [each._version for each in adapter_values(model, name).values()]
    randlora.swap(model, randlora.adapter_state(other, name), name=name)
    assert [Same(each) for each in model.parameters()] == parameters
    assert [Same(each) for each in state.bank] == bases
    assert [Same(held) for basis in state.bank for pair in basis._copies.values() for held in pair] == copies
    assert all(
        each._version > version for each, version in zip(adapter_values(model, name).values(), versions, strict=True)
    )
    assert all_bits(adapter_values(model, name)) == all_bits(adapter_values(other, name))
    assert torch.equal(run(model), run(other))
    assert not torch.equal(run(model), before)


@every_kind
def test_a_layer_of_each_kind_has_the_values_of_the_other(kind: LayerKind) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(kind.build(6, 9, True, kind.exact), kind.build(9, 4, False, kind.exact))
    x = torch.randn(2, 6, dtype=kind.exact)
    randlora.inject(model, r=3, alpha=6, stream="portable")
    other = fill(copy.deepcopy(model), seed=1, spread=0.5)
    swapped(fill(model), other, lambda each: each(x))


def test_trained_parameters_are_swapped_too_and_files_are_as_good_as_states(tmp_path: Path) -> None:
    model, other = trained(HEADED), fill(trained(HEADED), seed=5)
    randlora.save(other, tmp_path / "other")
    edit_fields(tmp_path / "other", {"base_model_name_or_path": "org/model", "added_by": "a newer PEFT"})
    with randlora.disabled(model):
        plain = HEADED.output(model)
    randlora.swap(model, tmp_path, subfolder="other")
    assert torch.equal(HEADED.output(model), HEADED.output(other))
    randlora.save(model, tmp_path / "again")
    assert read_fields(tmp_path / "again") == read_fields(tmp_path / "other")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("again", "other")]
    assert len({file.read_bytes() for file in files}) == 1
    with randlora.disabled(model):
        assert torch.equal(HEADED.output(model), plain)


def test_an_adapter_is_swapped_beside_others_active_or_not() -> None:
    model = model_with()
    fill(model, "a")
    randlora.inject(model, r=3, targets=["0"], name="b", stream="portable", trainable=True)
    fill(model, "b", seed=3)
    beside = all_bits(adapter_values(model, "b"))
    before, flags = model(X), [each.requires_grad for each in model.parameters()]
    other = model_with(9, name="b", targets=["0"])
    randlora.swap(model, randlora.adapter_state(other), name="b")
    assert torch.equal(model(X), before)  # "a" is the active one
    assert all_bits(adapter_values(model, "b")) != beside
    assert [each.requires_grad for each in model.parameters()] == flags
    with randlora.serving.routed(model, ["b"] * 3):
        torch.testing.assert_close(model(X), other(X))


DIFFERENT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "layers": ({"targets": ["0", "3"]}, ("the files have no layer 2",)),
    "more": ({"train_also": ["2.bias"]}, ("the adapter has no trained parameter 2.bias",)),
    "rank": ({"r": 2}, ("0 has r=3 and alpha=60, but in the files r=2 and alpha=40", "2 has r=3", "3 has r=3")),
    "alpha": ({"alpha": 6}, ("0 has r=3 and alpha=60, but in the files r=3 and alpha=6", "2 has", "3 has")),
    "seed": ({"seed": 1}, ("the bases are", "and in the files", "seed=1")),
    "kind": ({"basis": "block"}, ("the bases are dense bases", "and in the files block bases")),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_spec_is_refused_with_every_difference(what: str, tmp_path: Path) -> None:
    options, messages = DIFFERENT[what]
    model = model_with()
    randlora.save(model_with(1, **options), tmp_path)
    with untouched(model), pytest.raises(CheckpointError) as error:
        randlora.swap(model, tmp_path, name="a")
    for message in (*messages, "or load it as a separate adapter", str(tmp_path)):
        assert message in str(error.value)


def test_what_cannot_be_swapped_is_refused(tmp_path: Path) -> None:
    model, theirs = model_with(), trained(LINEAR)
    state = randlora.adapter_state(model)
    peft_directory(tmp_path / "peft")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 9), nn.Identity(), nn.Linear(9, 4), nn.Linear(4, 9))
    randlora.inject(empty, r=3, targets="all-linear", stream="portable", name="a")
    calls: list[tuple[nn.Module, Any, dict[str, Any], type[Exception], str]] = [
        (model, state, {"name": "b"}, AdapterError, "no adapter named 'b': it has a"),
        (model, tmp_path / "none", {"name": "a"}, CheckpointError, r"cannot load .*cannot read"),
        (theirs, tmp_path / "peft", {}, CheckpointError, r"randlora.save did not write these files"),
        (model, state, {"revision": "main"}, CheckpointError, "no revision, subfolder or stream, got 'main'"),
        (empty, state, {}, CheckpointError, "no values to write to"),
    ]
    for each, source, options, error, message in calls:
        with untouched(each), pytest.raises(error, match=message):
            randlora.swap(each, source, **options)
    with randlora.merged(model), pytest.raises(AdapterError, match="while the adapters are merged"):
        randlora.swap(model, state, name="a")
    loss = model(X).square().sum()
    randlora.swap(model, randlora.adapter_state(model_with(1)), name="a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("failing", [0, 2, 5])
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


def test_what_an_open_block_of_routed_names_is_not_swapped() -> None:
    model, state = model_with(), randlora.adapter_state(model_with(1))
    with randlora.serving.routed(model, ["a"] * 3), ThreadPoolExecutor(1) as pool:
        here, elsewhere = (
            partial(randlora.swap, model, state, name="a"),
            pool.submit(randlora.swap, model, state, name="a").result,
        )
        for swap in (here, elsewhere):
            with untouched(model), pytest.raises(AdapterError, match=r"in an open block of .*, which uses it"):
                swap()
    with randlora.serving.routed(model, [None] * 3):
        randlora.swap(model, state, name="a")


def test_threads_that_swap_take_turns() -> None:
    model, others = model_with(), [model_with(seed) for seed in range(4)]
    states = [randlora.adapter_state(other) for other in others]
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(lambda state: randlora.swap(model, state, name="a"), states * 5)]
    assert all_bits(adapter_values(model, "a")) in [all_bits(adapter_values(other, "a")) for other in others]


def test_copies_of_a_model_in_use_can_be_swapped_and_ejecting_leaves_no_hooks() -> None:
    model, other = model_with(), model_with(1)
    with randlora.serving.routed(model, ["a"] * 3):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        randlora.activate(each, "a")
        randlora.swap(each, randlora.adapter_state(other), name="a")
        assert torch.equal(each(X), other(X))
    assert not torch.equal(model(X), other(X))
    randlora.eject(model)
    assert [model._forward_hooks, model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs] == [{}] * 3


@pytest.mark.medium
def test_a_swap_compiles_nothing_again() -> None:
    model, others = model_with(), [model_with(seed) for seed in (1, 2, 3)]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(X)
    for other in others:
        randlora.swap(model, randlora.adapter_state(other), name="a")
        assert_close(compiled(X), other(X), torch.float32)
    assert counter.frame_count == 1


def test_an_optimizer_goes_on_with_the_same_parameters_and_its_old_moments() -> None:
    model = model_with()
    parameters = [*randlora.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()

    step()
    moments = [optimizer.state[each]["exp_avg"].clone() for each in parameters]
    other = model_with(1)
    randlora.swap(model, randlora.adapter_state(other), name="a")
    assert all(
        torch.equal(optimizer.state[each]["exp_avg"], own) for each, own in zip(parameters, moments, strict=True)
    )
    optimizer.state.clear()
    step()
    fresh = torch.optim.AdamW(randlora.trainable_parameters(other), lr=0.1)
    other(X).square().sum().backward()
    fresh.step()
    assert all_bits(adapter_values(model, "a")) == all_bits(adapter_values(other, "a"))

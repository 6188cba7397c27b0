"""Other values for an adapter in place: the same parameters, bases and programs, and never half of it in a forward."""

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.state import CHANGING, attached_state
from tests.checkpoint_files import HEADED, LINEAR, edit_fields, peft_directory, read_fields, trained
from tests.kit import WAIT, Same, adapter_values, all_bits, fill, until, untouched
from tests.laws import assert_close
from tests.layer_kinds import LayerKind, every_kind
from tests.read_kinds import ReadKind, every_read_kind


def model_with(values: int = 0, *, name: str = "a", **options: Any) -> nn.Sequential:
    """Make the same model always, with an adapter of other values for each seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), Pause(), nn.Linear(9, 4), nn.Linear(4, 9))
    randlora.inject(model, **{"r": 3, "targets": "all-linear", "stream": "portable", **options}, name=name)
    return fill(model, name, seed=values, spread=0.5)


class Pause(nn.Module):
    """Does what it is told in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Callable[[], object] = bool

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, later."""
        self.run()
        return x


X = torch.linspace(-1, 1, 18).view(3, 6)


def swapped(model: nn.Module, other: nn.Module, run: Callable[[nn.Module], Tensor], name: str = "default") -> None:
    """Swap in what another model has, and check that nothing but values has changed, and these to the last bit."""
    state = attached_state(model)
    assert state is not None
    before = run(model)
    parameters, bases = [Same(each) for each in model.parameters()], [Same(each) for each in state.bank]
    copies = [Same(held) for basis in state.bank for pair in basis._copies.values() for held in pair]
    versions = [each._version for each in adapter_values(model, name).values()]
    randlora.swap(model, name, randlora.adapter_state(other, name))
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


@every_read_kind
def test_a_module_of_each_kind_that_is_read_has_the_values_of_the_other(kind: ReadKind) -> None:
    swapped(kind.adapted(), fill(kind.adapted(filled=False), seed=1, spread=0.5), kind.run)


def test_trained_parameters_are_swapped_too_and_files_are_as_good_as_states(tmp_path: Path) -> None:
    model, other = trained(HEADED), fill(trained(HEADED), seed=5)
    randlora.save(other, tmp_path / "other")
    edit_fields(tmp_path / "other", {"base_model_name_or_path": "org/model", "added_by": "a newer PEFT"})
    with randlora.disabled(model):
        plain = HEADED.output(model)
    randlora.swap(model, "default", tmp_path, subfolder="other")
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
    randlora.swap(model, "b", randlora.adapter_state(other))
    assert torch.equal(model(X), before)  # "a" is the active one
    assert all_bits(adapter_values(model, "b")) != beside
    assert [each.requires_grad for each in model.parameters()] == flags
    with randlora.routed(model, ["b"] * 3):
        torch.testing.assert_close(model(X), other(X))


DIFFERENT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "layers": ({"targets": ["0", "3"]}, ("the files have no layer 2",)),
    "more": ({"train_also": ["2.bias"]}, ("the adapter has no trained parameter 2.bias",)),
    "rank": ({"r": 2}, ("0 has r=3 and alpha=60, and in the files r=2 and alpha=40", "2 has r=3", "3 has r=3")),
    "alpha": ({"alpha": 6}, ("0 has r=3 and alpha=60, and in the files r=3 and alpha=6", "2 has", "3 has")),
    "seed": ({"seed": 1}, ("the bases are", "and in the files", "seed=1")),
    "kind": ({"basis": "block"}, ("the bases are dense bases", "and in the files block bases")),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_spec_is_refused_with_every_difference(what: str, tmp_path: Path) -> None:
    options, messages = DIFFERENT[what]
    model = model_with()
    randlora.save(model_with(1, **options), tmp_path)
    with untouched(model), pytest.raises(CheckpointError) as error:
        randlora.swap(model, "a", tmp_path)
    for message in (*messages, "load it as another adapter", str(tmp_path)):
        assert message in str(error.value)


def test_what_cannot_be_swapped_is_refused(tmp_path: Path) -> None:
    model = model_with()
    state = randlora.adapter_state(model)
    with untouched(model), pytest.raises(AdapterError, match="no adapter named 'b': it has a"):
        randlora.swap(model, "b", state)
    with untouched(model), pytest.raises(CheckpointError, match=r"cannot load .*cannot read"):
        randlora.swap(model, "a", tmp_path / "none")
    with randlora.merged(model), pytest.raises(AdapterError, match="while the adapters are merged"):
        randlora.swap(model, "a", state)
    theirs = trained(LINEAR)
    with untouched(theirs), pytest.raises(CheckpointError, match=r"randlora.save did not write these files"):
        randlora.swap(theirs, "default", peft_directory(tmp_path / "peft"))
    with untouched(model), pytest.raises(CheckpointError, match="no revision, subfolder or stream, got 'main'"):
        randlora.swap(model, "a", state, revision="main")


@pytest.mark.parametrize("failing", range(6))
def test_a_failure_while_values_are_written_leaves_the_old_ones(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = model_with(), randlora.adapter_state(model_with(1))
    restoring: Any = sys.modules["randlora.checkpoint.restore"]
    write, written = restoring._write, list[None]()

    def interrupted(parameter: nn.Parameter, value: Tensor) -> None:
        if len(written) == failing:
            parameter.view(-1)[:1] = value.view(-1)[:1]
            raise KeyboardInterrupt
        written.append(write(parameter, value))

    monkeypatch.setattr(restoring, "_write", interrupted)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        randlora.swap(model, "a", state)
    assert model(X).isfinite().all()  # and forwards go on


# Other threads


@contextmanager
def in_background(run: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run a function in another thread, which must end after the block."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    yield thread
    thread.join(WAIT)
    assert not thread.is_alive(), "it waits for ever"
    if failed:
        raise failed[0]


def test_forwards_in_a_loop_see_the_old_or_the_new_adapter(tmp_path: Path) -> None:
    model, others = model_with(), [model_with(seed) for seed in range(2)]
    model.get_submodule("1").run = lambda: time.sleep(1e-4)  # type: ignore[assignment]  # so that another thread runs
    for index, other in enumerate(others):
        randlora.save(other, tmp_path / str(index))
    sources: list[Any] = [tmp_path / "0", randlora.adapter_state(others[1])]
    known = [other(X) for other in others]
    seen: list[int] = []
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            output = model(X)
            found = [index for index, expected in enumerate(known) if torch.equal(output, expected)]
            assert found, "half of one and half of the other"
            seen.extend(found)

    with in_background(run), in_background(run):
        until(lambda: 0 in seen)
        for index in range(60):
            randlora.swap(model, "a", sources[index % 2])
        until(lambda: 1 in seen)
        is_over.set()
    assert set(seen) == {0, 1}


def wait_for_swap(model: nn.Module) -> None:
    """Wait until a swap in another thread waits for the forwards that are running."""
    state = attached_state(model)
    assert state is not None
    until(lambda: state.forwards._stopped_by is not None)


class Held:
    """A forward that another thread has stopped in the middle."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.begun, self.go_on = model, threading.Event(), threading.Event()
        pause = model.get_submodule("1")
        assert isinstance(pause, Pause)
        pause.run = self.wait

    def wait(self) -> None:
        """Say that the forward has begun, and wait."""
        self.begun.set()
        assert self.go_on.wait(WAIT)


def test_a_swap_waits_for_the_forward_that_is_running_and_new_ones_wait_for_it() -> None:
    model, other, outputs = model_with(), model_with(1), []
    old, new, held = model(X), other(X), Held(model)
    state = randlora.adapter_state(other)
    with in_background(lambda: outputs.append(model(X))):
        assert held.begun.wait(WAIT)
        with in_background(lambda: randlora.swap(model, "a", state)) as swapping:
            wait_for_swap(model)
            assert swapping.is_alive()
            with in_background(lambda: outputs.append(model(X))) as later:
                later.join(0.1)
                assert later.is_alive()
                held.go_on.set()
    first, second = sorted((torch.equal(output, new), torch.equal(output, old)) for output in outputs)
    assert (first, second) == ((False, True), (True, False))


def test_a_block_of_routed_is_not_interrupted_whatever_thread_runs_the_model() -> None:
    model, other, names = model_with(), model_with(1), ["a"] * 3
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        with randlora.routed(model, names):
            old = model(X)
            state = randlora.adapter_state(other)
            swapping = stack.enter_context(in_background(lambda: randlora.swap(model, "a", state)))
            wait_for_swap(model)
            assert swapping.is_alive()
            assert torch.equal(model(X), old)
            assert torch.equal(pool.submit(copy_context().run, model, X).result(WAIT), old)  # the caller may wait
            with pytest.raises(AdapterError, match="open in another thread or task"):
                pool.submit(model, X).result(WAIT)
            with randlora.disabled(model), randlora.routed(model, names):
                assert torch.equal(model(X), old)
        swapping.join(WAIT)
        assert torch.equal(model(X), other(X))


def test_a_block_begins_after_a_swap_that_is_waiting() -> None:
    model, other, begun = model_with(), model_with(1), list[Tensor]()
    held, state = Held(model), randlora.adapter_state(other)

    def run_block() -> None:
        with randlora.routed(model, ["a"] * 3):
            begun.append(next(iter(adapter_values(model, "a").values())).clone())

    with in_background(lambda: model(X)):
        assert held.begun.wait(WAIT)
        with in_background(lambda: randlora.swap(model, "a", state)):
            wait_for_swap(model)
            with in_background(run_block) as block:
                block.join(0.1)
                assert not begun
                held.go_on.set()
    assert torch.equal(begun[0], next(iter(adapter_values(other, "a").values())))


def test_a_thread_swaps_within_its_own_forward_and_not_within_its_own_block() -> None:
    model, other = model_with(), model_with(1)
    state = randlora.adapter_state(other)
    with randlora.routed(model, ["a"] * 3):
        with pytest.raises(AdapterError, match="in an open block of"):
            randlora.swap(model, "a", state)
        with ThreadPoolExecutor(1) as pool, pytest.raises(AdapterError, match="in an open block of"):
            pool.submit(copy_context().run, randlora.swap, model, "a", state).result(WAIT)
    randlora.swap(model, "a", state)
    pause = model.get_submodule("1")
    pause.run = lambda: randlora.swap(model, "a", state)  # type: ignore[assignment]
    assert torch.equal(model(X), other(X))


def test_two_threads_that_swap_within_blocks_do_not_wait_for_each_other() -> None:
    model, state = model_with(), randlora.adapter_state(model_with(1))
    held = Held(model)
    with in_background(lambda: model(X)):
        assert held.begun.wait(WAIT)
        with in_background(lambda: randlora.swap(model, "a", state)):
            wait_for_swap(model)
            model.get_submodule("1").run = bool  # type: ignore[assignment]
            held.go_on.set()
    held = Held(model)

    def swap_inside() -> None:
        held.wait()
        with pytest.raises(AdapterError, match="within a forward pass, or a block of routed, while another thread"):
            randlora.swap(model, "a", state)

    model.get_submodule("1").run = swap_inside  # type: ignore[assignment]
    with in_background(lambda: model(X)):
        assert held.begun.wait(WAIT)
        with in_background(lambda: randlora.swap(model, "a", state)):
            wait_for_swap(model)
            held.go_on.set()


def test_a_forward_that_waits_for_another_change_can_end() -> None:
    model, state = model_with(), randlora.adapter_state(model_with(1))
    held = Held(model)

    def change_inside() -> None:
        held.wait()
        with randlora.disabled(model):
            pass

    model.get_submodule("1").run = change_inside  # type: ignore[assignment]
    with in_background(lambda: model(X)):
        assert held.begun.wait(WAIT)
        with in_background(lambda: randlora.swap(model, "a", state)):
            wait_for_swap(model)
            with CHANGING:  # as another function
                held.go_on.set()
                time.sleep(0.1)


def test_a_change_that_runs_the_model_can_end() -> None:
    model, other = model_with(), model_with(1)
    held, state = Held(model), randlora.adapter_state(other)
    with in_background(lambda: model(X)):
        assert held.begun.wait(WAIT)
        with in_background(lambda: randlora.swap(model, "a", state)):
            wait_for_swap(model)
            with CHANGING, ThreadPoolExecutor(1) as pool:  # as a function that changes a model
                held.go_on.set()
                time.sleep(0.1)
                pool.submit(model, X).result(WAIT)
    assert torch.equal(model(X), other(X))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raised_is_not_waited_for(error: type[BaseException]) -> None:
    model, other = model_with(), model_with(1)

    def fail() -> None:
        raise error

    def run() -> None:
        model.get_submodule("1").run = fail  # type: ignore[assignment]
        with pytest.raises(error):
            model(X)
        model.get_submodule("1").run = bool  # type: ignore[assignment]
        is_raised.set()
        assert is_swapped.wait(WAIT)

    is_raised, is_swapped = threading.Event(), threading.Event()
    with in_background(run):
        assert is_raised.wait(WAIT)
        randlora.swap(model, "a", randlora.adapter_state(other))
        is_swapped.set()
    assert torch.equal(model(X), other(X))


def test_a_refused_call_is_not_waited_for() -> None:
    model = model_with()

    def run() -> None:
        with pytest.raises(AdapterError, match="adapter_names has no effect"):
            model(X, adapter_names=["a"])

    with in_background(run):
        pass
    randlora.swap(model, "a", randlora.adapter_state(model))


def test_copies_of_a_model_in_use_can_be_swapped() -> None:
    model, other = model_with(), model_with(1)
    held, copies = Held(model), []
    held.go_on.set()
    with randlora.routed(model, ["a"] * 3):
        del model.get_submodule("1").run
        model.get_submodule("1").run = bool  # type: ignore[assignment]
        copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        randlora.activate(each, "a")
        randlora.swap(each, "a", randlora.adapter_state(other))
        assert torch.equal(each(X), other(X))
    assert not torch.equal(model(X), other(X))


def test_ejecting_leaves_no_hooks() -> None:
    model = model_with()
    assert model._forward_hooks
    assert model._forward_pre_hooks
    randlora.eject(model)
    held = model._forward_hooks, model._forward_hooks_always_called, model._forward_pre_hooks
    assert [*held, model._forward_pre_hooks_with_kwargs] == [{}] * 4


@pytest.mark.medium
def test_a_swap_compiles_nothing_again() -> None:
    model, others = model_with(), [model_with(seed) for seed in (1, 2, 3)]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(X)
    for other in others:
        randlora.swap(model, "a", randlora.adapter_state(other))
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
    randlora.swap(model, "a", randlora.adapter_state(other))
    assert all(
        torch.equal(optimizer.state[each]["exp_avg"], own) for each, own in zip(parameters, moments, strict=True)
    )
    optimizer.state.clear()
    step()
    fresh = torch.optim.AdamW(randlora.trainable_parameters(other), lr=0.1)
    other(X).square().sum().backward()
    fresh.step()
    assert all_bits(adapter_values(model, "a")) == all_bits(adapter_values(other, "a"))


def test_a_gradient_through_values_that_were_swapped_is_an_error() -> None:
    model = model_with()
    loss = model(X).square().sum()
    randlora.swap(model, "a", randlora.adapter_state(model_with(1)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

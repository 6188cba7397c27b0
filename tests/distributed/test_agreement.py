"""An error in one process, at whatever step of a verb, is raised in all, none of which waits, and changes nothing."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import randlora
from randlora import ranks
from randlora.checkpoint.load import swapped
from randlora.layers.base import AdapterLayer
from randlora.model import merge, merged_tensors
from randlora.model.view import all_or_nothing, opened, opened_to_add, together, unchanged_if_raised
from randlora.state import ATTRIBUTE
from tests.distributed.engines import ENGINES
from tests.distributed.processes import in_two, on_all
from tests.distributed.trained import Drawn, held

PACKAGE = str(Path(randlora.__file__).parent)

DRAWN = Drawn(train_also=("norm",))

Verb = Callable[[Any, Path], object]


@dataclass(frozen=True)
class Case:
    verb: Verb
    undo: Verb | None = None
    before: Verb = lambda model, place: None  # noqa: ARG005
    has_second: bool = True


def within(block: Callable[[Any, Path], Any]) -> Verb:
    def run(model: Any, place: Path) -> None:
        with block(model, place):
            pass

    return run


def remove_third(model: Any, _: Path) -> None:
    randlora.remove(model, "third")


def merge_reversibly(model: Any, _: Path) -> object:
    return randlora.merge(model, reversible=True)


def pooled(model: Any, place: Path) -> Any:
    return randlora.serving.AdapterPool(model, {"third": place / "saved"}, max_loaded=1).using("third")


REFUSED = {("ZeRO-3", "limit_norms")}

VERBS: dict[str, Case] = {
    "activate": Case(lambda model, _: randlora.activate(model, "second"), lambda m, _: randlora.activate(m, "default")),
    "adapter_state": Case(lambda model, _: randlora.adapter_state(model, "default")),
    "combine": Case(lambda model, _: randlora.serving.combine(model, {"second": 0.5}, name="third"), remove_third),
    "delta_weight": Case(lambda model, _: randlora.delta_weight(model, "blocks.0.up")),
    "disabled": Case(within(lambda model, _: randlora.disabled(model))),
    "eject": Case(lambda model, _: randlora.eject(model)),
    "inject": Case(lambda model, _: randlora.inject(model, r=2, targets=["up"], name="third"), remove_third),
    "limit_norms": Case(lambda model, _: randlora.limit_norms(model, 1e-3, name="default")),
    "load": Case(lambda model, place: randlora.load(model, place / "saved", name="third"), remove_third),
    "load_all": Case(
        lambda model, place: randlora.load_all(model, place / "all"),
        lambda model, _: [randlora.remove(model, name) for name in ("third", "fourth")],
    ),
    "merge": Case(lambda model, _: randlora.merge(model), has_second=False),
    "merge reversibly": Case(merge_reversibly, lambda model, _: randlora.unmerge(model)),
    "merged": Case(within(lambda model, _: randlora.merged(model))),
    "merged_tensors": Case(lambda model, _: dict(randlora.merged_tensors(model))),
    "remove": Case(lambda model, _: randlora.remove(model, "second")),
    "routed": Case(within(lambda model, _: randlora.serving.routed(model, ["second"]))),
    "save": Case(lambda model, place: randlora.save(model, place / "out", name="default")),
    "save_all": Case(lambda model, place: randlora.save_all(model, place / "out")),
    "save stored": Case(lambda model, place: randlora.save(model, place / "out", name="default", bases="stored")),
    "save_merged": Case(lambda model, place: randlora.files.save_merged(model, tempfile.mktemp(dir=place))),
    "set_trainable": Case(
        lambda model, _: randlora.set_trainable(model, "second"),
        lambda model, _: randlora.set_trainable(model, "second", trainable=False),
    ),
    "swap": Case(
        lambda model, place: randlora.swap(model, place / "saved", name="second"),
        lambda model, place: randlora.swap(model, place / "second", name="second"),
    ),
    "unmerge": Case(lambda model, _: randlora.unmerge(model), merge_reversibly, merge_reversibly),
    "update_norms": Case(torch.no_grad()(lambda model, _: randlora.update_norms(model, name="default"))),
    "using": Case(within(pooled), remove_third),
}


# Errors are planted in each function of the package, but not in those that find and gather parts of tensors once the
# processes have agreed: one that left out a part would mix up the rest. test_faults.py plants them between two gathers.
TOGETHER = {
    each.__code__ for each in (ranks.run_collectives, merged_tensors.MergedTensors._value, AdapterLayer.delta_weight)
}

END = "merged.<locals>.end"
"""What ends a block, for which no process waits."""

AROUND = {
    inspect.unwrap(each).__code__
    for each in (
        *(together, opened, opened_to_add, all_or_nothing, unchanged_if_raised),
        *(merge._restored_if_raised, swapped),
    )
}
"""Blocks around a verb: what can fail in them is in other functions, and at their end nothing is left to do."""


class Steps:
    """The steps of a call in this process: each function of the package that begins or goes on, once."""

    def __init__(self, planted: int | None) -> None:
        self.planted, self.seen = planted, set[tuple[Any, int]]()

    def __call__(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_filename == ranks.__file__:
            return
        if code in AROUND or code.co_name == "<genexpr>":  # which may be given up, with nobody to raise to
            return
        if ranks.agreeing() is None or self._is_left_out(frame):
            return
        step = code, frame.f_lasti
        if step not in self.seen:
            self.seen.add(step)
            if len(self.seen) - 1 == self.planted:
                raise MemoryError(f"no room at step {self.planted}, {code.co_qualname} in {code.co_filename}")

    @staticmethod
    def _is_left_out(frame: Any) -> bool:
        while frame is not None:
            if frame.f_code in TOGETHER or frame.f_code.co_qualname == END:
                return True
            frame = frame.f_back
        return False


@contextmanager
def planted(step: int | None) -> Iterator[Steps]:
    steps = Steps(step)
    sys.setprofile(steps)
    try:
        yield steps
    finally:
        sys.setprofile(None)


def facts(model: Any) -> object:
    kinds = {name: type(module) for name, module in model.named_modules()}
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    values = {name: (each.dtype, each.numpy().tobytes()) for name, each in held(model).items()}  # NaN in padding, too
    return kinds, flags, values, randlora.adapters(model), vars(model)[ATTRIBUTE].is_merged


def attempted(verb: Verb, model: Any, place: Path, step: int | None) -> tuple[bool, str]:
    with planted(step) as steps:
        try:
            verb(model, place)
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        else:
            raised = ""
    return step is not None and len(steps.seen) > step, raised


def made(case: Case, engine: str) -> Any:
    own = Drawn() if case.has_second and engine == "ZeRO-3" else DRAWN  # a ZeRO-3 engine exchanges no copies
    run = ENGINES[engine].make(own)
    model = getattr(run, "module", run)
    if case.has_second:
        randlora.inject(model, r=2, targets=["up"], name="second")
    return model


def require_agreement(engine: str, name: str, rank: int, place: Path, steps: Iterator[int]) -> int:
    case, model, raised = VERBS[name], None, 0
    for step in steps:
        if model is None:
            model = made(case, engine)
            case.before(model, place)
            before = facts(model)
        was_planted, error = attempted(case.verb, model, place, step if dist.get_rank() == rank else None)
        found = on_all((was_planted, error.partition("\n")[0]))
        assert len({each for _, each in found}) == 1, (step, found)
        assert "no room" in error or not error, error
        if error:
            if name != "unmerge":  # which counts as merged then, and restores what it did not when it is called again
                assert facts(model) == before, (step, error)
            raised += 1
            continue
        if not found[rank][0]:
            return raised
        if case.undo is None:
            model = None
        else:
            case.undo(model, place)
    return raised


@pytest.fixture
def saved(name: str, tmp_path: Path) -> Path:
    if name not in ("load", "load_all", "swap", "using"):
        return tmp_path
    model = DRAWN.build()
    randlora.inject(model, r=2, targets=["up"], name="second")
    randlora.save(model, tmp_path / "second")
    for other in ("third", "fourth"):
        randlora.load(model, tmp_path / "second", name=other)
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            if ".up." in fqn:
                parameter.add_(0.01)
    randlora.save(model, tmp_path / "saved", name="third")
    randlora.save_all(model, tmp_path / "all", names=["third", "fourth"])
    return tmp_path


@in_two
@pytest.mark.parametrize("name", VERBS)
def test_an_error_in_one_process_is_raised_in_all_and_changes_nothing(name: str, saved: Path) -> None:
    assert require_agreement("FSDP2", name, 1, saved, count(0, 150)) > 0


@pytest.mark.slow
@in_two
@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize(
    ("engine", "rank", "offset"), [("FSDP2", 0, 0), ("FSDP2", 1, 1), ("FSDP2 first", 1, 2), ("ZeRO-3", 1, 3)]
)
def test_an_error_at_any_step_is_raised_in_all(engine: str, rank: int, name: str, offset: int, saved: Path) -> None:
    if (engine, name) not in REFUSED:
        assert require_agreement(engine, name, rank, saved, count(offset, 4)) > 0

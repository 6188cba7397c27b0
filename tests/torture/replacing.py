"""Scenarios in which an adapter is written over another one, and the laws that hold at every instant of each."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import randlora
from randlora.errors import CheckpointError
from tests.checkpoint_files import CONFIG_FILE, LINEAR, TENSORS_FILE, edit_tensors, trained, understood
from tests.kit import adapter_values, assert_unchanged, snapshot
from tests.torture.faults import Outcome, in_child, places

OLD: dict[str, Any] = {"seed": 1, "alpha": 3.0}
NEW: dict[str, Any] = {"seed": 2, "alpha": 5.0}
"""Options of two adapters whose tensors have the same shapes: the files of both would load together."""


@cache
def model(seed: int, alpha: float) -> nn.Module:
    return trained(LINEAR, seed=seed, alpha=alpha)


def save(directory: Path, options: dict[str, Any]) -> None:
    """Save an adapter, which leaves its model as it was, also if it fails."""
    before = snapshot(model(**options))
    try:
        randlora.save(model(**options), directory)
    finally:
        assert_unchanged(model(**options), before)


def save_plain(directory: Path, options: dict[str, Any]) -> None:
    save(directory, options)
    edit_tensors(directory, {})
    (directory / "README.md").unlink()


def save_shifted(directory: Path) -> None:
    shifted = trained(LINEAR, **NEW)
    for values in adapter_values(shifted).values():
        values.data += 1
    randlora.save(shifted, directory)


def convert(directory: Path, to: Any, options: dict[str, Any]) -> None:
    origin = directory.parents[1] / f"source-{to}-{options['seed']}"
    if not origin.exists():
        (save if to == "lora" else save_plain)(origin, options)
    randlora.files.convert(origin, directory, to, tolerance=1.0 if to == "lora" else None, overwrite=True)


class Scenario(NamedTuple):
    """A function that writes the old state, ``None`` for no directory, and one that writes the new one over it.

    If what is written has our header, `randlora.load` gets the old or the new adapter at every instant. Else the JSON
    of one is never beside the tensors of the other.
    """

    name: str
    old: Callable[[Path], object] | None
    write: Callable[[Path], object]
    has_header: bool = True


OURS, OURS_NEW = partial(save, options=OLD), partial(save, options=NEW)
PLAIN, PLAIN_NEW = partial(save_plain, options=OLD), partial(convert, to="peft", options=NEW)
LORA, LORA_NEW = partial(convert, to="lora", options=OLD), partial(convert, to="lora", options=NEW)
SCENARIOS = (
    Scenario("new", None, OURS_NEW),
    Scenario("over ours", OURS, OURS_NEW),
    Scenario("over an equal JSON", OURS_NEW, save_shifted),
    Scenario("over PEFT's", PLAIN, OURS_NEW),
    Scenario("LoRA over ours", OURS, LORA_NEW, has_header=False),
    Scenario("LoRA over LoRA", LORA, LORA_NEW, has_header=False),
    Scenario("PEFT's over PEFT's", PLAIN, PLAIN_NEW, has_header=False),
)

Identity = tuple[Any, ...] | None


def loaded(directory: Path) -> Identity:
    twin = LINEAR.build()
    try:
        with warnings.catch_warnings(action="ignore"):
            randlora.load(twin, directory)
    except CheckpointError:
        return None
    return understood(twin, LINEAR)


class State(NamedTuple):
    files: dict[str, bytes | None]
    adapter: Identity
    pair: tuple[bytes | None, bytes | None]


def state_of(directory: Path) -> State:
    files = {name: text for name, text in places(directory).items() if not name.startswith(".")}
    return State(files, loaded(directory), (files.get(CONFIG_FILE), files.get(TENSORS_FILE)))


class Stage:
    def __init__(self, scenario: Scenario, root: Path) -> None:
        self.scenario, self.kept = scenario, root / "kept"
        self.there = root / "there"  # which nothing but the scenario writes into
        self.target = self.there / "out" if scenario.old else self.there / "deep" / "out"
        if scenario.old:
            self.there.mkdir()
            scenario.old(self.target)
            shutil.copytree(self.target, self.kept)
        self.reset()
        self.old = state_of(self.target)
        scenario.write(self.target)
        self.new = state_of(self.target)
        self.clean = [*places(self.there)]

    def reset(self) -> None:
        shutil.rmtree(self.there, ignore_errors=True)
        self.there.mkdir()
        if self.scenario.old:
            shutil.copytree(self.kept, self.target)

    def run(self, at: int | None = None, error: int | None = None) -> Outcome:
        self.reset()
        return in_child(lambda: self.scenario.write(self.target), at, error)

    def broken(self) -> Iterator[str]:
        now = state_of(self.target)
        whole = self.old.adapter, self.new.adapter
        if now.adapter not in (whole if self.scenario.has_header else (*whole, None)):
            yield "loads neither the old nor the new adapter"
        if not self.scenario.has_header and now.pair[0] is not None and now.pair not in (self.old.pair, self.new.pair):
            yield "has the JSON of one adapter beside other tensors"

    def broken_afterwards(self) -> Iterator[str]:
        """Yield the laws that the next write without a fault breaks."""
        self.scenario.write(self.target)
        if state_of(self.target) != self.new:
            yield "the next write did not write the new state"
        if [*places(self.there)] != self.clean:
            yield f"the next write left {[*places(self.there)]}"

    def broken_by_an_error(self, outcome: Outcome, call: str) -> Iterator[str]:
        """Yield the laws that a write breaks of which a call failed: it raised and left all, or did what it should."""
        left, now = places(self.there), state_of(self.target)
        if outcome.raised == "OSError":
            if now != self.old:
                yield "raised, and the old state is not whole"
            if any(Path(place).name.startswith(".") for place in left) or (left and not self.scenario.old):
                yield f"raised, and left {[*left]}"
        elif outcome.raised:
            yield outcome.raised
        elif now._replace(files={name: text for name, text in now.files.items() if name in self.new.files}) != self.new:
            yield "did not raise, and the new state is not there"
        elif call not in {"unlink", "rmdir"} and [*left] != self.clean:
            yield f"did not raise, and left {[*left]}"


def after_a_fault(stage: Stage, at: int, error: int | None = None) -> list[str] | None:
    """Kill a write before a call, or let the call fail; return the broken laws, ``None`` if it made no such call."""
    outcome = stage.run(at, error)
    if outcome.was_killed:
        what, broken = f"killed before call {at}", [*stage.broken()]
    elif error is None:
        return [f"{stage.scenario.name}, without a fault: {outcome.raised}"] if outcome.raised else None
    elif len(outcome.calls) < at:
        return None
    else:
        call = outcome.calls[at - 1].name
        what, broken = f"{call} (call {at}) failed", [*stage.broken(), *stage.broken_by_an_error(outcome, call)]
    return [f"{stage.scenario.name}, {what}: {law}" for law in (*broken, *stage.broken_afterwards())]

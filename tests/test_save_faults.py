"""A write that is killed or fails at any system call, or loses its power, leaves the old adapter or the new one."""

import shutil
from collections.abc import Iterator
from itertools import combinations, count
from pathlib import Path

import pytest

from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE
from tests.torture.faults import ERRORS, Call
from tests.torture.replacing import SCENARIOS, Scenario, Stage, after_a_kill, after_an_error

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # of Python 3.12, in a process with threads
]


def over(*names: str) -> pytest.MarkDecorator:
    """Parametrize over some scenarios; `make torture` kills in all of them, at every call."""
    return pytest.mark.parametrize(
        "scenario", [each for each in SCENARIOS if each.name in names], ids=lambda it: it.name
    )


@over("over ours")
@pytest.mark.parametrize("is_killed", [True, False], ids=["kill", "error"])
def test_a_kill_or_an_error_at_a_call_leaves_the_old_or_the_new_and_nothing_after_the_next(
    scenario: Scenario, is_killed: bool, fast_path: Path
) -> None:
    stage = Stage(scenario, fast_path)
    for at in count(1 + is_killed, 3):
        broken = after_a_kill(stage, at) if is_killed else after_an_error(stage, at, ERRORS[at % len(ERRORS)])
        if broken is None:
            break
        assert broken == []
    assert at > 20


# Of all that was not flushed, a power failure may leave any part

Names = frozenset[tuple[str, bool]]
"""Names in a directory, each with whether it stands for the new file."""


def survivors(calls: tuple[Call, ...], directory: Path, old: frozenset[str]) -> Iterator[Names]:
    """Yield what a power failure before, between or after the calls may leave of a directory's names.

    That is the names at its last flush, changed by any of the steps after it.
    """
    flushed: dict[str, bool] = dict.fromkeys(old, False)
    steps: list[tuple[str, bool]] = []  # a name, and whether it is given to a new file or taken away
    yield frozenset(flushed.items())
    for call in calls:
        last = Path(call.paths[-1])
        if call.name == "fsync" and last == directory:
            flushed = applied(flushed, steps)
            steps = []
        elif last.parent == directory and not last.name.startswith(".") and call.name in {"rename", "unlink"}:
            steps.append((last.name, call.name == "rename"))
        for length in range(len(steps) + 1):
            for kept in combinations(steps, length):
                yield frozenset(applied(flushed, list(kept)).items())


def applied(names: dict[str, bool], steps: list[tuple[str, bool]]) -> dict[str, bool]:
    """Return the names after some steps."""
    changed = dict(names)
    for name, is_new in steps:
        changed.pop(name, None)
        changed |= {name: True} if is_new else {}
    return changed


@over("over ours", "over PEFT's", "LoRA over ours")
def test_any_part_of_the_steps_after_the_last_flush_leaves_the_old_or_the_new_adapter(
    scenario: Scenario, fast_path: Path
) -> None:
    stage = Stage(scenario, fast_path)
    shutil.copytree(stage.target, fast_path / "new")
    calls = stage.run().calls
    left = {*survivors(calls, stage.target, frozenset(stage.old.files))}
    assert len(left) >= 3
    for names in left:
        shutil.rmtree(stage.target)
        stage.target.mkdir()
        for name, is_new in names:
            shutil.copy(fast_path / ("new" if is_new else "kept") / name, stage.target / name)
        assert [*stage.broken()] == [], sorted(names)
    assert any({(CONFIG_FILE, True), (TENSORS_FILE, True)} <= names for names in left)


@over("new", "over ours", "LoRA over ours")
def test_what_gets_its_name_is_on_disk_before_and_the_name_after(scenario: Scenario, fast_path: Path) -> None:
    stage = Stage(scenario, fast_path)
    calls = stage.run().calls
    visible = [at for at, call in enumerate(calls) if call.name == "rename"]
    assert visible
    for at in visible:
        source, target = calls[at].paths
        inside = {call.paths[0] for call in calls[:at] if call.name == "write" and call.paths[0].startswith(source)}
        assert inside
        for path in inside:
            last = max(place for place, call in enumerate(calls) if call == Call("write", (path,)))
            assert Call("fsync", (path,)) in calls[last:at], f"{path} is not flushed before its name"
        if {source} != inside:
            assert Call("fsync", (source,)) in calls[:at], "the new directory is not flushed before its name"
        following = next(call for call in calls[at + 1 :])
        assert following == Call("fsync", (str(Path(target).parent),)), f"{target} is not flushed after it has its name"
    for at, call in enumerate(calls):
        created = Path(call.paths[0])
        if call.name == "mkdir" and "unfinished" not in call.paths[0]:
            assert calls[at + 1] == Call("fsync", (str(created.parent),)), f"{created} is not flushed into its parent"

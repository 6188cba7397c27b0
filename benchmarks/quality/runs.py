"""Runs in files, one line of JSON each, so that a restart makes only those that are missing."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

KEPT = Path("benchmarks/quality/results")
STEP_TIMES = KEPT / "step_times.json"


@dataclass(frozen=True)
class Key:
    """What a result depends on, beside the versions of code and machine."""

    task: str
    contestant: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Run:
    """One training and what came of it.

    Attributes:
        key: What was trained.
        found: The task's metric, ``drift`` and other measures, by name.
        loss: The mean training loss of the last tenth of the steps, if any.
        seconds: The processor's time for all steps together, which with one thread depends little on other processes.
        peak_bytes: The most memory that the process held while it trained.
        trained: The number of parameters trained, without those of the head.
        file_bytes: What the library writes of them.
        machine: Where it ran, as `benchmarks.machine.describe` says.
    """

    key: Key
    found: dict[str, float]
    loss: float | None
    seconds: float
    peak_bytes: int
    trained: int
    file_bytes: int
    machine: dict[str, str]


def read_runs(file: Path) -> Iterator[Run]:
    """Go through the runs of a file; there may be none."""
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            yield Run(**{**fields, "key": Key(**fields["key"])})


def add_run(file: Path, run: Run) -> None:
    """Append a run to a file, to which other processes may append theirs: a line is written at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(run)) + "\n"
    with file.open("ab", buffering=0) as out:
        out.write(line.encode())


def read_step_times() -> dict[str, dict[str, float]]:
    """Read the time of a step over that of a LoRA of equal size, by task and contestant; there may be none."""
    found: dict[str, dict[str, float]] = {}
    return json.loads(STEP_TIMES.read_text(encoding="utf-8")) if STEP_TIMES.is_file() else found

"""The processor's time of a step, over that of PEFT's LoRA of equal size: ``python -m benchmarks.quality.step_time``.

All that have one reference take some steps in turn, in one process, so that whatever else the machine does hits all
alike. Only ratios are kept.
"""

import json
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks.quality.__main__ import TASKS
from benchmarks.quality.contestants import GROUPS, Contestant
from benchmarks.quality.pages import ROWS, SIX, runs_of
from benchmarks.quality.runs import STEP_TIMES, read_step_times
from benchmarks.quality.task import Size, Task
from benchmarks.quality.training import adapted_parts, train

STEPS, ROUNDS = 4, 15
MEASURED: Mapping[str, Contestant] = {
    name: contestant for group in ("main", "curves", "relatives") for name, contestant in GROUPS[group].items()
}
SHOWN = {*ROWS, *GROUPS["relatives"]} - {"full fine-tuning"}
"""The adapters of the tables on pages; others are references alone."""
BESIDE_PEFT = [name for name in SIX if name != "clothes"]
"""The tasks whose LoRA is PEFT's."""


def reference_of(name: str) -> str:
    """Return the LoRA whose size a contestant has: that of the rank in its name, or of our default adapter."""
    return f"LoRA {rank[0]}" if (rank := re.search(r"(?<= )\d+$", name)) and "=" not in name else "LoRA, equal size"


def measured_ratios(task: Task, names: Iterable[str], reference: str, rounds: int, size: Size) -> dict[str, float]:
    """Return the time of each over that of the reference: the median over rounds, each of which has both."""
    parts = {}
    for name in dict.fromkeys([reference, *names]):
        torch.manual_seed(0)
        prepared = task.prepare(0, size)
        _, body, head = adapted_parts(prepared, MEASURED[name], 0)
        parts[name] = replace(prepared, batches=prepared.batches[:STEPS]), body, head
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):  # the first does not count
        for name in parts if turn % 2 else reversed([*parts]):
            start = time.process_time()
            train(parts[name][0], MEASURED[name], *parts[name][1:], 0.0, 0.0)
            seconds[name].append(time.process_time() - start)
    ratios = {
        name: [a / b for a, b in zip(own[1:], seconds[reference][1:], strict=True)] for name, own in seconds.items()
    }
    return {name: round(statistics.median(own), 3) for name, own in ratios.items()}


def main(
    task: Annotated[str, typer.Option(help="A regular expression for the names of tasks.")] = ".*",
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = ROUNDS,
) -> None:
    """Measure all that are not kept yet."""
    torch.set_num_threads(1)
    for name in (name for name in BESIDE_PEFT if re.fullmatch(task, name)):
        known = {run.key.contestant for run in runs_of(name)[1]}
        shown = [each for each in MEASURED if each in SHOWN and each in known]
        for reference in dict.fromkeys(map(reference_of, shown)):
            kept = read_step_times()
            own = kept.setdefault(name, {})
            names = [each for each in shown if reference_of(each) == reference]
            if missing := [each for each in names if each not in own]:
                own |= measured_ratios(TASKS[name], missing, reference, rounds, "full")
                STEP_TIMES.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

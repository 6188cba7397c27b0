"""Make the runs that are missing, then tables and a figure: ``python -m benchmarks.quality --task tweets --full``."""

import gc
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: all files come from packages

import torch
import typer
from rich.console import Console

from benchmarks.quality import summary
from benchmarks.quality.contestants import GROUPS, Contestant
from benchmarks.quality.digits import DIGITS_TASK
from benchmarks.quality.docstrings import DOCSTRINGS_TASK
from benchmarks.quality.facts import FACTS_TASK
from benchmarks.quality.fashion import CLOTHES_TASK
from benchmarks.quality.passwords import PASSWORDS_TASK
from benchmarks.quality.pieces import LONGER_TASKS, PIECES
from benchmarks.quality.runs import KEPT, Key, Run, add_run, read_runs
from benchmarks.quality.sentiment import REVIEWS_TASK, TWEETS_TASK
from benchmarks.quality.spectrum import SPECTRUM_TASKS, WIDTH_TASKS
from benchmarks.quality.sums import SUMS_TASK
from benchmarks.quality.task import Size, Task
from benchmarks.quality.training import make_run
from benchmarks.quality.words import WORDS_TASK

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(REVIEWS_TASK, TWEETS_TASK, CLOTHES_TASK, WORDS_TASK, DIGITS_TASK, DOCSTRINGS_TASK, *LONGER_TASKS),
        *(SUMS_TASK, PASSWORDS_TASK, FACTS_TASK, *SPECTRUM_TASKS),
    )
}
OWN_TASKS: Mapping[str, Sequence[Task]] = {
    "widths": WIDTH_TASKS,
    "places": (REVIEWS_TASK, WORDS_TASK),
    "sides": (WORDS_TASK,),
    "placed": (WORDS_TASK,),
}
"""The tasks of groups that are not for all of them."""
BUILD = Path("build/benchmarks/quality")
SEEDS = 3
MOST_BEYOND = 5  # more would be needed where each step towards 0 is better, as if training did nothing but harm
console = Console(highlight=False, soft_wrap=True)


def main(
    task: Annotated[str, typer.Option(help="A regular expression for the names of tasks.")] = ".*",
    contestant: Annotated[str, typer.Option(help="A regular expression for the names of methods.")] = ".*",
    group: Annotated[str, typer.Option(help=f"Who takes part: {', '.join(GROUPS)}.")] = "main",
    seeds: Annotated[int, typer.Option(help="Runs of each method at each learning rate.")] = SEEDS,
    full: Annotated[bool, typer.Option("--full", help="Use all data, not a quick look with little of it.")] = False,  # noqa: FBT002
    piece: Annotated[str, typer.Option(help="A piece of benchmarks.quality.pieces, in full; `list` lists them.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves them as they are.")] = 0,
) -> None:
    """Train all methods at several learning rates each, except for runs that exist already, and sum up."""
    if threads or piece:
        torch.set_num_threads(threads or 1)  # sums of more threads differ in their last bits
    if piece:
        if piece != "list" and not any(re.fullmatch(piece, name) for name in PIECES):
            raise typer.BadParameter(f"there are the pieces {', '.join(PIECES)}")
        for name, own in PIECES.items():
            if piece == "list" or re.fullmatch(piece, name):
                console.print(name, style="bold")
                if piece != "list":
                    chosen = {each: GROUPS[own.group][each] for each in own.contestants or GROUPS[own.group]}
                    seeds_of = range(own.seeds)
                    runs_of(own.task, chosen, seeds_of, KEPT, full=True, rates=own.rates, screening=own.screening)
        return
    if group not in GROUPS:
        raise typer.BadParameter(f"there are the groups {', '.join(GROUPS)}")
    directory = KEPT if full else BUILD
    offered = {task.name: task for task in OWN_TASKS.get(group, TASKS.values())}
    tasks = {name: each for name, each in offered.items() if re.fullmatch(task, name)}
    chosen = {name: each for name, each in GROUPS[group].items() if re.fullmatch(contestant, name)}
    if not tasks or not chosen:
        raise typer.BadParameter(f"there are the tasks {', '.join(offered)}, and methods {', '.join(GROUPS[group])}")
    found = {}
    for name, each in tasks.items():
        try:
            found[name] = each, runs_of(each, chosen, range(seeds), directory, full=full)
        except FileNotFoundError as error:  # its data
            console.print(f"skipped {name}: {error}")
    if not found:
        raise typer.Exit(1)
    from benchmarks.quality import figures  # noqa: PLC0415  (matplotlib, which takes a second)

    BUILD.mkdir(parents=True, exist_ok=True)
    for name, (each, runs) in found.items():
        tables = f"{summary.table_of(each, runs)}\n{summary.rates_of(each, runs)}"
        (BUILD / f"{group}_{file_stem(name)}.md").write_text(tables, encoding="utf-8")
    figures.draw(found.values(), BUILD / f"{group}.svg")
    console.print(f"tables and a figure are in {BUILD}")


def runs_of(
    task: Task,
    contestants: Mapping[str, Contestant],
    seeds: Sequence[int],
    directory: Path,
    *,
    full: bool,
    rates: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
    screening: int | None = None,
) -> list[Run]:
    """Return the runs of some contestants, making those that are not in the task's file.

    A contestant that is best at the lowest or the highest of its learning rates goes on to others beyond that. Of a
    piece, which has a ``screening``, it then goes on to the middle of the steps beside the best; and unless that is 0,
    rates are tried on so many seeds, the two best on those that a rate is chosen on, and the others have the best.
    Rates that are given are all.

    For a quick look there is one seed, and one learning rate in the middle.
    """
    next_rates = {name: rates.get(name, task.rates[each.family]) for name, each in contestants.items()}
    if not full:
        seeds, next_rates = seeds[:1], {name: own[len(own) // 2 :][:1] for name, own in next_rates.items()}
    file = directory / f"{file_stem(task.name)}.jsonl"
    make = partial(kept_or_made, task, contestants, file, "full" if full else "quick")
    found: list[Run] = []
    curves: dict[str, list[summary.Point]] = {}
    for _ in range(1 + MOST_BEYOND):
        found += make(seeds[: screening or None], next_rates)
        curves = summary.by_contestant(summary.points_of(task, found))
        more = {name: summary.next_rates(task, own, is_halved=screening is not None) for name, own in curves.items()}
        next_rates = {name: own for name, own in more.items() if own and name not in rates}
    if screening:
        best_two = {name: [point.lr for point in summary.ranked(task, own)[:2]] for name, own in curves.items()}
        found += make(seeds[screening : summary.CHOOSING], best_two)
        kept = [run for run in read_runs(file) if run.key.contestant in contestants]
        chosen = summary.by_contestant(summary.points_of(task, summary.whole(kept)))
        found += make(seeds[summary.CHOOSING :], {name: [summary.best(task, own).lr] for name, own in chosen.items()})
    return found


def kept_or_made(
    task: Task,
    contestants: Mapping[str, Contestant],
    file: Path,
    size: Size,
    seeds: Sequence[int],
    rates: Mapping[str, Sequence[float]],
) -> Iterator[Run]:
    """Go through runs, making and keeping those that are not in a file, which other processes may add to."""
    known: dict[Key, Run] = {}
    for seed, name in itertools.product(seeds, rates):
        for key in (Key(task.name, name, lr, seed) for lr in rates[name]):
            if key not in known:
                known = {run.key: run for run in read_runs(file)}
            if key not in known:
                known[key] = make_run(task, contestants[name], key, size)
                add_run(file, known[key])
            measured = ", ".join(f"{what} {value:.3f}" for what, value in known[key].found.items())
            words = f"{task.name}, {name}, lr {key.lr:g}, seed {seed}: {measured}"
            console.print(f"{words} ({known[key].seconds:.0f} s)")
            yield known[key]


def file_stem(name: str) -> str:
    """Return the name of a task as part of the name of a file."""
    return name.replace(" ", "_")


if __name__ == "__main__":
    gc.freeze()  # else garbage is looked for among all that was imported, before each run, for longer than some take
    typer.run(main)

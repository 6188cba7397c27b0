"""The command line that all benchmarks share."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.results import Results, Row
from benchmarks.targets import passed_over, verdicts

OUT = Path("build/benchmarks")
LONGEST = {"cpu": float("inf"), "cuda": 7 * 60.0}
"""Seconds after which no further benchmark begins; a GPU is often borrowed for ten minutes."""
NO_CUDA = (
    "this machine, or this build of torch, has no CUDA device, so nothing was measured; "
    "it takes an NVIDIA GPU and a torch whose version does not end in +cpu"
)
console = Console(width=160, record=True)


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        device: Where to measure.
        is_quick: Only the cases that have targets.
        out: Directory for what is found.
    """

    device: str
    is_quick: bool
    out: Path = OUT


Run = Callable[[Settings], Sequence[Row]]


def measure(name: str, run: Run, settings: Settings, *, gate: bool) -> bool:
    """Run one benchmark, show and save what it found, and judge it.

    On a CPU, which others may use as well, a benchmark that misses a target is run a second time, and that run counts.

    Returns:
        Whether every target was met, or none was asked about.
    """
    console.print(f"measuring {name}")  # once: a spinner would take its share of a core
    results = _found(name, run, settings, 1)
    found = verdicts(results) if gate else []
    if settings.device == "cpu" and not all(verdict.is_met for verdict in found):
        for verdict in found:
            if not verdict.is_met:
                console.print(f"missed {verdict.words}: {name} is run once more, and the second run counts")
        results = _found(name, run, settings, 2)
        found = verdicts(results)
    words = [("met    " if verdict.is_met else "missed ") + verdict.words for verdict in found]
    results.save(settings.out, words)
    if gate and not found:
        console.print(f"{name} has no targets")
    for verdict, line in zip(found, words, strict=True):
        console.print(line, style="green" if verdict.is_met else "red", highlight=False)
    for line in passed_over(results) if gate else ():
        console.print(f"skipped {line}", highlight=False)
    console.print(f"{name} took {results.seconds:.0f} s", highlight=False)
    return all(verdict.is_met for verdict in found)


def _found(name: str, run: Run, settings: Settings, turn: int) -> Results:
    """Run a benchmark and show its table."""
    start = time.perf_counter()
    rows = run(settings)
    seconds = time.perf_counter() - start
    results = Results(name, describe(settings.device), rows, settings.device, settings.is_quick, seconds, turn)
    console.print(results.table())
    return results


def measure_all(
    benchmarks: Sequence[tuple[str, Run]], settings: Settings, only_on: Mapping[str, str], *, gate: bool
) -> bool:
    """Run benchmarks one after the other; one that fails shuts the gate, and the next goes on.

    Returns:
        Whether every target was met and, where targets were asked about, every benchmark ran that the device can run.
    """
    start, kept_out, failed, missed = time.perf_counter(), [], [], []
    for name, run in benchmarks:
        if only_on.get(name, settings.device) != settings.device:
            console.print(f"skipped {name}, which is only for {only_on[name]}")
        elif time.perf_counter() - start > LONGEST[settings.device]:
            kept_out.append(name)
        else:
            try:
                if not measure(name, run, settings, gate=gate):
                    missed.append(name)
            except Exception:  # whatever it is, the others have nothing to do with it
                console.print(traceback.format_exc(), highlight=False, markup=False)
                failed.append(name)
    lines = {"raised an error": failed, "missed targets": missed, "had no time left": kept_out}
    for what, names in lines.items():
        if names:
            console.print(f"{what}: {', '.join(names)}", style="red")
    taken = time.perf_counter() - start
    console.print(f"all took {taken:.0f} s; JSON, tables and this report are in {settings.out}", highlight=False)
    return not any(lines.values())


def settings_of(device: str, *, full: bool, out: Path) -> Settings:
    """Return what the user asked for; a GPU's results have a directory of their own.

    Raises:
        typer.BadParameter: Where there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(NO_CUDA, param_hint="--device")
    return Settings(device, is_quick=not full, out=out / "cuda" if device == "cuda" else out)


def main(*benchmarks: tuple[str, Run], only_on: Mapping[str, str] = MappingProxyType({})) -> None:
    """Read the command line and run some benchmarks.

    Args:
        *benchmarks: Names, and what to run.
        only_on: The device of those that are for one alone.
    """

    def command(
        device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
        threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves them as they are.")] = 0,
        out: Annotated[Path, typer.Option(help="Directory for JSON, tables and pictures.")] = OUT,
        full: Annotated[bool, typer.Option("--full", help="Run sweeps, and cases without targets, too.")] = False,  # noqa: FBT002
        gate: Annotated[bool, typer.Option("--gate", help="Fail if a target is missed.")] = False,  # noqa: FBT002
    ) -> None:
        """Measure beside the peers, and print ratios."""
        settings = settings_of(device, full=full, out=out)
        if threads:
            torch.set_num_threads(threads)
        for fact, value in describe(device).items():
            console.print(f"{fact}: {value}", highlight=False)
        is_met = measure_all(benchmarks, settings, only_on, gate=gate)
        settings.out.mkdir(parents=True, exist_ok=True)
        console.save_text(str(settings.out / "report.txt"))
        raise typer.Exit(0 if is_met else 1)

    typer.run(command)

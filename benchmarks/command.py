"""The command line that all benchmarks share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from benchmarks.machine import describe
from benchmarks.results import Results, Row
from benchmarks.targets import verdicts

OUT = Path("build/benchmarks")
console = Console(width=160)


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

    Returns:
        Whether every target was met, or none was asked about.
    """
    console.print(f"measuring {name}")  # once: a spinner would take its share of a core
    results = Results(name, describe(settings.device), run(settings))
    console.print(results.table())
    results.save(settings.out)
    found = verdicts(results) if gate else []
    if gate and not found:
        console.print(f"{name} has no targets")
    for verdict in found:
        console.print(("[green]met   [/green] " if verdict.is_met else "[red]missed[/red] ") + verdict.words)
    return all(verdict.is_met for verdict in found)


def main(*benchmarks: tuple[str, Run]) -> None:
    """Read the command line and run some benchmarks."""

    def command(
        device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
        threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves them as they are.")] = 0,
        out: Annotated[Path, typer.Option(help="Directory for JSON, tables and pictures.")] = OUT,
        full: Annotated[bool, typer.Option("--full", help="Sweeps, and cases without targets too.")] = False,  # noqa: FBT002
        gate: Annotated[bool, typer.Option("--gate", help="Fail where a target is missed.")] = False,  # noqa: FBT002
    ) -> None:
        """Measure beside the peers, and print ratios."""
        if device == "cuda" and not torch.cuda.is_available():
            raise typer.BadParameter("this machine, or this build of torch, has no CUDA device", param_hint="--device")
        if threads:
            torch.set_num_threads(threads)
        settings = Settings(device, is_quick=not full, out=out)
        for fact, value in describe(device).items():
            console.print(f"{fact}: {value}", highlight=False)
        met = [measure(name, run, settings, gate=gate) for name, run in benchmarks]
        raise typer.Exit(0 if all(met) else 1)

    typer.run(command)

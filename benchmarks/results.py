"""What a benchmark found: rows of figures, and their ways out as JSON, tables and a picture."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.timing import Figure

BASELINE = "full"
PEER = "PEFT"
OURS = ("dense", "block", "very_sparse", "merged", "ours")
UNITS = {"s": "time", "B": "bytes", "%": "accuracy"}
SCALES = {"s": ((1.0, "s"), (1e-3, "ms")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))}


@dataclass(frozen=True)
class Row:
    """One case with the figures of all contestants.

    Attributes:
        case: What was measured, in words; unique in its benchmark.
        figures: By contestant.
        sweep: ``(axis, value)`` where the row is a point of a curve.
    """

    case: str
    figures: dict[str, Figure]
    sweep: tuple[str, float] | None = None

    def ratio(self, first: str, second: str) -> float:
        """Divide one contestant's best figure by another's."""
        return self.figures[first].best / self.figures[second].best

    def median_ratio(self, first: str, second: str) -> float:
        """Divide one contestant's median by another's."""
        return self.figures[first].median / self.figures[second].median


@dataclass(frozen=True)
class Results:
    """All rows of one benchmark.

    Attributes:
        benchmark: Its name.
        machine: Where it ran, as `benchmarks.machine.describe` says.
        rows: What it found.
        device: ``cpu`` or ``cuda``.
        is_quick: Whether only cases with targets were asked for.
        seconds: How long it took.
        run: The first, or the second after one that missed a target.
    """

    benchmark: str
    machine: dict[str, str]
    rows: Sequence[Row]
    device: str = "cpu"
    is_quick: bool = True
    seconds: float = 0.0
    run: int = 1

    def columns(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Name the contestants, and the pairs whose ratio is worth a column: the peer by each of ours."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.figures))
        ours = [name for name in names if name in OURS]
        return names, [(PEER, name) for name in ours if PEER in names]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Lay the rows out: every contestant relative to the baseline, then the peer's best and median by ours."""
        names, pairs = self.columns()
        baseline = BASELINE if BASELINE in names else None
        titles = ["case", *(f"{name} / {baseline}" if baseline else name for name in names if name != baseline)]
        titles += [f"{first} / {second} (median)" for first, second in pairs]
        return titles, [self._cells(row, names, pairs, baseline) for row in self.rows]

    def _cells(self, row: Row, names: list[str], pairs: list[tuple[str, str]], baseline: str | None) -> list[str]:
        shown = [name for name in names if name != baseline]
        cells = [row.case]
        for name in shown:
            if name not in row.figures:
                cells.append("")
            else:
                cells.append(f"{row.ratio(name, baseline):.2f}" if baseline else written(row.figures[name]))
        for first, second in pairs:
            both = first in row.figures and second in row.figures and row.figures[second].best > 0
            cells.append(f"{row.ratio(first, second):.2f} ({row.median_ratio(first, second):.2f})" if both else "")
        return cells

    def table(self) -> Table:
        """Make a table for the terminal."""
        titles, rows = self.cells()
        table = Table(title=f"{self.benchmark}: best of the repeats", title_justify="left")
        for index, title in enumerate(titles):
            table.add_column(title, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Make a table for the documentation."""
        return in_markdown(*self.cells())

    def save(self, directory: Path, verdicts: Sequence[str] = ()) -> None:
        """Write JSON, with what became of the targets, Markdown and, where there are curves, a picture."""
        directory.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**asdict(self), "verdicts": list(verdicts)}, indent=1) + "\n"
        (directory / f"{self.benchmark}.json").write_text(content, encoding="utf-8")
        (directory / f"{self.benchmark}.md").write_text(self.markdown(), encoding="utf-8")
        if curves := self._curves():
            from matplotlib.figure import Figure as Picture  # noqa: PLC0415  (which takes a second to import)

            picture = Picture(figsize=(5.2 * len(curves), 4), layout="constrained")
            for axes, (axis, rows) in zip(
                picture.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
            ):
                for name in dict.fromkeys(name for row in rows for name in row.figures):
                    points = [
                        (row.sweep[1], row.figures[name].best) for row in rows if row.sweep and name in row.figures
                    ]
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
                unit = next(iter(rows[0].figures.values())).unit
                axes.set(
                    xlabel=axis, ylabel=f"{UNITS[unit]} ({unit})", xscale="log", yscale="log", title=self.benchmark
                )
                axes.grid(alpha=0.3)
                axes.legend(fontsize="small")
            picture.savefig(directory / f"{self.benchmark}.png", dpi=130)

    def _curves(self) -> dict[str, list[Row]]:
        curves: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.sweep:
                curves[row.sweep[0]].append(row)
        return {axis: rows for axis, rows in curves.items() if len(rows) > 1}


def written(figure: Figure) -> str:
    """Write a figure with its unit, or the multiple of it that makes a short number."""
    if figure.unit not in SCALES:
        return f"{figure.best:.1f} {figure.unit}" if figure.unit == "%" else f"{figure.best:g}"
    scales = SCALES[figure.unit]
    size, unit = next((scale for scale in scales if figure.best >= scale[0]), scales[-1])
    return f"{figure.best / size:.3g} {unit}"


def in_markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with the first column to the left and all others to the right."""
    lines = [titles, ["---", *["--:"] * (len(titles) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

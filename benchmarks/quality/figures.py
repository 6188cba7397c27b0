"""Figures of many runs: accuracy against drift, and against the number of trained parameters."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, NullFormatter

from benchmarks.quality.runs import Run
from benchmarks.quality.summary import best, by_contestant, points_of
from benchmarks.quality.task import Task

INK = "#7f7f7f"
"""Of axes and labels: readable on white and on black."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255", "#7f7f7f", "#6a51a3")
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#009e73"},
    "LoRA": {"color": "#d55e00"},
    "LoRA, equal size": {"color": "#e69f00"},
    "rsLoRA": {"color": "#cc79a7"},
    "dense": {"color": "#0072b2", "linewidth": 2},
    "block": {"color": "#6a51a3", "linestyle": (0, (3, 2))},
    "gamma first": {"color": "#56b4e9", "linestyle": (0, (3, 2))},
    "dense, Λ alone": {"color": "#56b4e9", "linewidth": 2},
    "block, Λ alone": {"color": "#b3a2d9", "linestyle": (0, (3, 2))},
}
"""Of the contestants that several figures show, so that each looks the same on all."""


def draw(
    tasks: Collection[tuple[Task, Sequence[Run]]], file: Path, labels: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Draw the metric against the drift of each task, a curve for each contestant over its learning rates.

    With labels, only contestants that have one. What is worse than the best rates of all contestants is out of the
    picture: a ruined model tells little, and would leave little room for the others. A line has the frozen model.
    """
    names = labels or {name: name for _, runs in tasks for name in (run.key.contestant for run in runs)}
    with _panels(file, len(tasks), "curves") as panels:
        for axes, (task, runs) in zip(panels, tasks, strict=True):
            curves = by_contestant(points_of(task, runs))
            frozen = curves.pop("frozen", None)
            own = [name for name in names if name in curves]
            for name in own:
                style = STYLES.get(name, {"color": COLORS[[*names].index(name) % len(COLORS)]})
                values = [_drawn(task, each.metric) for each in curves[name]]
                draw_curve(axes, names[name], [each.drift for each in curves[name]], values, **style)
            ends = [choose(_drawn(task, best(task, curves[name]).metric)[0] for name in own) for choose in (min, max)]
            if task.is_better_if_larger:
                ends[0] = min(ends[0], _drawn(task, frozen[0].metric)[0]) if frozen else ends[0]
                room = 0.2 * (ends[1] - ends[0]) + 0.005 * _drawn(task, (1.0, 0.0))[0]
                axes.set_ylim(ends[0] - room, ends[1] + room)
            else:
                axes.set_yscale("log")
                axes.set_ylim(ends[0] / 1.3, ends[1] * 3)
            if frozen:
                axes.axhline(_drawn(task, frozen[0].metric)[0], linestyle=":", color=INK, label="before training")
            unit = ", %" if task.in_percent else ""
            axes.set(title=task.name, xlabel="drift", ylabel=f"{task.metric}{unit}", xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            if not task.is_better_if_larger:
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 6)))


def _drawn(task: Task, value: tuple[float, float]) -> tuple[float, float]:
    """Return a metric and its error as they are drawn: in percent where the task has it so."""
    factor = 100 if task.in_percent else 1
    return factor * value[0], factor * value[1]


def draw_sizes(
    tasks: Collection[tuple[Task, Sequence[Run]]], labels: Mapping[str, str], reference: str, file: Path
) -> None:
    """Draw the metric at the best learning rate against the number of trained parameters, a curve for each method.

    A contestant is of the method with whose name its own begins. Full fine-tuning, the ``reference``, has too many
    parameters to be a point, and is a line.
    """
    with _panels(file, len(tasks), "sizes", EngFormatter(sep="")) as panels:
        for axes, (task, runs) in zip(panels, tasks, strict=True):
            trained = {run.key.contestant: run.trained for run in runs}
            curves = by_contestant(points_of(task, runs))
            chosen = [best(task, points) for points in curves.values()]
            for method, label in labels.items():
                own = [point for point in chosen if _method_of(point.contestant, labels) == method]
                own.sort(key=lambda point: trained[point.contestant])
                sizes = [(float(trained[point.contestant]), math.nan) for point in own]
                draw_curve(axes, label, sizes, [_drawn(task, point.metric) for point in own], **STYLES[method])
            reached = _drawn(task, best(task, curves[reference]).metric)[0]
            axes.axhline(reached, linestyle="--", label=reference, **STYLES["full"])
            unit = ", %" if task.in_percent else ""
            axes.set(title=task.name, xlabel="trained parameters", ylabel=f"{task.metric}{unit}", xscale="log")


def _method_of(contestant: str, methods: Iterable[str]) -> str:
    """Return the method with whose name that of a contestant begins, the longest of several."""
    return max((method for method in methods if contestant.startswith(method)), key=len, default="")


@contextmanager
def _panels(file: Path, count: int, salt: str, across: Formatter | str = "{x:g}") -> Iterator[Sequence[Axes]]:
    """Yield axes to draw into, in rows of three or two, with such numbers across, and write them to a file."""
    rcParams["svg.hashsalt"] = salt  # so that the same runs give the same file
    columns = min(count, 2 if count % 3 else 3)
    rows = math.ceil(count / columns)
    height = rows * max(3.0, 6.8 / columns)
    picture = Figure(figsize=(8.4, height), layout="constrained")  # on a page, letters are then as large as the page's
    panels: list[Axes] = list(picture.subplots(rows, columns, squeeze=False).flat)[:count]
    yield panels
    for axes in panels:
        for axis in (axes.xaxis, axes.yaxis) if axes.get_yscale() == "log" else (axes.xaxis,):
            axis.set_major_formatter(across if axis is axes.xaxis else "{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.tick_params(which="both", colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
    lines = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    picture.legend([*lines.values()], [*lines], loc="outside lower center", ncols=3, framealpha=0, labelcolor=INK)
    picture.savefig(file, transparent=True, metadata={"Date": None})


def draw_curve(
    axes: Axes, label: str, x: Sequence[tuple[float, float]], y: Sequence[tuple[float, float]], **style: Any
) -> None:
    """Draw points with error bars of one standard error, where these are known."""
    axes.errorbar(
        [mean for mean, _ in x], [mean for mean, _ in y],
        xerr=[_known(error) for _, error in x], yerr=[_known(error) for _, error in y],
        marker="o", markersize=4, elinewidth=0.8, label=label, **style,
    )  # fmt: skip


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error

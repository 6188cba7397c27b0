"""Tables and figures of many runs: accuracy against drift."""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.quality.runs import Run
from benchmarks.quality.task import Task
from benchmarks.results import in_markdown

INK = "#7f7f7f"
"""Of axes and labels: readable on white and on black."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255", "#7f7f7f", "#6a51a3")
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#009e73"},
    "LoRA": {"color": "#d55e00"},
    "LoRA, equal size": {"color": "#e69f00"},
    "dense": {"color": "#0072b2", "linewidth": 2},
    "gamma first": {"color": "#56b4e9", "linestyle": (0, (3, 2))},
}
"""Of the contestants that figures on several pages show, so that each looks the same on all."""
RATES = [float(f"{digit}e{power}") for power in range(-9, 3) for digit in (1, 3)]
"""The learning rates that a sweep goes on to beyond those of a task, each at least twice the one before."""


@dataclass(frozen=True)
class Point:
    """One contestant at one learning rate, over all seeds: means with their standard errors.

    Attributes:
        metric: The task's metric.
        drift: How far the model has drifted on other data.
        seeds: Their number.
    """

    contestant: str
    lr: float
    metric: tuple[float, float]
    drift: tuple[float, float]
    seeds: int


def points_of(task: Task, runs: Iterable[Run]) -> list[Point]:
    """Sum up over seeds; contestants in order of appearance, each with rising learning rates."""
    groups: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.key.contestant, {}).setdefault(run.key.lr, []).append(run)
    return [
        Point(
            contestant,
            lr,
            mean_and_error([run.found[task.metric] for run in own]),
            mean_and_error([run.found["drift"] for run in own]),
            len(own),
        )
        for contestant, by_rate in groups.items()
        for lr, own in sorted(by_rate.items())
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is not known of one value, or if one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def best(task: Task, points: Sequence[Point]) -> Point:
    """Return the point with the best metric; one that is not a number is the worst."""
    return max(points, key=partial(_score, task))


def _score(task: Task, point: Point) -> float:
    """Return the metric, so that more is better."""
    value = point.metric[0] if task.is_better_if_larger else -point.metric[0]
    return -math.inf if math.isnan(value) else value


def rate_beyond(task: Task, points: Sequence[Point]) -> float | None:
    """Return the next learning rate beyond the lowest or the highest one, if that is better than all others."""
    chosen, *others = sorted(points, key=partial(_score, task), reverse=True)
    if not others or _score(task, chosen) == _score(task, others[0]):
        return None
    if chosen.lr < min(point.lr for point in others):
        return max(rate for rate in RATES if rate <= chosen.lr / 2)
    if chosen.lr > max(point.lr for point in others):
        return min(rate for rate in RATES if rate >= chosen.lr * 2)
    return None


def front(task: Task, points: Sequence[Point]) -> list[Point]:
    """Return the points of which no other has a better metric at no more drift, by drift."""
    found: list[Point] = []
    known = [point for point in points if not math.isnan(point.metric[0] + point.drift[0])]
    for point in sorted(known, key=lambda each: (each.drift[0], -_score(task, each))):
        if not found or _score(task, point) > _score(task, found[-1]):
            found.append(point)
    return found


def gain(task: Task, runs: Sequence[Run], first: str, second: str) -> tuple[float, float]:
    """Return by how much a contestant's metric is better than another's, each at its best rate, and the standard error.

    The error is that of the differences of equal seeds, which share data and batches.
    """
    sign = 1 if task.is_better_if_larger else -1
    by_seed = []
    for contestant in (first, second):
        own = [run for run in runs if run.key.contestant == contestant]
        lr = best(task, points_of(task, own)).lr
        by_seed.append({run.key.seed: run.found[task.metric] for run in own if run.key.lr == lr})
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    return mean_and_error([sign * (by_seed[0][seed] - by_seed[1][seed]) for seed in seeds])


def table_of(task: Task, runs: Sequence[Run]) -> str:
    """Write a table in Markdown: each contestant at its best learning rate, and what it costs beside full fine-tuning.

    The gain is the one over the first LoRA in the table, or else over our default adapter, by equal seeds. What else
    all runs have measured follows.
    """
    curves = by_contestant(points_of(task, runs))
    peers = [name for name in curves if name.startswith("LoRA")] + [name for name in curves if name == "dense"]
    peer = peers[0] if peers else None
    times = times_of(runs)
    others = [what for what in runs[0].found if what not in (task.metric, "drift")]
    others = [what for what in others if all(what in run.found for run in runs)]
    gained = [f"gain over {peer}"] if peer else []
    titles = ["method", task.metric, "drift", *gained, *others]
    titles += ["best rate", "parameters", "time", "file, MB", "memory, MB"]
    lines = []
    for contestant, points in curves.items():
        chosen = best(task, points)
        own = [run for run in runs if run.key.contestant == contestant]
        line = [
            contestant,
            number(task, *chosen.metric),
            _with_error(f"{chosen.drift[0]:.3f}", f"{chosen.drift[1]:.3f}", chosen.drift[1]),
        ]
        line += [number(task, *gain(task, runs, contestant, peer))] if peer else []
        for what in others:
            mean, error = mean_and_error([run.found[what] for run in own if run.key.lr == chosen.lr])
            line.append(_with_error(f"{mean:.3g}", f"{error:.2g}", error))
        line += [
            f"{chosen.lr:g}",
            f"{own[0].trained:,}",
            f"{times[contestant]:.2f}" if contestant in times else "",
            f"{own[0].file_bytes / 1e6:.2f}",
            f"{max(run.peak_bytes for run in own) / 1e6:.0f}",
        ]
        lines.append(line)
    return in_markdown(titles, lines)


def times_of(runs: Sequence[Run]) -> dict[str, float]:
    """Return each contestant's time relative to full fine-tuning, or else the first, on the processor of that one."""
    contestants = dict.fromkeys(run.key.contestant for run in runs)
    reference = "full" if "full" in contestants else next(iter(contestants))
    processors = {run.machine.get("processor") for run in runs if run.key.contestant == reference}
    timed = [run for run in runs if run.machine.get("processor") in processors]
    seconds = {name: mean_seconds(timed, name) for name in {run.key.contestant for run in timed}}
    return {name: value / seconds[reference] for name, value in seconds.items()}


Tasks = Collection[tuple[Task, Sequence[Run]]]


def overview(tasks: Tasks, rows: Mapping[str, str]) -> str:
    """Write a table in Markdown: the metric of some contestants, under other names, at their best learning rates."""
    lines = [[label] for label in rows.values()]
    for task, runs in tasks:
        curves = by_contestant(points_of(task, runs))
        for line, contestant in zip(lines, rows, strict=True):
            line.append(_plain(task, *best(task, curves[contestant]).metric) if contestant in curves else "")
    return in_markdown(["", *(f"{task.name}, {_title(task)}" for task, _ in tasks)], lines)


def costs(tasks: Tasks, rows: Mapping[str, str]) -> str:
    """Write a table in Markdown: trained parameters, and in parentheses the time of full fine-tuning and the file."""
    trained = {run.key.contestant for _, runs in tasks for run in runs if run.trained}
    rows = {name: label for name, label in rows.items() if name in trained}
    lines = [[label] for label in rows.values()]
    for _, runs in tasks:
        first = {run.key.contestant: run for run in reversed(runs)}
        for line, contestant in zip(lines, rows, strict=True):
            run, time = first[contestant], times_of(runs)[contestant]
            line.append(f"{run.trained:,} ({time:.2f}; {run.file_bytes / 1e6:.2f} MB)")
    return in_markdown(["", *(task.name for task, _ in tasks)], lines)


def best_rates(tasks: Tasks) -> str:
    """Write a table in Markdown: each contestant's best learning rate in each task, and the metric there."""
    names = dict.fromkeys(run.key.contestant for _, runs in tasks for run in runs)
    lines = [[name] for name in names]
    for task, runs in tasks:
        curves = by_contestant(points_of(task, runs))
        for line, contestant in zip(lines, names, strict=True):
            point = best(task, curves[contestant]) if contestant in curves else None
            line.append(f"{point.lr:g} ({_plain(task, point.metric[0])})" if point else "")
    return in_markdown(["", *(task.name for task, _ in tasks)], lines)


def rates_of(task: Task, runs: Sequence[Run]) -> str:
    """Write a table in Markdown: metric and drift of each contestant at each learning rate, bold where on the front.

    A point is on the front if no other has a better metric at no more drift. The frozen model has no rate.
    """
    points = [point for point in points_of(task, runs) if point.lr]
    chosen = {(point.contestant, point.lr) for point in front(task, points)}
    rates = sorted({point.lr for point in points})
    lines = []
    for contestant, own in by_contestant(points).items():
        cells = {point.lr: f"{_plain(task, point.metric[0])} ({point.drift[0]:.3f})" for point in own}
        bold = {lr: f"**{cell}**" if (contestant, lr) in chosen else cell for lr, cell in cells.items()}
        lines.append([contestant, *(bold.get(lr, "") for lr in rates)])
    return in_markdown([f"{_title(task)} (drift)", *(f"{lr:g}" for lr in rates)], lines)


def mean_seconds(runs: Sequence[Run], contestant: str) -> float:
    """Return the mean time of a contestant's runs."""
    return statistics.mean(run.seconds for run in runs if run.key.contestant == contestant)


def by_contestant(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Put the points of each contestant together."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.contestant, []).append(point)
    return found


def number(task: Task, value: float, error: float = math.nan) -> str:
    """Write a metric, in percent where the task has it so."""
    return _plain(task, value, error) + (" %" if task.in_percent else "")


def _plain(task: Task, value: float, error: float = math.nan) -> str:
    """Write a metric without its unit, which a title has."""
    factor = 100 if task.in_percent else 1
    return _with_error(f"{factor * value:.{task.decimals}f}", f"{factor * error:.{task.decimals}f}", error)


def _title(task: Task) -> str:
    return f"{task.metric}, %" if task.in_percent else task.metric


def _with_error(value: str, error: str, is_known: float) -> str:
    return value if math.isnan(is_known) else f"{value} ± {error}"


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
    tasks: Collection[tuple[Task, Sequence[Run]]],
    labels: Mapping[str, str],
    whole: Collection[Sequence[Run]],
    file: Path,
) -> None:
    """Draw the metric at the best learning rate against the number of trained parameters, a curve for each method.

    The contestants of a method are those whose names begin with its name. The runs of full fine-tuning, ``whole``, have
    too many parameters to be a point, and are a line.
    """
    with _panels(file, len(tasks), "sizes") as panels:
        for axes, (task, runs), full in zip(panels, tasks, whole, strict=True):
            trained = {run.key.contestant: run.trained for run in runs}
            chosen = [best(task, points) for points in by_contestant(points_of(task, runs)).values()]
            for method, label in labels.items():
                own = [point for point in chosen if point.contestant.startswith(method)]
                own.sort(key=lambda point: trained[point.contestant])
                sizes = [(float(trained[point.contestant]), math.nan) for point in own]
                draw_curve(axes, label, sizes, [_drawn(task, point.metric) for point in own], **STYLES[method])
            reached = _drawn(task, best(task, points_of(task, full)).metric)[0]
            axes.axhline(reached, linestyle="--", label="full fine-tuning", **STYLES["full"])
            unit = ", %" if task.in_percent else ""
            axes.set(title=task.name, xlabel="trained parameters", ylabel=f"{task.metric}{unit}", xscale="log")


@contextmanager
def _panels(file: Path, count: int, salt: str) -> Iterator[Sequence[Axes]]:
    """Yield axes to draw into, in rows of three or two, and write them to a file."""
    rcParams["svg.hashsalt"] = salt  # so that the same runs give the same file
    columns = min(count, 2 if count % 3 else 3)
    rows = math.ceil(count / columns)
    height = rows * max(3.0, 6.8 / columns)
    picture = Figure(figsize=(8.4, height), layout="constrained")  # on a page, letters are then as large as the page's
    panels: list[Axes] = list(picture.subplots(rows, columns, squeeze=False).flat)[:count]
    yield panels
    for axes in panels:
        for axis in (axes.xaxis, axes.yaxis) if axes.get_yscale() == "log" else (axes.xaxis,):
            axis.set_major_formatter("{x:g}")
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

"""Tables of many runs: accuracy against drift, what differs, and what each method costs."""

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from benchmarks.quality.runs import Run, read_step_times
from benchmarks.quality.significance import Difference, difference, mean_and_error
from benchmarks.quality.task import Task
from benchmarks.results import in_markdown

RATES = [float(f"{digit}e{power}") for power in range(-9, 3) for digit in (1, 3)]
"""The learning rates that a sweep goes on to beyond those of a task, each at least twice the one before."""

CHOOSING = 5
"""The best rate is chosen on so many seeds, the first; others are run at that alone."""

WITHIN = 0.01
"""How far an adapter may be behind full fine-tuning to be as good: a point of accuracy, or so much loss."""


@dataclass(frozen=True)
class Point:
    """One contestant at one learning rate, over all seeds: means with their standard errors.

    Attributes:
        metric: The task's metric.
        chosen_by: What the best rate is chosen by: the metric on validation data where a task has some, or else itself,
            over the seeds that rates are chosen on.
        drift: How far the model has drifted on other data.
        seeds: Their number.
    """

    contestant: str
    lr: float
    metric: tuple[float, float]
    chosen_by: float
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
            mean_and_error([
                run.found.get("validation", run.found[task.metric]) for run in own if run.key.seed < CHOOSING
            ])[0],
            mean_and_error([run.found["drift"] for run in own]),
            len(own),
        )
        for contestant, by_rate in groups.items()
        for lr, own in sorted(by_rate.items())
    ]


def whole(runs: Sequence[Run]) -> list[Run]:
    """Return the runs at rates with the seeds that a rate is chosen on, or as many as any of the contestant has."""
    counts = Counter((run.key.contestant, run.key.lr) for run in runs)
    most = {contestant: max(n for (name, _), n in counts.items() if name == contestant) for contestant, _ in counts}
    return [run for run in runs if counts[run.key.contestant, run.key.lr] >= min(most[run.key.contestant], CHOOSING)]


def ranked(task: Task, points: Sequence[Point]) -> list[Point]:
    """Return points from the best to the worst."""
    return sorted(points, key=partial(_score, task), reverse=True)


def best(task: Task, points: Sequence[Point]) -> Point:
    """Return the point that is chosen as the best; one that is not a number is the worst."""
    return ranked(task, points)[0]


def _score(task: Task, point: Point) -> float:
    """Return what a point is chosen by, so that more is better."""
    value = point.chosen_by if task.is_better_if_larger else -point.chosen_by
    return -math.inf if math.isnan(value) else value


def rate_beyond(task: Task, points: Sequence[Point]) -> float | None:
    """Return the next learning rate beyond the lowest or the highest one, if that is better than all others."""
    chosen, *others = ranked(task, points)
    if not others or _score(task, chosen) == _score(task, others[0]):
        return None
    if chosen.lr < min(point.lr for point in others):
        return max(rate for rate in RATES if rate <= chosen.lr / 2)
    if chosen.lr > max(point.lr for point in others):
        return min(rate for rate in RATES if rate >= chosen.lr * 2)
    return None


def next_rates(task: Task, points: Sequence[Point], *, is_halved: bool) -> tuple[float, ...]:
    """Return the learning rates to try next: one beyond, or those in the middle of the steps beside the best."""
    beyond = rate_beyond(task, points)
    if beyond is not None or not is_halved:
        return () if beyond is None else (beyond,)
    rates = sorted(point.lr for point in points)
    place = rates.index(best(task, points).lr)
    beside = rates[max(0, place - 1) : place + 2]
    return tuple(float(f"{math.sqrt(low * high):.2g}") for low, high in pairwise(beside) if high > 2 * low)


def front(task: Task, points: Sequence[Point]) -> list[Point]:
    """Return the points of which no other has a better metric at no more drift, by drift."""
    found: list[Point] = []
    sign = 1 if task.is_better_if_larger else -1
    known = [point for point in points if not math.isnan(point.metric[0] + point.drift[0])]
    for point in sorted(known, key=lambda each: (each.drift[0], -sign * each.metric[0])):
        if not found or sign * point.metric[0] > sign * found[-1].metric[0]:
            found.append(point)
    return found


def gain(task: Task, runs: Sequence[Run], first: str, second: str) -> Difference:
    """Return by how much a contestant's metric is better than another's, each at its best rate."""
    return gain_of(task, at_best(task, runs, first), at_best(task, runs, second))


def gain_of(task: Task, first: Mapping[int, Run], second: Mapping[int, Run]) -> Difference:
    """Return by how much the metric of some runs is better than that of others, each by seed."""
    own, other = ({seed: run.found[task.metric] for seed, run in runs.items()} for runs in (first, second))
    return difference(own, other) if task.is_better_if_larger else difference(other, own)


def at_best(task: Task, runs: Sequence[Run], contestant: str) -> dict[int, Run]:
    """Return the runs of a contestant at its best rate by seed."""
    own = [run for run in runs if run.key.contestant == contestant]
    lr = best(task, points_of(task, own)).lr
    return {run.key.seed: run for run in own if run.key.lr == lr}


def written_gain(task: Task, runs: Sequence[Run], first: str, second: str) -> str:
    """Write a gain as tables have it."""
    return gain(task, runs, first, second).written(task.decimals, 100 if task.in_percent else 1)


def shown_gain(task: Task, runs: Sequence[Run], first: str, second: str) -> str:
    """Write a gain as tables on pages have it: where nothing can be told, the interval alone."""
    return written_gain(task, runs, first, second).removeprefix("not distinguishable ")


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
        line += [written_gain(task, runs, contestant, peer)] if peer else []
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
    """Write a table in Markdown: the metric of some contestants, under other names, at their best learning rates.

    What cannot be distinguished from the best of a task is bold, as that is. The last column has their steps.
    """
    lines = [[label] for label in rows.values()]
    for task, runs in tasks:
        curves = by_contestant(points_of(task, runs))
        chosen = {name: best(task, curves[name]) for name in rows if name in curves}
        sign = 1 if task.is_better_if_larger else -1
        first = max(chosen, key=lambda name: sign * chosen[name].metric[0])
        for line, contestant in zip(lines, rows, strict=True):
            cell = _plain(task, *chosen[contestant].metric) if contestant in chosen else ""
            is_known = bool(cell) and math.isfinite(chosen[contestant].metric[0])
            is_bold = is_known and not gain(task, runs, first, contestant).is_distinguishable
            line.append(f"**{cell}**" if is_bold else cell)
    steps = [steps_of(name, [task for task, _ in tasks]) for name in rows]
    titles = ["", *(f"{task.name}, {_title(task)}" for task, _ in tasks)]
    return _with_steps(titles, lines, steps if any(steps) else ())


def _with_steps(titles: Sequence[str], lines: Sequence[Sequence[str]], steps: Sequence[str]) -> str:
    """Write a table in Markdown, with the steps of its lines in a last column if there are any."""
    if not steps:
        return in_markdown(titles, lines)
    return in_markdown([*titles, "step"], [[*line, step] for line, step in zip(lines, steps, strict=True)])


def steps_of(contestant: str, tasks: Collection[Task]) -> str:
    """Write the time of a contestant's steps over those of a LoRA of equal size: the least and the most of tasks."""
    times = [known[contestant] for task in tasks if contestant in (known := read_step_times().get(task.name, {}))]
    ends = dict.fromkeys(f"{end:.2f}" for end in (min(times), max(times))) if times else ()
    return " to ".join(ends)


def differences(tasks: Tasks, pairs: Mapping[str, tuple[str, str]]) -> str:
    """Write a table in Markdown: by how much the first of each pair is better than the second, by the one rule."""
    lines = [[label] for label in pairs]
    for task, runs in tasks:
        names = {run.key.contestant for run in runs}
        for line, pair in zip(lines, pairs.values(), strict=True):
            line.append(shown_gain(task, runs, *pair) if names.issuperset(pair) else "")
    return in_markdown(["", *(f"{task.name}, {_title(task)}" for task, _ in tasks)], lines)


def smallest(tasks: Tasks, methods: Mapping[str, str], reference: str) -> str:
    """Write a table in Markdown: of each method the smallest size at most a point, or .01, behind a reference.

    The contestants of a method are those whose names begin with its name. A cell has the trained parameters, and the
    gain over the reference, over the seeds of both; *at most* where smaller sizes of the method were not run.
    """
    lines = [[label] for label in methods.values()]
    for task, runs in tasks:
        trained = {run.key.contestant: run.trained for run in runs}
        near = [name for name in trained if gain(task, runs, name, reference).mean >= -WITHIN]
        for line, method in zip(lines, methods, strict=True):
            sizes = [name for name in trained if name.startswith(f"{method} ")]
            own = min((name for name in near if name in sizes), key=trained.__getitem__, default=None)
            is_bound = own == min(sizes, key=trained.__getitem__, default=None) != f"{method} 1"
            cell = f"{trained[own]:,}: {shown_gain(task, runs, own, reference)}" if own else "none"
            line.append(f"at most {cell}" if is_bound else cell)
    return in_markdown(["", *(f"{task.name}, {_title(task)}" for task, _ in tasks)], lines)


def best_rates(tasks: Tasks) -> str:
    """Write a table in Markdown: each contestant's best learning rate in each task, and the metric there."""
    names = dict.fromkeys(run.key.contestant for _, runs in tasks for run in runs)
    lines = [[name] for name in names]
    for task, runs in tasks:
        curves = by_contestant(points_of(task, runs))
        for line, contestant in zip(lines, names, strict=True):
            point = best(task, curves[contestant]) if contestant in curves else None
            line.append(f"{point.lr:g} ({_plain(task, point.metric[0])})" if point else "")
    steps = [steps_of(name, [task for task, _ in tasks]) for name in names]
    return _with_steps(["", *(task.name for task, _ in tasks)], lines, steps if all(steps) else ())


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
    steps = [steps_of(contestant, [task]) for contestant, *_ in lines]
    titles = [f"{_title(task)} (drift)", *(f"{lr:g}" for lr in rates)]
    return _with_steps(titles, lines, steps if any(steps) else ())


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

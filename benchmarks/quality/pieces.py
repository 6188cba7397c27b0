"""The runs behind the curves of quality over size and the rule of the learning rate, in pieces of minutes to hours.

``python -m benchmarks.quality --piece "curves of digits"`` makes the runs of one that are missing, and
``--piece list`` lists them in order of worth. Each run is kept as it ends, so that a piece goes on where it was
interrupted, and several processes may make different pieces at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks.quality import fashion, words
from benchmarks.quality.contestants import CURVES
from benchmarks.quality.digits import DIGITS_TASK
from benchmarks.quality.docstrings import DOCSTRINGS_TASK
from benchmarks.quality.fashion import CLOTHES_TASK
from benchmarks.quality.runs import KEPT, Run, read_runs
from benchmarks.quality.sentiment import REVIEWS_TASK, TWEETS_TASK
from benchmarks.quality.summary import CHOOSING, best, gain_of, points_of, whole
from benchmarks.quality.sums import SUMS_TASK
from benchmarks.quality.task import Prepared, Task
from benchmarks.results import in_markdown

SHARES = (0.2, 0.3, 0.5)
"""The rates that the rule may name, times m̃ / √(20 / s)."""
SCALES = {"dense, s = 2": 2.0, "dense, s = 0.5": 0.5}
"""The scaling s of the contestants for which it is measured, if it is not 20."""


@dataclass(frozen=True)
class Piece:
    """Some contestants on a task.

    Attributes:
        group: Their group.
        task: The task.
        contestants: Those of the group that take part; all if none are named.
        rates: The learning rates of each, which are then all. Without them, a piece begins with those of the family,
            goes beyond the lowest or the highest while that is the best, and then halves the steps beside the best.
        seeds: Runs of each at each rate.
        screening: If it is not 0, rates are tried on so many seeds, the two best on those that a rate is chosen on, and
            the others have the best alone.
    """

    group: str
    task: Task
    contestants: tuple[str, ...] = ()
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seeds: int = CHOOSING
    screening: int = 0


def unit_of(task: Task, name: str) -> float:
    """Return the learning rate of a share of 1."""
    return math.sqrt(20 / SCALES.get(name, 20)) / task.width


def of_rule(task: Task, *names: str) -> Piece:
    """Make a piece that measures the rule at three shares."""
    rates = {
        f"{name}, by the rule": tuple(float(f"{share * unit_of(task, name):.3g}") for share in SHARES) for name in names
    }
    return Piece("rule", task, tuple(rates), rates)


def longer(task: Task, prepare: Callable[..., Prepared]) -> list[Task]:
    """Return a task with twice and four times the steps."""
    return [
        replace(task, name=f"{task.name}, {times} times", prepare=partial(prepare, times=times)) for times in (2, 4)
    ]


CHEAP = (DIGITS_TASK, CLOTHES_TASK, DOCSTRINGS_TASK)
WORDS_TASK = replace(words.WORDS_TASK, prepare=partial(words.prepare, is_solving=False))
EARLIER = (TWEETS_TASK, REVIEWS_TASK, WORDS_TASK)
LONGER_TASKS = [*longer(CLOTHES_TASK, fashion.prepare), *longer(DOCSTRINGS_TASK, DOCSTRINGS_TASK.prepare)]
BUT_CLOTHES = (DIGITS_TASK, DOCSTRINGS_TASK, *EARLIER)
"""Those whose default adapter is larger than the smallest, which on clothes it is."""
OVERVIEW = (
    *("full fine-tuning", "LoRA 1", "dense 1", "block 1", "LoRA 32", "rsLoRA 32"),
    *("dense, Λ alone 1", "block, Λ alone 1"),
)
"""The contestants of which README says something, with ten seeds."""
OTHERS = tuple(name for name in CURVES if name not in OVERVIEW)
FIRST = ("LoRA 4", "dense 4", "block 4", "dense 32")
"""Those that show the shape of a curve, on tasks that are dear."""
FURTHER = (
    *("LoRA 2", "dense 2", "LoRA 8", "dense 8", "LoRA 16", "dense 16"),
    *("rsLoRA 8", "block 8", "block 32"),
)
"""The sizes between and beyond, on the same."""
LARGER_ALONE = ("dense, Λ alone 4", "block, Λ alone 4")
"""Of Λ alone, what is compared on two tasks only."""
PIECES: dict[str, Piece] = {
    "rule of clothes": of_rule(CLOTHES_TASK, "dense", "block", "dense, s = 2"),
    "rule of sums": of_rule(SUMS_TASK, "dense", "dense, s = 2", "dense, s = 0.5"),
    **{f"rule of {task.name}": of_rule(task, "dense", "block") for task in BUT_CLOTHES},
    **{f"rule of {task.name}": of_rule(task, "dense") for task in LONGER_TASKS},
    **{f"rule of the smallest of {task.name}": of_rule(task, "dense 1", "block 1") for task in BUT_CLOTHES},
    **{f"rule of lambda of {task.name}": of_rule(task, "dense, Λ alone 1") for task in CHEAP},
    **{
        f"main of {task.name}": Piece("main", task, ("frozen", "dense", "block"))
        for task in (DIGITS_TASK, DOCSTRINGS_TASK)
    },
    "curves of digits": Piece("curves", DIGITS_TASK, OTHERS),
    "relatives of digits": Piece("relatives", DIGITS_TASK),
    **{f"curves of {task.name}": Piece("curves", task, OTHERS, screening=2) for task in CHEAP[1:]},
    "relatives of docstrings": Piece("relatives", DOCSTRINGS_TASK, screening=2),
    **{f"lambda of {task.name}": Piece("lambda", task, LARGER_ALONE, screening=2) for task in CHEAP[:2]},
    **{
        f"overview of {task.name}": Piece("curves", task, OVERVIEW, seeds=10, screening=2)
        for task in (*CHEAP, *EARLIER)
    },
    **{f"curves of {task.name}": Piece("curves", task, FIRST, screening=2) for task in EARLIER},
    "placed of word problems": Piece("placed", WORDS_TASK, screening=2),
    **{f"further curves of {task.name}": Piece("curves", task, FURTHER, screening=2) for task in EARLIER},
}
"""In order of worth."""


def losses_of_rule() -> str:
    """Write a table in Markdown: how many points, or .01 of loss, each share loses to the best of all rates kept.

    Rates are times m̃ / √(20 / s), and losses over the seeds of both. The cliff is the lowest above the best that loses
    ten points.
    """
    lines = []
    for piece in (piece for piece in PIECES.values() if piece.group == "rule"):
        kept = [*read_runs(KEPT / f"{piece.task.name.replace(' ', '_')}.jsonl")]
        for name in piece.contestants:
            plain = name.removesuffix(", by the rule")
            own = [run for run in kept if run.key.contestant in (name, plain)]
            if any(run.key.contestant == name for run in own):
                cells = losses_of(piece.task, own, unit_of(piece.task, plain))
                lines.append([f"{piece.task.name}, {plain}", *cells])
    return in_markdown(["", *(f"{share:g}" for share in SHARES), "best", "cliff"], lines)


def losses_of(task: Task, runs: Sequence[Run], unit: float) -> list[str]:
    """Write the losses of each share to the best rate of some runs, that rate and the cliff, in shares of 1."""
    by_rate: dict[float, dict[int, Run]] = {}
    for run in runs:
        by_rate.setdefault(run.key.lr, {})[run.key.seed] = run
    first = best(task, points_of(task, whole(runs))).lr
    lost = {lr / unit: 100 * gain_of(task, by_rate[first], own).mean for lr, own in by_rate.items()}
    cliff = min((rate for rate, loss in lost.items() if rate > first / unit and not loss < 10), default=None)
    near = {share: loss for share in SHARES for rate, loss in lost.items() if abs(rate / share - 1) < 0.01}
    cells = [f"{near[share]:.1f}" if share in near else "" for share in SHARES]
    return [*cells, f"{first / unit:.2f}", "" if cliff is None else f"{cliff:.2f}"]

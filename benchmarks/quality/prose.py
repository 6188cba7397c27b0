"""Numbers in the sentences of pages: a comment after each says what it is of, and a program writes it.

``3.6 (1.9 to 5.3)<!-- dense over LoRA, equal size in clothes -->`` is what the first has beyond the second, each at its
best learning rate, with the interval of `benchmarks.quality.significance`; ``dense at 0.003`` names another rate. More
is better, except for the ``drift of`` two contestants. Without ``over``, it is a mean with its standard error.
"""

import re
from collections.abc import Callable, Sequence

from benchmarks.quality.runs import Run
from benchmarks.quality.significance import Difference, difference, mean_and_error
from benchmarks.quality.summary import at_best
from benchmarks.quality.task import Task

CLAIM = re.compile(
    r"(?P<number>-?[\d.,]+(?:\s+±\s+[\d.,]+|\s+\([-\d.,]+\s+to\s+[-\d.,]+\))?)"
    r"<!--\s+(?P<drift>drift\s+of\s+)?(?P<first>[^>]+?)(?:\s+over\s+(?P<second>[^>]+?))?\s+in\s+(?P<task>[^>]+?)\s+-->"
)
SENTENCES = re.compile(r"\n\n|\n- |(?<=[.:;])\s")
"""What stands between two of them."""
NOT_OURS = ("Larger models, measured by others", "What it rests on", "Tried, and no better")
NO_PROSE = re.compile(rf"^\|.*|^```.*?^```|^## (?:{'|'.join(NOT_OURS)})\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
"""Tables, code, and sections whose runs are of others, in a table that names where they are, or not kept."""
BARE = re.compile(r"\d\s±\s\d|\d\spoints?\b|\d\sof\sloss\b")
"""A measured value or difference."""

RunsOf = Callable[[str], tuple[Task, Sequence[Run]]]
"""Returns a task and all of its runs that are kept, given its name."""


def with_numbers(page: str, runs_of: RunsOf) -> str:
    """Return a page with the numbers of its sentences made anew; what has not changed keeps its line breaks."""

    def made(claim: re.Match[str]) -> str:
        number = written(claim, runs_of)
        is_same = number == " ".join(claim["number"].split())
        return claim[0] if is_same else number + claim[0].removeprefix(claim["number"])

    return CLAIM.sub(made, page)


def problems(page: str, runs_of: RunsOf) -> list[str]:
    """Return the sentences whose numbers nothing is said of, and those that tell apart what cannot be told apart."""
    found = []
    for sentence in SENTENCES.split(NO_PROSE.sub("", page)):
        claims = [*CLAIM.finditer(sentence)]
        intervals = [value for value in (found_by(claim, runs_of) for claim in claims) if isinstance(value, Difference)]
        if BARE.search(CLAIM.sub("", sentence)):
            found.append(f"no comment says what this number is of: {sentence}")
        if not all(value.is_distinguishable for value in intervals) and "distinguish" not in sentence:
            found.append(f"does not say that a difference is not distinguishable from none: {sentence}")
    return found


def written(claim: re.Match[str], runs_of: RunsOf) -> str:
    """Write the number of a claim."""
    task, _ = runs_of(_words(claim["task"]))
    is_metric = not claim["drift"]
    decimals, factor = (task.decimals, 100 if task.in_percent else 1) if is_metric else (3, 1)
    value = found_by(claim, runs_of)
    if isinstance(value, Difference):
        ends = value.mean, value.mean - value.half, value.mean + value.half
        mean, low, high = (f"{factor * end:,.{decimals}f}" for end in ends)
        return f"{mean} ({low} to {high})"
    mean, error = (f"{factor * each:,.{decimals}f}" for each in value)
    return f"{mean} ± {error}"


def found_by(claim: re.Match[str], runs_of: RunsOf) -> Difference | tuple[float, float]:
    """Return what the runs say of a claim: a difference, or a mean and its standard error."""
    task, runs = runs_of(_words(claim["task"]))
    what = "drift" if claim["drift"] else task.metric
    first, *others = (_by_seed(task, runs, _words(name), what) for name in (claim["first"], claim["second"]) if name)
    if not others:
        return mean_and_error([*first.values()])
    is_reversed = what == task.metric and not task.is_better_if_larger
    return difference(others[0], first) if is_reversed else difference(first, others[0])


def _by_seed(task: Task, runs: Sequence[Run], name: str, what: str) -> dict[int, float]:
    """Return a measure of a contestant at its best rate by seed, or at that which follows its name."""
    contestant, _, rate = name.rpartition(" at ")
    is_rate = re.fullmatch(r"[\d.e-]+", rate)
    own = [run for run in runs if run.key.contestant == (contestant if is_rate else name)]
    own = [run for run in own if not is_rate or run.key.lr == float(rate)]
    if not own:
        raise ValueError(f"a sentence names {name} in {task.name}, of which no run is kept")
    return at_best(task, own, own[0].key.contestant, what)


def _words(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())

"""Numbers in the sentences of pages: a comment after each says what it is of, and a program writes it.

``3.6 (1.9 to 5.3)<!--dense over LoRA, equal size in clothes-->`` is what the first has beyond the second, each at its
best learning rate, with the interval of `benchmarks.quality.significance`; ``dense at 0.003`` names another rate. More
is better, except for the ``drift of`` two contestants. ``dense per LoRA`` is a ratio, also of the ``size of`` what they
train or the ``time of`` their runs, and without another contestant it is a mean with its standard error. A comment
without a number names the runs, in one or more tasks, that a sentence is right or wrong by.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean

from benchmarks.quality.runs import Run
from benchmarks.quality.significance import Difference, difference, mean_and_error
from benchmarks.quality.summary import at_best, gain_of
from benchmarks.quality.task import Task

CLAIM = re.compile(
    r"(?P<number>-?[\d.,]*\d(?:\s+±\s+[\d.,]+|\s+\([-\d.,]+\s+to\s+[-\d.,]+\))?)?"
    r"<!--\s*(?:(?P<measure>drift|size|time)\s+of\s+)?(?P<first>[^>]+?)"
    r"(?:\s+(?P<by>over|per)\s+(?P<second>[^>]+?))?\s+in\s+(?P<tasks>[^>]+?)\s*-->"
)
SENTENCES = re.compile(r"\n\n|\n- |(?<=[.:;])\s|\|")
"""What stands between two of them, or between two cells of a table."""
NOT_OURS = ("Larger models, measured by others", "What it rests on", "Tried, and no better")
NO_PROSE = re.compile(
    rf"^<!-- [^>]* -->\n\n(?:\|[^\n]*\n)+|^```.*?^```|^## (?:{'|'.join(NOT_OURS)})\n.*?(?=^## |\Z)", re.M | re.S
)
"""Tables of runs, code, and sections whose runs are of others, in a table that names where they are, or not kept."""
BARE = re.compile(r"\d\s±\s\d|\d\s(?:points?|times|percent|%)(?!\w)|\.\d\sbits|\d\sof\s(?:accuracy|loss)\b")
"""A measured value, difference or ratio."""
JUDGED = re.compile(
    r"(?=.*(?:LoRA|fine-tuning|KRAdapter|`dense`|`block`)).*\b(?:better|worse|beats?|ruins?|level)\b", re.S
)
"""A comparison of methods in words."""
BY_OTHERS = "<!--by others-->"
"""What says that the numbers of a sentence are not of our runs."""

RunsOf = Callable[[str], tuple[Task, Sequence[Run]]]
"""Returns a task and all of its runs that are kept, given its name."""


def with_numbers(page: str, runs_of: RunsOf) -> str:
    """Return a page with the numbers of its sentences made anew; what has not changed keeps its line breaks."""

    def made(claim: re.Match[str]) -> str:
        number, old = written(claim, runs_of), claim["number"] or ""
        return claim[0] if number == _words(old) else number + claim[0].removeprefix(old)

    return CLAIM.sub(made, page)


def problems(page: str, runs_of: RunsOf) -> list[str]:
    """Return the sentences whose numbers nothing is said of, and those that tell apart what cannot be told apart."""
    found = []
    for sentence in SENTENCES.split(NO_PROSE.sub("", page)):
        claims = [*CLAIM.finditer(sentence)]
        gains = [(claim["by"], interval) for claim in claims for interval in _intervals(claim, runs_of)]
        is_level = [not interval.is_distinguishable for _, interval in gains]
        if BARE.search(CLAIM.sub("", sentence)) and BY_OTHERS not in sentence:
            found.append(f"no comment says what this number is of: {sentence}")
        if not claims and JUDGED.match(sentence) and BY_OTHERS not in sentence:
            found.append(f"no comment says by what methods are compared: {sentence}")
        if "distinguish" not in sentence and any(is_level):
            found.append(f"does not say that a difference is not distinguishable from none: {sentence}")
        if "distinguish" in sentence and not (is_level and all(is_level)):
            found.append(f"no comment says what cannot be distinguished: {sentence}")
        if any(by == "over" and gain.is_distinguishable and gain.mean < 0 for by, gain in gains):
            found.append(f"a comment names the worse one first: {sentence}")
    return found


def written(claim: re.Match[str], runs_of: RunsOf) -> str:
    """Write the number of a claim, or nothing where it has none."""
    if claim["number"] is None:
        return ""
    ((task, first, second),) = _compared(claim, runs_of)
    if claim["by"] == "per":
        own, other = (
            mean(_measured(run, claim["measure"] or task.metric) for run in runs.values()) for runs in (first, second)
        )
        return f"{own / other:.2g}"
    decimals, factor = (3, 1) if claim["measure"] else (task.decimals, 100 if task.in_percent else 1)
    if claim["by"]:
        (interval,) = _intervals(claim, runs_of)
        values = [interval.mean, interval.mean - interval.half, interval.mean + interval.half]
    else:
        values = [*mean_and_error([_measured(run, claim["measure"] or task.metric) for run in first.values()])]
    number, *others = (f"{factor * value:,.{decimals}f}" for value in values)
    return f"{number} ({' to '.join(others)})" if claim["by"] else f"{number} ± {others[0]}"


def _intervals(claim: re.Match[str], runs_of: RunsOf) -> Iterator[Difference]:
    """Go through the differences of two contestants that a claim names, but for what no chance is in."""
    if claim["by"] and claim["measure"] in (None, "drift"):
        for task, first, second in _compared(claim, runs_of):
            drifts = ({seed: run.found["drift"] for seed, run in runs.items()} for runs in (first, second))
            yield difference(*drifts) if claim["measure"] else gain_of(task, first, second)


def _compared(claim: re.Match[str], runs_of: RunsOf) -> Iterator[tuple[Task, Mapping[int, Run], Mapping[int, Run]]]:
    """Go through the tasks of a claim, with the runs of its contestants by seed; the second may be none."""
    for name in _words(claim["tasks"]).split(", "):
        task, runs = runs_of(name)
        first, second = (_runs_of(task, runs, _words(claim[which] or "")) for which in ("first", "second"))
        yield task, first, second


def _measured(run: Run, what: str) -> float:
    """Return a measure of a run."""
    return {"size": float(run.trained), "time": run.seconds}.get(what, run.found.get(what, math.nan))


def _runs_of(task: Task, runs: Sequence[Run], name: str) -> Mapping[int, Run]:
    """Return the runs of a contestant by seed, at its best rate or at that which follows its name."""
    if not name:
        return {}
    contestant, _, rate = name.rpartition(" at ")
    is_rate = re.fullmatch(r"[\d.e-]+", rate)
    own = [run for run in runs if run.key.contestant == (contestant if is_rate else name)]
    own = [run for run in own if not is_rate or run.key.lr == float(rate)]
    if not own:
        raise ValueError(f"a sentence names {name} in {task.name}, of which no run is kept")
    return at_best(task, own, own[0].key.contestant)


def _words(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())

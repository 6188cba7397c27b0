"""Write tables and the figures of kept runs into the documentation: ``python -m benchmarks.quality.pages``.

A page says where a table goes: ``<!-- rates of group of task -->`` for one with each learning rate of a task, and
``<!-- overview of group of task, task -->``, ``best rates``, ``differences`` or ``smallest`` for one with the best of
each task; ``<!-- losses of rule of six tasks -->`` has the rule of the learning rate. What follows such a line is made
of the runs that are kept, and a test compares both; `benchmarks.quality.prose` has the numbers between.
"""

import re
from functools import cache
from pathlib import Path

from benchmarks.quality import prose, summary
from benchmarks.quality.__main__ import TASKS, file_stem
from benchmarks.quality.contestants import GROUPS
from benchmarks.quality.pieces import losses_of_rule
from benchmarks.quality.runs import KEPT, Run, read_runs
from benchmarks.quality.spectrum import WIDTH_TASKS
from benchmarks.quality.task import Task

DOCS = Path("docs")
PAGES = [
    Path("README.md"),
    *(DOCS / f"{name}.md" for name in ("index", "choosing", "learning_rate", "results", "results_runs")),
]
SIX = ("digits", "clothes", "docstrings", "tweets", "film reviews", "word problems")
SETS = {"six tasks": SIX}
"""What a table may name instead of its tasks."""
ROWS = {
    "full fine-tuning": "full fine-tuning",
    "LoRA 32": "LoRA, r = 32",
    "rsLoRA 32": "rsLoRA, r = 32",
    "LoRA 1": "LoRA, r = 1",
    "dense 1": "`dense`, of its size",
    "block 1": "`block`, of its size",
    "dense, Λ alone 1": "`dense`, Λ alone",
    "block, Λ alone 1": "`block`, Λ alone",
}
"""The contestants in overviews of the six tasks, and what they are called there."""
FIGURES = DOCS / "figures"
LEFT_OUT = {
    "sizes": ("dense, decay 0.1", "dense, at most 2% of a weight", "dense, penalty 10"),
    "bases": ("block (2, 2)", "from the weight, one A", "from the weight", "sparse"),
    "curves": ("rsLoRA 1", "rsLoRA 2"),
    "scales": ("dense, r = 8", "dense, r = 8, s = 6.53"),
    "widths": ("LoRA", "dense, s = 6.53", "dense, r = 8", "dense, Γ at 32/m", "dense, Γ at 128/m", "dense, Γ at 512/m"),
}
"""Contestants of a group that are not shown, because others are like them, or no option makes them."""
FULL = "full fine-tuning"
RANDLORA = "dense", "block", "dense, Λ alone", "block, Λ alone"
METHODS = {"LoRA": "LoRA", "rsLoRA": "rsLoRA"} | {name: f"RandLoRA, {name}" for name in RANDLORA}
"""The methods of which the curves have sizes, ours and all."""
WHOLE = {name: label for name, label in METHODS.items() if "alone" not in name}
"""Those that have all sizes."""
PAIRS = {
    **{f"{ROWS[f'{own} 1']} over LoRA, r = 1": (f"{own} 1", "LoRA 1") for own in ("dense", "block", "dense, Λ alone")},
    "`dense`, as large as LoRA, r = 32, over it": ("dense 32", "LoRA 32"),
    "`dense`, as large as LoRA, r = 1, over rsLoRA, r = 32": ("dense 1", "rsLoRA 32"),
    "`dense`, as large as LoRA, r = 1, over full fine-tuning": ("dense 1", "full fine-tuning"),
}
"""Pairs of contestants that are compared, by what their row is called."""
PLACE = re.compile(r"<!-- (?P<kind>[a-z ]+?) of (?P<group>\w+) of (?P<tasks>[\w, ]+) -->\n(?:\n(?:\|.*\n)+)?")
KNOWN: dict[str, Task] = TASKS | {task.name: task for task in WIDTH_TASKS}


def tasks_of(place: re.Match[str]) -> list[Task]:
    """Return the tasks of a table."""
    named = place["tasks"]
    return [KNOWN[name] for name in SETS.get(named, named.split(", "))]


def kept_runs(task: Task, group: str) -> list[Run]:
    """Return the runs of a group that are kept, in the order of its contestants."""
    contestants = list(GROUPS[group])
    chosen = [run for run in whole_runs(task) if run.key.contestant in contestants]
    return sorted(chosen, key=lambda run: contestants.index(run.key.contestant))


def whole_runs(task: Task) -> list[Run]:
    """Return the runs that are kept, but none at a learning rate tried on fewer seeds than rates are chosen on."""
    return summary.whole([*read_runs(KEPT / f"{file_stem(task.name)}.jsonl")])


@cache
def runs_of(name: str) -> tuple[Task, list[Run]]:
    """Return a task and its whole runs, for the numbers in sentences."""
    return KNOWN[name], whole_runs(KNOWN[name])


def filled(page: str) -> str:
    """Return a page with all of its tables and numbers made anew."""

    def table(place: re.Match[str]) -> str:
        hidden = LEFT_OUT.get(place["group"], ())
        whole = [(task, kept_runs(task, place["group"])) for task in tasks_of(place)]
        tasks = [(task, [run for run in runs if run.key.contestant not in hidden]) for task, runs in whole]
        names = dict.fromkeys(run.key.contestant for _, runs in tasks for run in runs)
        rows = ROWS if place["tasks"] in SETS else {name: name for name in names}
        made = {
            "rates": lambda: summary.rates_of(*tasks[0]),
            "best rates": lambda: summary.best_rates(tasks),
            "overview": lambda: summary.overview(tasks, rows),
            "differences": lambda: summary.differences(tasks, PAIRS),
            "smallest": lambda: summary.smallest(whole, WHOLE, FULL),
            "losses": losses_of_rule,
        }
        return f"{place[0].splitlines()[0]}\n\n{made[place['kind']]()}"

    return prose.with_numbers(PLACE.sub(table, page), runs_of)


if __name__ == "__main__":
    from benchmarks.quality import figures  # matplotlib, which takes a second

    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    curves = [(TASKS[name], kept_runs(TASKS[name], "curves")) for name in SIX]
    figures.draw_sizes(curves, METHODS, FULL, FIGURES / "curves.svg")

"""Accuracy against drift: contestants are trained, and tables, figures and rates are those of the runs kept."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import nn

from benchmarks.quality import __main__ as command
from benchmarks.quality import pages, spectrum, summary
from benchmarks.quality.contestants import GROUPS, MAIN
from benchmarks.quality.runs import Key, Run
from benchmarks.quality.task import Prepared, Size, Targets, Task
from benchmarks.quality.training import make_run
from randlora.targets.options import first_learning_rate

STEPS = 20


def prepare(seed: int, size: Size) -> Prepared:
    """Make a task of a second: rotate vectors."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    names = ["0"]
    return Prepared(
        model,
        model[2],
        Targets(names, names, names, dict.fromkeys(("q and v", "q", "v", "MLP"), "0")),
        [torch.arange(64)] * (STEPS if size == "full" else 2),
        lambda rows: F.mse_loss(model(x[rows]), y[rows]),
        lambda: {"loss": float(F.mse_loss(model(x), y)), "drift": float(model[0](x).square().mean())},
    )


TASK = Task(
    "tiny",
    metric="loss",
    is_better_if_larger=False,
    drift="none",
    rates={
        "frozen": (0.0,),
        "full": (1e-3, 1e-2),
        "adapter": (1e-3, 1e-2, 3e-2),
        "small adapter": (1e-2, 3e-2),
    },
    head_rate=1e-2,
    prepare=prepare,
)


def run(contestant: str, lr: float, seed: int, loss: float, drift: float) -> Run:
    seconds = 3.0 if contestant == "full" else 1.0
    found = {"loss": loss, "drift": drift}
    return Run(Key("tiny", contestant, lr, seed), found, None, seconds, 10**9, 1234, 2_500_000, {})


RUNS = [
    run("full", 1e-3, 0, 0.50, 0.1),
    run("full", 1e-3, 1, 0.70, 0.3),
    run("full", 1e-2, 0, 0.40, 0.9),
    run("full", 1e-2, 1, 0.40, 0.7),
    run("LoRA", 1e-3, 0, 0.55, 0.1),
    run("LoRA", 1e-3, 1, 0.75, 0.1),
]


# Making runs


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if group is MAIN else pytest.mark.slow)
        for group in GROUPS.values()
        for name in group
    ],
)
def test_every_contestant_is_trained_and_nothing_else(name: str) -> None:
    contestant = next(group[name] for group in GROUPS.values() if name in group)
    first = make_run(TASK, name, contestant, 1e-2, 0, "full")
    assert make_run(TASK, name, contestant, 1e-2, 0, "full").found == first.found
    with torch.no_grad():
        before = prepare(0, "full").measure()
    assert first.found["loss"] < before["loss"]  # the head at least has learned
    moved = first.found["drift"] != before["drift"]
    assert moved == (name != "frozen") == (first.trained > 0) == (first.file_bytes > 0)


def test_the_command_runs_and_skips_a_task_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(_seed: int, _size: Size) -> Prepared:
        raise FileNotFoundError("there is no such data")

    monkeypatch.setattr(command, "TASKS", {"tiny": TASK, "absent": replace(TASK, name="absent", prepare=nowhere)})
    monkeypatch.setattr(command, "BUILD", tmp_path)
    command.main(contestant="frozen|dense")
    assert "skipped absent: there is no such data" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"tiny.jsonl", "main_tiny.md", "main.svg"}
    with pytest.raises(typer.Exit):
        command.main(task="absent")


WIDTHS = {"film reviews": 384, "tweets": 384, "clothes": 96, "word problems": 576}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_rate_to_try_first_is_near_the_best_of_each_task(name: str) -> None:
    task = command.TASKS[name]
    points = summary.points_of(task, pages.kept_runs(task, "main"))
    best = summary.best(task, [point for point in points if point.contestant == "dense"]).lr
    assert 0.5 <= first_learning_rate(20.0, WIDTHS[name]) / best <= 2


# Tables and figures


def test_a_table_has_each_contestant_at_its_best_rate_with_standard_errors() -> None:
    titles, _, *lines = summary.table_of(TASK, RUNS).splitlines()
    assert titles == (
        "| method | loss | drift | gain over LoRA | best rate | parameters | time | file, MB | memory, MB |"
    )
    assert lines == [
        "| full | 0.400 ± 0.000 | 0.800 ± 0.100 | 0.250 ± 0.100 | 0.01 | 1,234 | 1.00 | 2.50 | 1000 |",
        "| LoRA | 0.650 ± 0.100 | 0.100 ± 0.000 | 0.000 ± 0.000 | 0.001 | 1,234 | 0.33 | 2.50 | 1000 |",
    ]
    moved = [
        replace(each, machine={"processor": "another"}) if each.key.contestant == "LoRA" else each for each in RUNS
    ]
    full, lora = summary.table_of(TASK, moved).splitlines()[2:]
    assert (full.split(" | ")[6], lora.split(" | ")[6]) == ("1.00", ""), "times of two processors are compared"


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_the_tables_of_a_page_are_those_of_the_kept_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(pages.PLACE.findall(text)) == text.count("<!--") > 0
    assert pages.filled(text) == text
    assert pages.filled(text.replace("| dense |", "| denser |", 1)) == text


def curves_of(page: Path) -> Iterator[tuple[Task, dict[str, list[summary.Point]]]]:
    """Yield the task of each table of a page, and the points of each row."""
    tasks = {**command.TASKS, **{task.name: task for task in spectrum.WIDTH_TASKS}}
    for place in pages.PLACE.finditer(page.read_text(encoding="utf-8")):
        for name in pages.REAL if place["task"] == "all tasks" else (place["task"],):
            points = summary.points_of(tasks[name], pages.kept_runs(tasks[name], place["group"]))
            yield tasks[name], summary.by_contestant(points)


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_every_best_rate_of_a_page_is_inside_of_its_sweep_and_of_several_rates_and_five_seeds(page: Path) -> None:
    for task, curves in curves_of(page):
        beyond = {contestant: summary.rate_beyond(task, points) for contestant, points in curves.items()}
        assert not any(beyond.values()), (task.name, beyond)
        for contestant, own in curves.items() if task.name in command.TASKS else ():
            assert {point.seeds for point in own} == {5}, (task.name, contestant)
            assert len(own) >= (1 if contestant == "frozen" else 3), (task.name, contestant)

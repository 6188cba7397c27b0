"""Accuracy against drift: contestants are trained, and tables, figures and rates are those of the runs kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.quality import __main__ as command
from benchmarks.quality import pages, spectrum, summary
from benchmarks.quality.contestants import MAIN
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


@pytest.mark.parametrize("name", ["frozen", "full", "LoRA", "dense"])
def test_a_contestant_is_trained_and_nothing_else(name: str) -> None:
    first = make_run(TASK, name, MAIN[name], 1e-2, 0, "full")
    assert make_run(TASK, name, MAIN[name], 1e-2, 0, "full").found == first.found
    with torch.no_grad():
        before = prepare(0, "full").measure()
    assert first.found["loss"] < before["loss"]  # the head at least has learned
    moved = first.found["drift"] != before["drift"]
    assert moved == (name != "frozen") == (first.trained > 0) == (first.file_bytes > 0)


WIDTHS = {"film reviews": 384, "tweets": 384, "clothes": 96, "word problems": 576}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_rate_to_try_first_is_near_the_best_of_each_task(name: str) -> None:
    task = command.TASKS[name]
    points = summary.points_of(task, pages.kept_runs(task, "main"))
    best = summary.best(task, [point for point in points if point.contestant == "dense"]).lr
    assert 0.5 <= first_learning_rate(20.0, WIDTHS[name]) / best <= 2


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

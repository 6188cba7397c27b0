"""The pages of quality and of scale: tables and rates are those of the runs kept, and what the formulas give."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import randlora
from benchmarks import scale
from benchmarks.quality import __main__ as command
from benchmarks.quality import pages, spectrum, summary
from benchmarks.quality.contestants import MAIN
from benchmarks.quality.task import Family, Prepared, Size, Targets, Task
from benchmarks.quality.training import make_run
from randlora.targets.options import first_learning_rate
from tests.further import further

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


RATES: dict[Family, tuple[float, ...]] = {
    "frozen": (0.0,),
    "full": (1e-3, 1e-2),
    "adapter": (1e-3, 1e-2, 3e-2),
    "small adapter": (1e-2, 3e-2),
}
TASK = Task("tiny", "loss", is_better_if_larger=False, drift="none", rates=RATES, head_rate=1e-2, prepare=prepare)


@pytest.mark.parametrize("name", ["frozen", "full", "LoRA", "dense"])
def test_a_contestant_is_trained_and_nothing_else(name: str) -> None:
    first = make_run(TASK, name, MAIN[name], 1e-2, 0, "full")
    assert make_run(TASK, name, MAIN[name], 1e-2, 0, "full").found == first.found
    with torch.no_grad():
        before = prepare(0, "full").measure()
    assert first.found["loss"] < before["loss"]  # the head at least has learned
    moved = first.found["drift"] != before["drift"]
    assert moved == (name != "frozen") == (first.trained > 0) == (first.file_bytes > 0)


@pytest.mark.parametrize(
    ("name", "width"), [("film reviews", 384), ("tweets", 384), ("clothes", 96), ("word problems", 576)]
)
def test_the_rate_to_try_first_is_near_the_best_of_each_task(name: str, width: int) -> None:
    task = command.TASKS[name]
    points = summary.points_of(task, pages.kept_runs(task, "main"))
    best = summary.best(task, [point for point in points if point.contestant == "dense"]).lr
    assert 0.5 <= first_learning_rate(20.0, width) / best <= 2


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


def lines(table: str) -> list[str]:
    """Return the rows of a table of docs/scale.md."""
    found = re.search(rf"<!-- {table} -->\n(.*?)<!-- end -->", scale.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].splitlines()


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 8B", *map(further, ("Mixtral-8x7B, experts too", "Qwen3-235B-A22B"))])
def test_the_rows_of_a_model_are_what_the_formulas_give(name: str) -> None:
    assert scale.sizes_row(name, scale.MODELS[name]) in lines("sizes")
    assert scale.totals_row(name, scale.MODELS[name]) in lines("totals")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 405B, 64 devices, fsdp2", "Llama-3 70B, 8 devices, tp"])
def test_the_parts_of_a_sum_are_what_the_formulas_give(name: str) -> None:
    assert scale.parts_row(name) in lines("parts")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 8B", *map(further, list(scale.MODELS)[1:])])
def test_no_model_is_given_a_learning_rate_that_ruins_one_of_its_size(name: str) -> None:
    shape = scale.MODELS[name]
    model = shape.build()
    rate = randlora.plan(model, scale.R, targets=scale.targets_of(shape, model)).learning_rate
    assert rate is not None
    assert 2e-5 < rate <= 3e-4


@pytest.mark.parametrize(
    ("table", "names"), [("sizes", scale.MODELS), ("totals", scale.MODELS), ("parts", scale.PARTS)]
)
def test_every_model_has_its_row(table: str, names: dict[str, object]) -> None:
    head, _, *rows = lines(table)
    assert head == f"| {' | '.join(scale.HEADS[table])} |"
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(names)

"""The machinery of the benchmarks: taking turns, ratios, targets, and counting what is kept. Nothing is timed."""

import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks import step
from benchmarks.memory import kept_by
from benchmarks.results import Results, Row
from benchmarks.targets import TARGETS, Target, faster, verdicts, within
from benchmarks.timing import Figure, interleaved


def row(case: str, sweep: tuple[str, float] | None = None, **seconds: float) -> Row:
    return Row(case, {name: Figure(value, 2 * value, "s") for name, value in seconds.items()}, sweep)


def test_contestants_are_called_in_turn_and_the_first_round_does_not_count() -> None:
    called: list[str] = []
    figures = interleaved(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, device="cpu", repeats=2, calls=2
    )
    assert called == list("aabb" * 3)
    assert set(figures) == {"a", "b"}
    assert all(0 <= figure.best <= figure.median for figure in figures.values())


@pytest.mark.parametrize(
    ("target", "is_met"),
    [
        (faster("b", "case", "dense", 2.0), True),
        (faster("b", "case", "dense", 2.1), False),
        (within("b", "case", "dense", 1.5), True),
        (within("b", "case", "dense", 1.4), False),
        (within("b", "another case", "dense", 1.5), False),
    ],
)
def test_a_target_is_met_or_missed_by_the_ratio_of_the_best(target: Target, is_met: bool) -> None:
    results = Results("b", {}, [row("case", PEFT=6.0, dense=3.0, full=2.0)])
    assert [verdict.is_met for verdict in verdicts(results, [target])] == [is_met]


def test_targets_of_other_benchmarks_are_not_judged() -> None:
    assert verdicts(Results("b", {}, []), [faster("other", "case", "dense", 2.0)]) == []


def test_every_target_of_single_layers_has_its_case() -> None:
    cases = {step.name_of(case) for case in step.GATED}
    assert {target.case for target in TARGETS if target.benchmark == "step"} == cases


def test_results_are_written_as_json_a_table_and_a_picture(tmp_path: Path) -> None:
    rows = [row(f"T = {tokens}", ("tokens", tokens), PEFT=6.0, dense=3.0, full=2.0) for tokens in (1, 10)]
    Results("b", {"processor": "some"}, rows).save(tmp_path)
    content = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert content["machine"] == {"processor": "some"}
    assert content["rows"][0]["figures"]["PEFT"] == {"best": 6.0, "median": 12.0, "unit": "s"}
    lines = (tmp_path / "b.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| case | PEFT / full | dense / full | PEFT / dense (median) |"
    assert lines[2] == "| T = 1 | 3.00 | 1.50 | 2.00 (2.00) |"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_layer_that_is_trained_keeps_its_input_and_a_frozen_one_nothing(tokens: int) -> None:
    layer = nn.Sequential(nn.Linear(1024, 8))
    assert kept_by(layer, tokens) == tokens * 1024 * 4
    assert kept_by(layer.requires_grad_(requires_grad=False), tokens) == 0

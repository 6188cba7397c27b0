"""The machinery of the benchmarks: taking turns, ratios, targets, and counting what is kept. Nothing is timed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import command, layers, memory, step
from benchmarks.results import Results, Row, written
from benchmarks.targets import TARGETS, Target, faster, verdicts, within
from benchmarks.timing import Figure, interleaved


def row(case: str, sweep: tuple[str, float] | None = None, **seconds: float) -> Row:
    return Row(case, {name: Figure(value, 2 * value, "s") for name, value in seconds.items()}, sweep)


def test_contestants_are_called_in_turn_and_the_first_round_does_not_count() -> None:
    called: list[str] = []
    figures = interleaved(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, device="cpu", repeats=2, calls=2
    )
    assert called == list("bbaa" + "aabb" + "bbaa")
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
        (within("b", "case", "block", 1.5), False),
        (faster("b", "case", "dense", 0.1, than="nobody"), False),
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


@pytest.mark.parametrize(
    ("adapt", "is_wide"),
    [
        (layers.CONTESTANTS["PEFT"], True),
        (layers.AUTOCAST_CONTESTANTS["PEFT, autocast"], False),
        (layers.CONTESTANTS["dense"], False),
    ],
)
def test_peft_multiplies_by_float32_matrices_unless_under_autocast(adapt: layers.Adapt, is_wide: bool) -> None:
    layer = layers.build(adapt, 64, 64, torch.bfloat16, "cpu")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: torch.empty(0)):
        output = layer(torch.randn(2, 64, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert any(tensor.dtype == torch.float32 and tensor.numel() == 64 * 64 for tensor in saved) == is_wide


@pytest.mark.parametrize("case", step.GATED, ids=step.name_of)
def test_the_quick_steps_are_of_those_with_targets_and_of_full_fine_tuning(case: step.Case) -> None:
    names = set(step.with_targets(case))
    assert "full" in names
    assert names - {"full"} < {"PEFT", "PEFT, autocast", "dense", "dense, kept", "block"}
    targets = [target for target in TARGETS if (target.benchmark, target.case) == ("step", step.name_of(case))]
    assert {name for target in targets for name in (target.first, target.second)} <= names


def test_every_target_is_of_a_benchmark_and_has_one_bound() -> None:
    assert {target.benchmark for target in TARGETS} == {
        *("step", "model", "memory", "quantized", "startup", "decode", "merge")
    }
    assert all((target.at_least > 0) != (target.at_most < float("inf")) for target in TARGETS)


@pytest.mark.parametrize(
    ("size", "unit", "words"),
    [
        (2.62, "s", "2.62 s"),
        (0.0121, "s", "12.1 ms"),
        (8.5e-5, "s", "0.085 ms"),
        (1.853e11, "B", "185 GB"),
        (3.5e8, "B", "350 MB"),
        (4096, "B", "4.1 kB"),
        (0, "B", "0 kB"),
        (87.25, "%", "87.2 %"),
    ],
)
def test_a_figure_is_written_as_a_short_number(size: float, unit: str, words: str) -> None:
    assert written(Figure(size, size, unit)) == words


def test_without_the_baseline_figures_stand_for_themselves_and_each_of_ours_beside_the_peer() -> None:
    titles, rows = Results("b", {}, [row("case", frozen=0.5, PEFT=6.0, merged=0.5), row("other", frozen=1.0)]).cells()
    assert titles == ["case", "frozen", "PEFT", "merged", "PEFT / merged (median)"]
    assert rows == [["case", "500 ms", "6 s", "500 ms", "12.00 (12.00)"], ["other", "1 s", "", "", ""]]


@pytest.mark.parametrize(("times", "is_met"), [(1.0, True), (4.0, False), (None, True)])
def test_the_gate_is_shut_by_a_missed_target_alone(
    times: float | None,
    is_met: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    targets = [] if times is None else [faster("b", "case", "dense", times)]
    monkeypatch.setattr(command, "verdicts", lambda results: verdicts(results, targets))

    def run(_: command.Settings) -> list[Row]:
        return [row("case", PEFT=6.0, dense=3.0, full=2.0)]

    settings = command.Settings("cpu", is_quick=True, out=tmp_path)
    assert command.measure("b", run, settings, gate=True) == is_met
    assert command.measure("b", run, settings, gate=False)
    assert ("b has no targets" in capsys.readouterr().out) == (times is None)


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
    assert memory.kept_by(layer, tokens) == tokens * 1024 * 4
    assert memory.kept_by(layer.requires_grad_(requires_grad=False), tokens) == 0


@pytest.mark.parametrize(("tokens", "sums_kept"), [(1, 0), (2048, 1)])
def test_ours_keep_the_input_and_on_request_a_sum_that_pays(tokens: int, sums_kept: int) -> None:
    floats = {name: figure.best / memory.FLOAT for name, figure in memory.kept(tokens, "cpu").figures.items()}
    of_input, of_weight = tokens * memory.SIDE, memory.SIDE**2
    assert {floats[name] for name in ("full", "dense", "block", "very_sparse", "PEFT less m² floats")} == {of_input}
    assert floats["PEFT"] == of_input + of_weight
    assert floats["dense, kept"] == of_input + sums_kept * of_weight

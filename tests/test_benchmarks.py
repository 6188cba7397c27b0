"""The machinery of the benchmarks: taking turns, ratios, targets, and counting what is kept. Nothing is timed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch import nn

from benchmarks import command, layers, machine, memory, step
from benchmarks.results import Results, Row, written
from benchmarks.targets import TARGETS, Target, faster, only_in_full, only_on, passed_over, verdicts, within
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


@pytest.mark.parametrize(("device", "gated"), [("cpu", step.GATED), ("cuda", step.GATED_ON_A_GPU)])
def test_every_target_of_single_layers_has_its_case(device: str, gated: tuple[step.Case, ...]) -> None:
    cases = {step.name_of(case) for case in gated}
    assert {t.case for t in TARGETS if t.benchmark == "step" and device in t.devices} == cases


@pytest.mark.parametrize(
    ("device", "is_quick", "judged", "left"),
    [
        ("cpu", True, ["both", "cpu"], ["1 targets of another device than cpu", "1 targets of --full"]),
        ("cpu", False, ["both", "cpu", "full"], ["1 targets of another device than cpu"]),
        ("cuda", True, ["both", "cuda"], ["1 targets of another device than cuda", "1 targets of --full"]),
    ],
)
def test_a_target_is_asked_of_its_devices_and_its_set_alone(
    device: str, is_quick: bool, judged: list[str], left: list[str]
) -> None:
    both, cpu, cuda, full = (within("b", case, "dense", 1.0) for case in ("both", "cpu", "cuda", "full"))
    targets = (both, *only_on(("cpu",), cpu), *only_on(("cuda",), cuda), *only_in_full(full))
    results = Results("b", {}, [], device, is_quick)
    assert [verdict.words for verdict in verdicts(results, targets)] == [f"b, {case}: was not run" for case in judged]
    assert passed_over(results, targets) == left
    assert passed_over(Results("other", {}, [], device, is_quick), targets) == []


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


@pytest.mark.parametrize("case", [*step.GATED, *step.GATED_ON_A_GPU], ids=step.name_of)
def test_the_quick_steps_are_of_those_with_targets_and_of_full_fine_tuning(case: step.Case) -> None:
    names = set(step.with_targets(case))
    assert "full" in names
    assert names - {"full"} < {"LoRA", "LoRA, autocast", "PEFT", "PEFT, autocast", "dense", "block"}
    targets = [target for target in TARGETS if (target.benchmark, target.case) == ("step", step.name_of(case))]
    assert {name for target in targets for name in (target.first, target.second)} <= names


def test_every_target_is_of_a_benchmark_and_has_one_bound() -> None:
    assert {target.benchmark for target in TARGETS} == {
        *("laws", "peft_faults", "step", "overhead", "model", "memory", "quantized", "experts"),
        *("startup", "decode", "routed", "pool", "server", "merge", "compiled"),
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
        (12, "operators", "12"),
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


@pytest.mark.parametrize(("device", "runs"), [("cpu", 2), ("cuda", 1)])
def test_a_target_missed_on_a_cpu_is_measured_once_more_and_the_second_run_counts_alone(
    device: str, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "verdicts", lambda results: verdicts(results, [faster("b", "case", "dense", 1.9)]))
    monkeypatch.setattr(command, "describe", lambda device: {"device": device})
    found = [row("case", PEFT=6.0, dense=4.0), row("case", PEFT=8.0, dense=4.0), row("case", PEFT=9.0, dense=1.0)]
    left = iter(found)
    settings = command.Settings(device, is_quick=True, out=tmp_path)
    assert command.measure("b", lambda _: [next(left)], settings, gate=True) == (runs == 2)
    assert len(list(left)) == len(found) - runs
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["run"] == runs
    assert {name: figure["best"] for name, figure in saved["rows"][0]["figures"].items()} == (
        {"PEFT": 8.0, "dense": 4.0} if runs == 2 else {"PEFT": 6.0, "dense": 4.0}
    )


def test_a_benchmark_that_fails_shuts_the_gate_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def named(name: str) -> tuple[str, command.Run]:
        def run(_: command.Settings) -> list[Row]:
            called.append(name)
            if name == "bad":
                raise ZeroDivisionError("of no use")
            return [row("case", PEFT=6.0, dense=3.0)]

        return name, run

    def met(*names: str) -> bool:
        called.clear()
        settings = command.Settings("cpu", is_quick=True, out=tmp_path)
        return command.measure_all([named(name) for name in names], settings, {"gpu": "cuda"}, gate=False)

    assert met("good", "gpu", "other")
    assert called == ["good", "other"]
    assert "skipped gpu, which is for cuda alone" in capsys.readouterr().out
    assert not met("bad", "other")
    assert called == ["bad", "other"]
    assert "raised an error: bad" in (printed := capsys.readouterr().out)
    assert "ZeroDivisionError: of no use" in printed
    monkeypatch.setitem(command.LONGEST, "cpu", 0.0)
    assert not met("good")
    assert not called
    assert "had no time left: good" in capsys.readouterr().out


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_gpu_that_is_not_there_is_said_before_anything_is_measured(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    if has_gpu:
        assert command.settings_of("cuda", full=False, out=Path("out")).out == Path("out/cuda")
    else:
        with pytest.raises(typer.BadParameter, match=r"no CUDA device, so nothing was measured"):
            command.settings_of("cuda", full=False, out=Path("out"))


def test_results_of_a_gpu_name_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    facts = machine.describe("cuda")
    assert (facts["GPU"], facts["GPU memory"], facts["compute capability"]) == ("Some Card", "80 GiB", "9.0")
    assert "GPU" not in machine.describe("cpu")


def test_results_are_written_as_json_a_table_and_a_picture(tmp_path: Path) -> None:
    rows = [row(f"T = {tokens}", ("tokens", tokens), PEFT=6.0, dense=3.0, full=2.0) for tokens in (1, 10)]
    Results("b", {"processor": "some"}, rows).save(tmp_path, ["met    b"])
    content = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert content["machine"] == {"processor": "some"}
    assert content["verdicts"] == ["met    b"]
    assert content["rows"][0]["figures"]["PEFT"] == {"best": 6.0, "median": 12.0, "unit": "s"}
    lines = (tmp_path / "b.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| case | PEFT / full | dense / full | PEFT / dense (median) |"
    assert lines[2] == "| T = 1 | 3.00 | 1.50 | 2.00 (2.00) |"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_layer_that_is_trained_keeps_its_input_and_a_frozen_one_nothing(tokens: int) -> None:
    layer = nn.Sequential(nn.Linear(1024, 8))
    assert memory.kept_by_layer(layer, tokens) == tokens * 1024 * 4
    assert memory.kept_by_layer(layer.requires_grad_(requires_grad=False), tokens) == 0


@pytest.mark.parametrize("tokens", [1, 2048])
def test_ours_keep_the_input_and_nothing_else(tokens: int) -> None:
    floats = {name: figure.best / memory.FLOAT for name, figure in memory.kept(tokens, "cpu").figures.items()}
    of_input, of_weight = tokens * memory.SIDE, memory.SIDE**2
    assert {floats[name] for name in ("full", "dense", "block", "very_sparse", "PEFT less m² floats")} == {of_input}
    assert floats["PEFT"] == of_input + of_weight

"""The gate of the benchmarks, and the pages of quality and scale; not what `make bench` itself would fail for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import randlora
from benchmarks import command, laws, scale
from benchmarks.quality import __main__ as quality
from benchmarks.quality import pages, summary
from benchmarks.results import Results, Row
from benchmarks.targets import TARGETS, faster, only_in_full, only_on, passed_over, verdicts, within
from benchmarks.timing import Figure
from randlora.targets.options import first_learning_rate
from tests.further import further


def row(case: str, sweep: tuple[str, float] | None = None, **seconds: float) -> Row:
    return Row(case, {name: Figure(value, 2 * value, "s") for name, value in seconds.items()}, sweep)


def test_a_target_is_met_or_missed_by_the_ratio_of_the_best_and_asked_of_its_devices_and_its_set_alone() -> None:
    results = Results("b", {}, [row("case", PEFT=6.0, dense=3.0, full=2.0)])
    asked = [faster("b", "case", "dense", ratio) for ratio in (2.0, 2.1)]
    asked += [within("b", "case", "dense", ratio) for ratio in (1.5, 1.4)]
    asked += [within("b", "another case", "dense", 1.5), faster("b", "case", "dense", 0.1, than="nobody")]
    assert [verdict.is_met for verdict in verdicts(results, asked)] == [True, False, True, False, False, False]
    both, cpu, cuda, full = (within("b", case, "dense", 1.0) for case in ("both", "cpu", "cuda", "full"))
    targets = (both, *only_on(("cpu",), cpu), *only_on(("cuda",), cuda), *only_in_full(full))
    for device, is_quick, judged in (("cpu", False, ["both", "cpu", "full"]), ("cuda", True, ["both", "cuda"])):
        results, other = (Results(name, {}, [], device, is_quick) for name in ("b", "other"))
        assert [each.words for each in verdicts(results, targets)] == [f"b, {case}: was not run" for case in judged]
        left = [f"1 targets of another device than {device}", *["1 targets of --full"] * is_quick]
        assert (passed_over(results, targets), passed_over(other, targets), verdicts(other, targets)) == (left, [], [])
    assert {target.benchmark for target in TARGETS} == {  # else nothing would ask for it
        *("laws", "peft_faults", "step", "overhead", "model", "memory", "quantized", "experts"),
        *("startup", "decode", "routed", "pool", "server", "merge", "compiled", "traffic", "growth"),
    }
    assert all((target.at_least > 0) != (target.at_most < float("inf")) for target in TARGETS)


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
    assert (saved["run"], saved["rows"][0]["figures"]["PEFT"]["best"]) == (runs, 4.0 + 2 * runs)


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

    assert (met("good", "gpu", "other"), called) == (True, ["good", "other"])
    assert "skipped gpu, which is only for cuda" in capsys.readouterr().out
    assert (met("bad", "other"), called) == (False, ["bad", "other"])
    assert re.search(r"(?s)ZeroDivisionError: of no use.*raised an error: bad", capsys.readouterr().out)
    monkeypatch.setitem(command.LONGEST, "cpu", 0.0)
    assert (met("good"), called) == (False, [])
    assert "had no time left: good" in capsys.readouterr().out


def test_results_are_written_in_three_forms_and_a_law_that_was_skipped_did_not_hold(tmp_path: Path) -> None:
    rows = [row(f"T = {tokens}", ("tokens", tokens), PEFT=6.0, dense=3.0, full=2.0) for tokens in (1, 10)]
    Results("b", {"processor": "some"}, rows).save(tmp_path, ["met    b"])
    content = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert (content["machine"], content["verdicts"]) == ({"processor": "some"}, ["met    b"])
    assert content["rows"][0]["figures"]["PEFT"] == {"best": 6.0, "median": 12.0, "unit": "s"}
    lines = (tmp_path / "b.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| case | PEFT / full | dense / full | PEFT / dense (median) |"
    assert lines[2] == "| T = 1 | 3.00 | 1.50 | 2.00 (2.00) |"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    report = tmp_path / "laws.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="1"/></testsuites>', "utf-8")
    assert {name: figure.best for name, figure in laws.held(report).items()} == {"held": 5, "all": 9}


@pytest.mark.parametrize("page", pages.PAGES, ids=str)
def test_a_page_shows_the_runs_that_are_kept_whose_best_rates_are_inside_of_their_sweeps(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    places = list(pages.PLACE.finditer(text))
    assert len(places) == text.count("<!--") > 0
    assert "| LoRA" in text
    assert pages.filled(text) == pages.filled(text.replace("| LoRA", "| LORA", 1)) == text
    for place in places:
        for task in pages.tasks_of(place):
            points = summary.points_of(task, pages.kept_runs(task, place["group"]))
            for contestant, own in summary.by_contestant(points).items():
                assert not summary.rate_beyond(task, own), (task.name, contestant)
                if task.name in quality.TASKS:
                    assert {point.seeds for point in own} == {5}, (task.name, contestant)
                    assert len(own) >= (1 if contestant == "frozen" else 3), (task.name, contestant)


def test_the_rate_to_try_first_is_near_the_best_of_each_task() -> None:
    for name, width in {"film reviews": 384, "tweets": 384, "clothes": 96, "word problems": 576}.items():
        points = summary.points_of(quality.TASKS[name], pages.kept_runs(quality.TASKS[name], "main"))
        best = summary.best(quality.TASKS[name], [point for point in points if point.contestant == "dense"]).lr
        assert 0.5 <= first_learning_rate(20.0, width) / best <= 2, name


def rows_of(table: str) -> list[str]:
    """Return the rows of a table of docs/scale.md, its head first."""
    found = re.search(rf"<!-- {table} -->\n(.*?)<!-- end -->", scale.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].splitlines()


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 8B", *map(further, [*scale.MODELS][1:])])
def test_the_rows_of_a_model_are_what_the_formulas_give_and_no_rate_ruins_one_of_its_size(name: str) -> None:
    shape = scale.MODELS[name]
    model = shape.build()
    rate = randlora.plan(model, scale.R, targets=scale.targets_of(shape, model)).learning_rate
    assert rate is not None
    assert 2e-5 < rate <= 3e-4
    assert scale.sizes_row(name, shape) in rows_of("sizes")
    assert scale.totals_row(name, shape) in rows_of("totals")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["Llama-3 405B, 64 devices, fsdp2", "Llama-3 70B, 8 devices, fsdp2"])
def test_the_parts_of_a_sum_are_what_the_formulas_give_and_every_model_has_its_row(name: str) -> None:
    assert scale.parts_row(name) in rows_of("parts")
    tables: dict[str, dict[str, Any]] = {"sizes": scale.MODELS, "totals": scale.MODELS, "parts": scale.PARTS}
    for table, names in tables.items():
        head, _, *rows = rows_of(table)
        assert head == f"| {' | '.join(scale.HEADS[table])} |"
        assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(names)

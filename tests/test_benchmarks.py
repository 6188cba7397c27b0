"""The gate of the benchmarks. What `make bench` itself would fail for is not tested."""

import json
from pathlib import Path

import pytest

from benchmarks import command, laws
from benchmarks.results import Results, Row
from benchmarks.targets import TARGETS, Target, faster, only_in_full, only_on, passed_over, verdicts, within
from benchmarks.timing import Figure


def row(case: str, sweep: tuple[str, float] | None = None, **seconds: float) -> Row:
    return Row(case, {name: Figure(value, 2 * value, "s") for name, value in seconds.items()}, sweep)


@pytest.mark.parametrize(
    ("target", "is_met"),
    [
        (faster("b", "case", "dense", 2.0), True),
        (faster("b", "case", "dense", 2.1), False),
        (within("b", "case", "dense", 1.5), True),
        (within("b", "case", "dense", 1.4), False),
        (within("b", "another case", "dense", 1.5), False),
        (faster("b", "case", "dense", 0.1, than="nobody"), False),
    ],
)
def test_a_target_is_met_or_missed_by_the_ratio_of_the_best(target: Target, is_met: bool) -> None:
    results = Results("b", {}, [row("case", PEFT=6.0, dense=3.0, full=2.0)])
    assert [verdict.is_met for verdict in verdicts(results, [target])] == [is_met]
    assert verdicts(Results("other", {}, []), [target]) == []


@pytest.mark.parametrize(
    ("device", "is_quick", "judged", "left"),
    [
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


def test_every_target_is_of_a_benchmark_and_has_one_bound() -> None:
    """Else nothing would ask for it."""
    assert {target.benchmark for target in TARGETS} == {
        *("laws", "peft_faults", "step", "overhead", "model", "memory", "quantized", "experts"),
        *("startup", "decode", "routed", "pool", "server", "merge", "compiled"),
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
    assert "skipped gpu, which is only for cuda" in capsys.readouterr().out
    assert not met("bad", "other")
    assert called == ["bad", "other"]
    assert "raised an error: bad" in (printed := capsys.readouterr().out)
    assert "ZeroDivisionError: of no use" in printed
    monkeypatch.setitem(command.LONGEST, "cpu", 0.0)
    assert not met("good")
    assert not called
    assert "had no time left: good" in capsys.readouterr().out


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


def test_a_law_that_failed_or_was_skipped_did_not_hold(tmp_path: Path) -> None:
    report = tmp_path / "laws.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="1"/></testsuites>', "utf-8")
    assert {name: figure.best for name, figure in laws.held(report).items()} == {"held": 5, "all": 9}

"""Counting the laws that held on a device."""

from pathlib import Path

import pytest

from benchmarks import laws
from benchmarks.command import Settings
from benchmarks.results import Results
from benchmarks.targets import verdicts

REPORT = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'


def written(directory: Path, tests: int, failures: int = 0, errors: int = 0, skipped: int = 0) -> Path:
    report = directory / "laws.xml"
    report.write_text(REPORT.format(tests, failures, errors, skipped), encoding="utf-8")
    return report


@pytest.mark.parametrize("field", ["failures", "errors", "skipped"])
def test_a_law_that_failed_or_was_skipped_did_not_hold(field: str, tmp_path: Path) -> None:
    figures = laws.held(written(tmp_path, 9, **{field: 2}))
    assert {name: figure.best for name, figure in figures.items()} == {"held": 7, "all": 9}


def test_no_test_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no test of tests/test_device_laws\.py ran"):
        laws.held(written(tmp_path, 0))


@pytest.mark.medium
@pytest.mark.parametrize("is_met", [True, False])
def test_the_gate_of_a_gpu_asks_that_all_hold_on_the_device_of_the_settings(
    is_met: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_some.py"
    content = f"import os\ndef test_a(): assert os.environ['{laws.DEVICE}'] == 'cuda'\ndef test_b(): assert {is_met}\n"
    file.write_text(content, encoding="utf-8")
    monkeypatch.setattr(laws, "FILE", str(file))
    rows = laws.run(Settings("cuda", is_quick=True))
    assert [verdict.is_met for verdict in verdicts(Results("laws", {}, rows, "cuda"))] == [is_met]

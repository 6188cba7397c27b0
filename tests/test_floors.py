"""The oldest versions that pyproject.toml admits: stated once, and those that `make test-floor` installs."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from randlora.quantized import bnb
from tests.floors import PYPROJECT, floors


def numbers(version: str) -> tuple[int, ...]:
    """Read the numbers of a release, without what a build adds to them."""
    return tuple(int(part) for part in version.split("+", maxsplit=1)[0].split(".")[:3] if part.isdecimal())


def test_the_script_pins_every_floor_and_what_is_installed_is_not_older() -> None:
    command = [sys.executable, str(PYPROJECT.parent / "tests" / "floors.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert dict(line.split("==") for line in printed.splitlines()) == floors()
    assert {"torch", "safetensors", "numpy"} < set(floors())
    assert [name for name, floor in floors().items() if numbers(version(name)) < numbers(floor)] == []
    assert numbers(floors()["bitsandbytes"]) == bnb.OLDEST


@pytest.mark.parametrize("requirement", ["torch", "torch==2.6", "torch>=2.6,<3", "torch>=2.6; python_version > '3'"])
def test_a_bound_of_another_form_is_refused(requirement: str, tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(f'[project]\ndependencies = ["{requirement}"]\noptional-dependencies = {{}}\n')
    with pytest.raises(ValueError, match="expected a name, >= and a version"):
        floors(pyproject)

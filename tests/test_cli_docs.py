"""The pages about the command line are true: screens are what commands print, and no command is missing."""

import re
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from randlora.cli.app import app
from tests.screens import PAGES, SCREEN, record

TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)
COMMANDS = sorted(str(command.name) for command in app.registered_commands)


def section(command: str) -> str:
    """Take the part of the pages about one command."""
    found = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no page has a section about {command}"
    return found[1]


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="files name the version of torch, and were smaller by a byte"
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_screens_are_what_the_commands_print(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert record(text, tmp_path) == text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_section_with_a_screen(command: str) -> None:
    assert SCREEN.search(section(command))

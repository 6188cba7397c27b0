"""Every input of the corpus keeps all promises: what fuzzing began with, what reached further, and what once broke."""

from pathlib import Path

import pytest

from tests.fuzz.files import CORPUS
from tests.fuzz.targets import TARGETS

SLOW = {"adapter", "checkpoint", "command_line"}  # that load models, or import transformers and bitsandbytes

INPUTS = [
    pytest.param(name, path, id=f"{name}/{path.name}", marks=pytest.mark.medium if name in SLOW else ())
    for name in TARGETS
    for path in sorted((CORPUS / name).iterdir())
]


@pytest.mark.parametrize(("name", "path"), INPUTS)
def test_no_input_of_the_corpus_breaks_a_promise(name: str, path: Path) -> None:
    TARGETS[name].load()(path.read_bytes())

"""No input of the corpus breaks a promise, nor does a change of one, and a target sees a check that is gone."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.files import CORPUS
from tests.fuzz.limits import Violation
from tests.fuzz.targets import TARGETS

SLOW = {"adapter", "checkpoint", "command_line"}  # that load models, or import transformers and bitsandbytes
INPUTS = [
    pytest.param(name, path, id=f"{name}/{path.name}", marks=pytest.mark.medium if name in SLOW else ())
    for name in TARGETS
    for path in sorted((CORPUS / name).iterdir())
]


@pytest.mark.parametrize(("name", "path"), INPUTS)
def test_no_input_of_the_corpus_breaks_a_promise(name: str, path: Path) -> None:
    TARGETS[name].run(path.read_bytes())


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["adapter", "peft_config", "patterns"])
def test_no_change_of_an_input_breaks_a_promise(name: str) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]

    @settings(max_examples=100)
    @given(st.sampled_from(inputs), st.integers(0, 2**32))
    def changed(data: bytes, seed: int) -> None:
        random = Random(seed)
        for _ in range(random.randint(1, 3)):
            data = TARGETS[name].mutate(data, random, lambda part: part[random.randint(0, len(part)) :])
        TARGETS[name].run(data)

    changed()


CHECKS: list[tuple[str, str, Any]] = [
    ("adapter", "randlora.checkpoint.read._shape_problems", lambda _: []),
    ("peft_config", "randlora.checkpoint.peft_layout.peft_kind", lambda _: "dense"),
    ("patterns", "randlora.config.NO_REGEX", ()),
    ("command_line", "randlora.cli.app.FILES_ERROR", 0),
]


@pytest.mark.medium
@pytest.mark.parametrize(("name", "place", "broken"), CHECKS)
def test_a_check_that_is_gone_is_seen_from_the_corpus(
    name: str, place: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, broken)
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    with pytest.raises((Exception, Violation)):
        list(map(TARGETS[name].run, inputs))

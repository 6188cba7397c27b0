"""Arguments of the verbs on files: what is of another type, or no number or path that there is, is our own error."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
import torch

import randlora
from randlora.errors import ConfigError, RandLoRAError
from randlora.hints import mistyped
from tests.checkpoint_files import LINEAR, trained
from tests.hostile_files import model_directory, our_adapter
from tests.kit import untouched
from tests.model_directories import contents


class BadPath:
    """A path whose own code fails."""

    def __fspath__(self) -> str:
        raise RuntimeError("no path")


class Bytes:
    """A path of bytes."""

    def __fspath__(self) -> bytes:
        return b"x"


NO_PATHS: tuple[Any, ...] = (None, 7, b"bytes", [], ["a"], object(), "", "a\0b", BadPath(), Bytes(), 10**5000)
NO_NAMES: tuple[Any, ...] = (7, b"bytes", [], object())
NO_FLAGS: tuple[Any, ...] = (1, "yes", None, [], 0.0)
NO_NUMBERS: tuple[Any, ...] = ("a", [], True, float("nan"), float("inf"), 10**400, None, object())

files = randlora.files
Call = Callable[[Any, Path, Path, Path], object]
CALLS: dict[str, tuple[tuple[Any, ...], Call]] = {
    "load source": (NO_PATHS, lambda bad, *_: randlora.load(LINEAR.build(), bad)),
    "load trainable": (NO_FLAGS, lambda bad, ours, *_: randlora.load(LINEAR.build(), ours, trainable=bad)),
    "load active": ((1, "no", []), lambda bad, ours, *_: randlora.load(LINEAR.build(), ours, active=bad)),
    "load name": ((*NO_NAMES, None), lambda bad, ours, *_: randlora.load(LINEAR.build(), ours, name=bad)),
    "load prefix": (NO_NAMES, lambda bad, ours, *_: randlora.load(LINEAR.build(), ours, prefix=bad)),
    "load revision": (NO_NAMES, lambda bad, ours, *_: randlora.load(LINEAR.build(), ours, revision=bad)),
    "load model": ((None, 7, "model"), lambda bad, ours, *_: randlora.load(bad, ours)),
    "save directory": (NO_PATHS, lambda bad, *_: randlora.save(trained(LINEAR), bad)),
    "save name": (NO_NAMES, lambda bad, _, __, out: randlora.save(trained(LINEAR), out, name=bad)),
    "save model": ((None, 7), lambda bad, _, __, out: randlora.save(bad, out)),
    "plan": (NO_PATHS, lambda bad, *_: files.plan(bad)),
    "inspect": (NO_PATHS, lambda bad, *_: files.inspect(bad)),
    "inspect base": (NO_PATHS[1:], lambda bad, ours, *_: files.inspect(ours, bad)),
    "inspect prefix": (NO_NAMES, lambda bad, ours, base, _: files.inspect(ours, base, prefix=bad)),
    "inspect norms": (NO_FLAGS, lambda bad, ours, *_: files.inspect(ours, norms=bad)),
    "inspect progress": ((7, "a"), lambda bad, ours, *_: files.inspect(ours, progress=bad)),
    "verify": (NO_PATHS, lambda bad, *_: files.verify(bad)),
    "verify base": (NO_PATHS[1:], lambda bad, ours, *_: files.verify(ours, bad)),
    "convert": (NO_PATHS, lambda bad, _, __, out: files.convert(bad, out)),
    "convert out": (NO_PATHS, lambda bad, ours, *_: files.convert(ours, bad)),
    "convert to": ((None, 7, "gguf", []), lambda bad, ours, _, out: files.convert(ours, out, bad)),
    "convert rank": (
        (0, -1, 1.5, True, "4", 10**6, 10**400, []),
        lambda bad, ours, _, out: files.convert(ours, out, "lora", rank=bad, tolerance=1),
    ),
    "convert tolerance": (
        (*NO_NUMBERS[:-2], -0.1, 1.1),
        lambda bad, ours, _, out: files.convert(ours, out, "lora", tolerance=bad),
    ),
    "convert overwrite": (NO_FLAGS, lambda bad, ours, _, out: files.convert(ours, out, overwrite=bad)),
    "merge base": (NO_PATHS, lambda bad, ours, _, out: files.merge(ours, out, base=bad)),
    "merge adapters": (
        (None, 7, b"bytes", [], {}, [7], [None], {7: 1.0}, [""], {"": 1.0}),
        lambda bad, _, base, out: files.merge(bad, out, base=base),
    ),
    "merge factor": (NO_NUMBERS, lambda bad, ours, base, out: files.merge({ours: bad}, out, base=base)),
    "merge out": (NO_PATHS, lambda bad, ours, base, _: files.merge(ours, bad, base=base)),
    "merge dtype": (
        ("float32", 7, torch.int8),
        lambda bad, ours, base, out: files.merge(ours, out, base=base, dtype=bad),
    ),
}
BAD = {f"{name} {index}": (call, bad) for name, (values, call) in CALLS.items() for index, bad in enumerate(values)}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an adapter and its model."""
    parent = tmp_path_factory.mktemp("places")
    our_adapter(parent / "ours")
    model_directory(parent / "base")
    return parent


@pytest.mark.parametrize(("call", "bad"), BAD.values(), ids=BAD)
def test_a_bad_argument_is_our_error_and_nothing_is_written(call: Call, bad: object, places: Path) -> None:
    before = contents(places)
    with pytest.raises(RandLoRAError) as caught:
        call(bad, places / "ours", places / "base", places / "out")
    assert len(str(caught.value)) < 1500
    assert contents(places) == before


def test_a_bad_argument_of_load_leaves_the_model_alone(places: Path) -> None:
    model = trained(LINEAR, name="first")
    options: list[dict[str, Any]] = [{"trainable": 1}, {"active": "yes"}, {"prefix": 7}, {"revision": b"x"}]
    for wrong in options:
        with untouched(model), pytest.raises(ConfigError):
            randlora.load(model, places / "ours", name="second", **wrong)


@pytest.mark.parametrize("long", ["a" * 5000, "a/" * 3000 + "b", "a" * 300 + "/b"])
def test_a_name_longer_than_a_system_has_is_our_error(long: str) -> None:
    for call in (files.inspect, files.plan):
        with pytest.raises(RandLoRAError):
            call(long)
    with pytest.raises(RandLoRAError):
        randlora.load(LINEAR.build(), long)


class Facts(TypedDict):
    count: int
    pair: tuple[int, str]


GOOD: list[tuple[object, Any]] = [
    (1, int),
    (1, float),
    (Fraction(1, 3), float),
    (True, bool),
    ([1, "a"], tuple[int, str]),
    ((1, "a"), tuple[int, str]),
    ({"a": [1]}, dict[str, list[int]]),
    ({"count": 1, "pair": [1, "a"], "more": None}, Facts),
    (None, int | None),
    ("b", Literal["a", "b"]),
]
WRONG: list[tuple[object, Any, str]] = [
    (True, int, "x must be an integer, got True"),
    (1.0, int, "x must be an integer, got 1.0"),
    (10**400, float, "x must be a finite number, got an integer of 1329 bits"),
    (1, bool, "x must be True or False, got 1"),
    (1, bool | None, "x must be True, False or None, got 1"),
    ("c", Literal["a", "b"] | None, "x must be one of a, b or None, got 'c'"),
    ([1], tuple[int, str], "x must have 2 entries, got 1"),
    ([1, 2], tuple[int, str], "x[1] must be a string, got 2"),
    ({"a": [1, None]}, dict[str, list[int]], "x['a'][1] must be an integer, got None"),
    ({"pair": [1, 2]}, Facts, "x has no count"),
    ("1", int | list[int], "x must be an integer or a list, got '1'"),
    (["1"], int | list[int], "x[0] must be an integer, got '1'"),
    ("c", Literal["a", "b"], "x must be one of a, b, got 'c'"),
    (
        "dens",
        Literal["dense", "sparse"] | None,
        "x must be one of dense, sparse or None, got 'dens': did you mean 'dense'?",
    ),
]


@pytest.mark.parametrize(("value", "hint"), GOOD, ids=str)
def test_what_is_of_a_type_is_no_problem(value: object, hint: Any) -> None:
    assert [*mistyped(value, hint, "x")] == []


@pytest.mark.parametrize(("value", "hint", "message"), WRONG, ids=str)
def test_what_is_not_of_a_type_is_named(value: object, hint: Any, message: str) -> None:
    assert next(mistyped(value, hint, "x")) == message

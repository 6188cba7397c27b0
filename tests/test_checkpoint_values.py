"""Any value at any place of an adapter's header or JSON, and any bytes of its tensors, are refused or load."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import randlora
from randlora.errors import CheckpointError
from tests.checkpoint_files import LINEAR, TENSORS_FILE, peft_directory, read_fields
from tests.hostile_files import config, our_adapter, read_facts, write_facts
from tests.kit import untouched
from tests.model_directories import contents

pytestmark = [
    pytest.mark.medium,
    pytest.mark.usefixtures("impatient"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of a header and a JSON that disagree
]

OPTIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "portable": {"stream": "portable"},
    "block": {"r": 8, "basis": "block"},
    "very sparse": {"r": 8, "basis": "very_sparse"},
    "by layer": {"r": {"0": 2, ".*": 4}},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of sound adapters, by the names in `OPTIONS`, and of one of PEFT's."""
    parent = tmp_path_factory.mktemp("sound")
    peft_directory(parent / "peft")
    for name, options in OPTIONS.items():
        our_adapter(parent / name, **options)
    return parent


@contextmanager
def restoring(directory: Path) -> Iterator[None]:
    """Undo what is written into files."""
    whole = contents(directory)
    yield
    for name, held in whole.items():
        (directory / name).write_bytes(held)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Go through all values inside a value of JSON, by their keys."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def put(value: Any, path: tuple[Any, ...], entry: Any) -> Any:
    """Return a value with another one at a place."""
    changed = deepcopy(value)
    reduce(getitem, path[:-1], changed)[path[-1]] = entry
    return changed


def write_fields(directory: Path, fields: Any) -> None:
    config(json.dumps(fields).encode())(directory)


def outcome(directory: Path) -> Exception | None:
    """Load an adapter, which either gives an error and no trace, or is removed again without one."""
    model = LINEAR.build()
    with untouched(model):
        try:
            randlora.load(model, directory)
        except Exception as error:
            return error
        randlora.eject(model)
    return None


WRONG: tuple[Any, ...] = (None, True, 2.5, -1, 10**30, "%2000000000d", "(a+)+$", [], [[]], {}, {"a": {}}, [["0", 2]])
NUMBER_OR_NONE = {int, float, type(None)}
Types = dict[tuple[Any, ...], set[type]]
HEADER_TYPES: Types = {
    ("config", "alpha"): NUMBER_OR_NONE,
    ("config", "dropout"): NUMBER_OR_NONE - {type(None)},
    ("config", "train_also"): {list, type(None)},
    ("torch_version",): {str, type(None)},
    ("transposed",): {list, type(None)},
    ("config", "stream"): {str, type(None)},
}
"""Places of a header that may have several types."""
PEFT_TYPES: Types = {
    **{(field,): {dict, type(None)} for field in ("alpha_pattern", "auto_mapping", "rank_pattern")},
    **{(field,): {str, type(None)} for field in ("base_model_name_or_path", "peft_version", "revision", "task_type")},
    ("layers_pattern",): {list, str, type(None)},
    ("layers_to_transform",): {list, int, type(None)},
    ("modules_to_save",): {list, type(None)},
    ("randlora_alpha",): {int, float},
    ("randlora_dropout",): {int, float},
    ("target_modules",): {list, str, type(None)},
    ("target_modules", 0): {*map(type, WRONG)},
    ("target_modules", 1): {*map(type, WRONG)},
}
"""Fields of PEFT's that may have several types."""


def test_every_place_of_a_header_and_every_field_of_pefts_has_its_types(tmp_path: Path) -> None:
    """A part of the wrong values at each place."""
    ours = our_adapter(tmp_path / "ours", alpha=3.5, train_also=["0.bias"])
    theirs = peft_directory(tmp_path / "theirs")
    both: list[tuple[Path, Any, Types, Callable[[Any], object]]] = [
        (ours, read_facts(ours), HEADER_TYPES, partial(write_facts, ours)),
        (theirs, read_fields(theirs), PEFT_TYPES, partial(write_fields, theirs)),
    ]
    for directory, found, types, write in both:
        assert len({*places(found)}) > 20
        for number, place in enumerate(places(found)):
            own = reduce(getitem, place, found)
            for wrong in WRONG[number % 4 :: 4]:
                with restoring(directory):
                    write(put(found, place, wrong))
                    error = outcome(directory)
                assert isinstance(error, CheckpointError | None), (place, wrong, error)
                assert error or type(wrong) in types.get(place, {type(own)}), (place, wrong)


ODD = ("%99999999d", "(a+)+$", "torch", "portable", "block", "sparse", "0", "2", 2**40, 2**63, -(2**63))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**320), 10**320)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.just("0"), inner, max_size=4),
    max_leaves=8,
)


def changed(found: Any, data: st.DataObject) -> Any:
    """Put any values at one to three places."""
    for _ in range(data.draw(st.integers(1, 3))):
        found = put(found, data.draw(st.sampled_from([*places(found)])), data.draw(json_values))
    return found


@settings(max_examples=70)
@given(data=st.data())
def test_any_header_is_refused_or_loads(data: st.DataObject, sound: Path) -> None:
    directory = sound / data.draw(st.sampled_from([*OPTIONS]))
    with restoring(directory):
        with suppress(TypeError, ValueError):  # of what cannot be sealed
            write_facts(directory, changed(read_facts(directory), data))
        assert isinstance(outcome(directory), CheckpointError | None)


@settings(max_examples=30)
@given(data=st.data())
def test_any_json_is_refused_or_loads_and_can_be_saved_again(data: st.DataObject, sound: Path) -> None:
    directory, model = sound / "peft", LINEAR.build()
    with restoring(directory):
        found = {**read_fields(directory), data.draw(st.text(max_size=4)): data.draw(json_values)}
        with suppress(ValueError):  # of an integer that Python does not write
            write_fields(directory, changed(found, data))
        error = outcome(directory)
        if error is None:
            randlora.load(model, directory)
            randlora.save(model, directory, bases="stored")
            assert outcome(directory) is None
    assert isinstance(error, CheckpointError | None)


@settings(max_examples=70)
@given(data=st.data())
def test_any_bytes_of_a_file_without_checksum_are_refused_or_load(data: st.DataObject, sound: Path) -> None:
    path = sound / "peft" / TENSORS_FILE
    with restoring(path.parent):
        held = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(held[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, end - 1) | st.integers(0, len(held) - 1))
            held[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789[],:{}"'))
        path.write_bytes(held[: data.draw(st.just(len(held)) | st.integers(0, len(held)))])
        assert isinstance(outcome(path.parent), CheckpointError | None)

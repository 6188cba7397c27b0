"""Hostile adapter files: refused by every verb, by one error, at once, and nothing is touched."""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import randlora
from randlora.bases import BasisSpec
from randlora.bases.basis import Basis
from randlora.checkpoint import read
from randlora.cli.app import main
from randlora.errors import CheckpointError
from tests.checkpoint_files import (
    CONFIG_FILE,
    LINEAR,
    TENSORS_FILE,
    read_fields,
    read_tensors,
    write_tensors,
)
from tests.hostile_files import (
    CASES,
    Damage,
    facts,
    hostile,
    model_directory,
    our_adapter,
    reseal_text,
    sound_directories,
    verbs,
)
from tests.kit import untouched
from tests.model_directories import contents

ROOT = Path(__file__).parent.parent

OPTIONS: dict[str, dict[str, Any]] = {
    "our_adapter": {},
    "portable_adapter": {"stream": "portable"},
    "block": {"r": 8, "basis": "block"},
    "very sparse": {"r": 8, "basis": "very_sparse"},
    "by layer": {"r": {"0": 2, ".*": 4}},
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of a header and a JSON that disagree


@pytest.fixture(autouse=True, scope="module")
def no_other_process() -> Iterator[None]:
    """Do not wait for another process to finish replacing files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "PATIENCE", 0)
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of sound adapters, by the names of their makers and of `OPTIONS`, and of their model."""
    parent = tmp_path_factory.mktemp("sound")
    sound_directories(parent)
    model_directory(parent / "base")
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


@pytest.mark.parametrize(("maker", "damage"), CASES.values(), ids=CASES)
def test_every_verb_refuses_a_hostile_file_and_touches_nothing(
    maker: str, damage: Damage, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And every command ends with 1 and a message."""
    directory, base, out = hostile(sound / maker, damage, tmp_path / "adapter"), sound / "base", tmp_path / "out"
    names = sorted(directory.iterdir())
    assert isinstance(outcome(directory), CheckpointError)
    for call in verbs(directory, base, out).values():
        with pytest.raises(CheckpointError):
            call()
    assert not randlora.files.verify(directory).passed
    for words in (["inspect", directory], ["convert", directory, out], ["merge", directory, out, "--base", base]):
        assert main([*map(str, words)]) == 1
        shown = capsys.readouterr()
        assert (shown.out, shown.err[:7]) == ("", "error: ")
    assert main(["verify", str(directory)]) == 1
    shown = capsys.readouterr()
    assert re.search("^failed: ", shown.out, re.MULTILINE)
    assert shown.err == ""
    assert sorted(directory.iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_weight_under_two_names_is_refused_by_every_verb_that_has_its_model(sound: Path, tmp_path: Path) -> None:
    def name_twice(directory: Path) -> None:
        tensors, metadata = read_tensors(directory)
        names = {name: name.replace(".0.", ".0.weight.") for name in tensors if ".0." in name}
        write_tensors(directory, tensors | {other: tensors[name].clone() for name, other in names.items()}, metadata)
        targets = {"0": [4, 6], "0.weight": [4, 6], "2": [5, 4]}
        facts(targets=targets, config__targets=[*targets])(directory)

    directory = hostile(sound / "our_adapter", name_twice, tmp_path / "adapter")
    assert isinstance(outcome(directory), CheckpointError)
    calls = verbs(directory, sound / "base", tmp_path / "out")
    for verb in ("inspect-base", "lora", "merge"):
        with pytest.raises(CheckpointError, match=r"0 and 0\.weight are both 0\.weight"):
            calls[verb]()
    assert not randlora.files.verify(directory, sound / "base").passed


def test_bases_as_large_as_peft_would_draw_them_are_not_written_needlessly(sound: Path, tmp_path: Path) -> None:
    """A wide and a high layer, for which PEFT has bases that are as wide and as high."""
    spec = BasisSpec("dense", "portable", seed=0, r=2, max_dim=2**14, min_dim=4)
    damage = facts(targets={"0": [4, 2**14], "2": [2**14, 4]}, basis_sha256=Basis(spec).digest(2**14, 4))
    directory = hostile(sound / "portable_adapter", damage, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="the file asks for bases of 16384 x 16384 with r=2"):
        randlora.files.convert(directory, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


SCRIPT = """
import resource, sys
from pathlib import Path
import randlora
from tests.checkpoint_files import LINEAR
from tests.hostile_files import CASES, hostile, verbs

sound, parent = map(Path, sys.argv[1:])
for maker in {maker for maker, _ in CASES.values()}:  # all that a first call imports
    randlora.load(LINEAR.build(), sound / maker)
    randlora.files.inspect(sound / maker)
made = [(hostile(sound / maker, damage, parent / name), LINEAR.build()) for name, (maker, damage) in CASES.items()]
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 100 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for directory, model in made:
    calls = {"load": lambda: randlora.load(model, directory), **verbs(directory, sound / "base", parent / "out")}
    for verb, call in calls.items():
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 2  # a limit is in whole seconds: this one is of one to two
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        print(verb, directory.name, flush=True)
        try:
            call()
            sys.exit("it was taken")
        except randlora.errors.CheckpointError:
            pass
resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("all", len(made))
"""


@pytest.mark.medium
@pytest.mark.skipif(sys.platform != "linux", reason="where the size of a process is read")
def test_no_hostile_file_takes_a_second_or_100_mb(sound: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(sound), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, [f"all {len(CASES)}"]), result.stderr[-2000:]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Go through all values inside a value of JSON, by their keys."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def put(value: Any, path: tuple[Any, ...], entry: Any) -> Any:
    """Return a value with another one at a place."""
    changed = deepcopy(value)
    functools.reduce(lambda held, key: held[key], path[:-1], changed)[path[-1]] = entry
    return changed


def rewritten(changed: Any) -> Damage:
    """Write another header than that which a file has."""

    def edit(facts: dict[str, Any]) -> None:
        facts.clear()
        facts.update(changed)

    return lambda directory: reseal_text(directory, edit, json.dumps)


def write_json(directory: Path, fields: Any) -> None:
    (directory / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")


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


def header_of(directory: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(read_tensors(directory)[1]["randlora"])
    return {name: value for name, value in facts.items() if name != "sha256"}


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


@pytest.mark.medium
def test_every_place_of_a_header_and_every_field_of_pefts_has_its_types(sound: Path, tmp_path: Path) -> None:
    """A part of the wrong values at each place."""
    ours = our_adapter(tmp_path / "ours", alpha=3.5, train_also=["0.bias"])
    theirs = hostile(sound / "peft_directory", lambda _: None, tmp_path / "theirs")
    both: list[tuple[Path, Any, Types, Callable[[Any], object]]] = [
        (ours, header_of(ours), HEADER_TYPES, lambda changed: rewritten(changed)(ours)),
        (theirs, read_fields(theirs), PEFT_TYPES, lambda changed: write_json(theirs, changed)),
    ]
    for directory, found, types, write in both:
        assert len({*places(found)}) > 20
        for number, place in enumerate(places(found)):
            own = functools.reduce(lambda held, key: held[key], place, found)
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


@pytest.mark.medium
@settings(max_examples=70)
@given(data=st.data())
def test_any_header_is_refused_or_loads(data: st.DataObject, sound: Path) -> None:
    directory = sound / data.draw(st.sampled_from([*OPTIONS]))
    with restoring(directory):
        with suppress(TypeError, ValueError):  # of what cannot be sealed
            rewritten(changed(header_of(directory), data))(directory)
        assert isinstance(outcome(directory), CheckpointError | None)


@pytest.mark.medium
@settings(max_examples=30)
@given(data=st.data())
def test_any_json_is_refused_or_loads_and_can_be_saved_again(data: st.DataObject, sound: Path) -> None:
    directory, model = sound / "peft_directory", LINEAR.build()
    with restoring(directory):
        found = {**read_fields(directory), data.draw(st.text(max_size=4)): data.draw(json_values)}
        with suppress(ValueError):  # of an integer that Python does not write
            write_json(directory, changed(found, data))
        error = outcome(directory)
        if error is None:
            randlora.load(model, directory)
            randlora.save(model, directory, bases="stored")
            assert outcome(directory) is None
    assert isinstance(error, CheckpointError | None)


@pytest.mark.medium
@settings(max_examples=70)
@given(data=st.data())
def test_any_bytes_of_a_file_without_checksum_are_refused_or_load(data: st.DataObject, sound: Path) -> None:
    path = sound / "peft_directory" / TENSORS_FILE
    with restoring(path.parent):
        held = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(held[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, end - 1) | st.integers(0, len(held) - 1))
            held[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789[],:{}"'))
        path.write_bytes(held[: data.draw(st.just(len(held)) | st.integers(0, len(held)))])
        assert isinstance(outcome(path.parent), CheckpointError | None)

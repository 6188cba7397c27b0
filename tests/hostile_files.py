"""Adapter files that are damaged or made to hang a reader, to fill its memory, or to raise what no caller expects."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from safetensors.torch import save_file

import randlora
from randlora.checkpoint.header import seal_of
from tests import checkpoint_files as stored
from tests.checkpoint_files import BASIS_A, BASIS_B, CONFIG_FILE, GAMMA, LAMBDA, LINEAR, PREFIX, TENSORS_FILE
from tests.fuzz.mutate import parse, unparse

P = ParamSpec("P")
Damage = Callable[[Path], object]


def our_adapter(directory: Path, case: stored.Case = LINEAR, *, bases: Any = "seed", **options: Any) -> Path:
    randlora.save(stored.trained(case, **options), directory, bases=bases)
    return directory


def unseeded(directory: Path) -> Path:
    """Save one with bases that no seed brings back, as PEFT may draw them."""
    model = LINEAR.build()
    randlora.load(model, stored.foreign(directory))
    randlora.save(model, directory, bases="stored")
    return directory


def model_directory(parent: Path) -> Path:
    """Write the checkpoint of the model that these adapters are of, without a config."""
    parent.mkdir()
    save_file(LINEAR.build().state_dict(), parent / "model.safetensors")
    return parent


def damage(function: Callable[Concatenate[Path, P], object]) -> Callable[P, Damage]:
    """Make a function of a directory and of more return one of the directory alone."""
    return lambda *args, **options: lambda directory: function(directory, *args, **options)


fields, tensors, sealed = damage(stored.edit_fields), damage(stored.edit_tensors), damage(stored.reseal)


def read_facts(directory: Path) -> dict[str, Any]:
    """Read the header without its seal."""
    found: dict[str, Any] = json.loads(stored.read_tensors(directory)[1]["randlora"])
    return {name: value for name, value in found.items() if name != "sha256"}


def write_facts(directory: Path, found: dict[str, Any], old: str = "", new: str = "") -> None:
    """Write another header, sealed as a save would, and then change its text."""
    tensors, metadata = stored.read_tensors(directory)
    text = json.dumps({**found, "sha256": seal_of(found, tensors).digest})
    stored.write_tensors(directory, tensors, {**metadata, "randlora": text.replace(old, new)})


@damage
def facts(directory: Path, /, old: str = "", new: str = "", **changes: Any) -> None:
    """Change facts of the header, ``config__r`` that of its config and ``...`` for none, seal them; change its text."""
    found = read_facts(directory)
    for path, value in changes.items():
        *parents, name = path.split("__")
        reduce(getitem, parents, found)[name] = value
        if value is ...:
            del reduce(getitem, parents, found)[name]
    write_facts(directory, found, old, new)


@damage
def header(directory: Path, name: str, text: str | None = None) -> None:
    tensors, metadata = stored.read_tensors(directory)
    stored.write_tensors(directory, tensors, {"format": "pt", name: metadata["randlora"] if text is None else text})


@damage
def unsealed(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change tensors beside a seal of what they were."""
    held, metadata = stored.read_tensors(directory)
    stored.write_tensors(directory, change(held), metadata)


@damage
def config(directory: Path, contents: bytes) -> None:
    (directory / CONFIG_FILE).write_bytes(contents)


@damage
def json_text(directory: Path, old: str, new: str) -> None:
    config(json.dumps(stored.read_fields(directory)).replace(old, new).encode())(directory)


@damage
def multiplied(directory: Path, key: str, last: float, others: float = 1) -> None:
    """Multiply a tensor, and its last value by some other number, under a whole seal if there is one."""
    held, metadata = stored.read_tensors(directory)
    changed = held[key] * others
    changed.view(-1)[-1] *= last
    (stored.reseal if "randlora" in metadata else stored.edit_tensors)(directory, {key: changed})


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


@damage
def pickled(directory: Path, name: str) -> None:
    (directory / TENSORS_FILE).unlink()
    torch.save({"weight": Bomb()}, directory / name)


@damage
def raw(directory: Path, tensors: Mapping[str, tuple[list[int], int]], *, is_added: bool = False) -> None:
    """Write tensors of zeros, of any names, shapes and sizes, in place of those of a file or beside them."""
    path = directory / TENSORS_FILE
    held = {name: {"dtype": "F32", "shape": shape, "data": "\0" * size} for name, (shape, size) in tensors.items()}
    path.write_bytes(unparse({**(parse(path.read_bytes()) if is_added else {}), **held}))


@damage
def instead(directory: Path, name: str, make: Callable[[Path], object]) -> None:
    (directory / name).unlink(missing_ok=True)
    make(directory / name)


@damage
def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, size)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device-without-end": lambda path: path.symlink_to("/dev/zero"),
    "device-that-waits": lambda path: path.symlink_to("/dev/tty"),
    "directory": lambda path: path.mkdir(),
    "link-to-itself": lambda path: path.symlink_to(path.name),
}
"""What is no file, though its name is one's."""
NO_FILES = [*SPECIAL.values()][:4]  # the link to itself is not there

NUMBER = "1" + "0" * 400
DEEP = "[" * 5000 + "]" * 5000
LARGE = 2**40
LONG, ENDLESS = f"{PREFIX}{'a.' * 500_000}randlora_lambda", b"\xff" * 8 + b"{}"
NO_BASES = {LAMBDA: ([2, 2], 16), GAMMA: ([2, 4], 32), BASIS_A: ([2, 1, 0], 0)}
NO_BASES |= {BASIS_B: ([LARGE, 0, 2], 0)}
ones = torch.ones

Rows = tuple[tuple[str, Damage], ...]
ASKED, SHAPELESS = "the file asks for bases of", "has a shape that no tensor has"
NOT_FINITE, OTHERS = "holds NaN or infinite values", "expected the parameters trained with it (2.bias), got"
EDITED, NOT_SAME = "stored in the file are not those it names", "when the adapter was saved with torch"
NO_ADAPTER = "describes no RandLoRA adapter: expected peft_type='RANDLORA', got "
DAMAGED, CONTRADICTORY, UNSEALED = "header is damaged", "contradict each other", "do not match its checksum"
WIDE: dict[str, Any] = {"targets": {"0": [4, LARGE], "2": [5, 4]}}
BIAS = f"{PREFIX}2.base_layer.bias"
VALUES = (*((key, float("nan")) for key in (LAMBDA, GAMMA, BIAS, BASIS_A, BASIS_B)), (LAMBDA, 1e999), (GAMMA, -1e999))
NOT_FINITE_ROWS: Rows = tuple((f"{key} {NOT_FINITE}", multiplied(key, value)) for key, value in VALUES)
LACKING: tuple[dict[str, Any], ...] = {"format_version": ...}, {"config": ...}, {"basis": ...}, {"basis__seed": ...}
CONTRADICTING: tuple[dict[str, Any], ...] = (
    *({"basis__r": 4}, {"basis__seed": 4}, {"basis__kind": "sparse"}, {"basis__stream": "portable"}),
    *({"basis__max_dim": 5}, {"basis__min_dim": 3}),
)
CONTRADICTING_BY_LAYER: tuple[dict[str, Any], ...] = (
    *({"bases__4": ...}, {"bases__4__basis__r": 2}, {"bases__4__basis__max_dim": 4}),
    *({"config__alpha": [["0", 0.5], ["2", 5], ["1", 1]]}, {"config__r": [["0", 2], [".*", 4]]}),
)
CHANGES: tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], ...] = (
    lambda held: held | {LAMBDA: held[LAMBDA].view(torch.int32)},
    lambda held: held | {LAMBDA: held[LAMBDA].flatten()},
    lambda held: held | {LAMBDA: held[GAMMA], GAMMA: held[LAMBDA]},
    lambda held: held | {f"{PREFIX}4.randlora_lambda": torch.ones(0)},
    lambda held: {key: value for key, value in held.items() if key != LAMBDA},
    lambda held: {key.replace(".0.", ".4."): value for key, value in held.items()},
)

OURS: Rows = (
    ("has no basis_sha256", facts('"basis_sha256"', '"digest"')),
    ("has no library_version", facts('"library_version"', '"version"')),
    ("at least one name", facts(targets={}, config__targets=[])),
    ("config.targets must be a list or None", facts(config__targets="(a+)+$|" + "a" * 40)),
    ("2 problems:\n  - r must be", facts(config__r=-1, config__dropout=7)),
    (f"{ASKED} {LARGE} x 5", facts(basis__max_dim=LARGE)),
    (f"{ASKED} {2**14} x {2**14}", facts(basis__max_dim=2**14, basis__min_dim=2**14)),
    (f"{ASKED} {10**308}", facts(basis__max_dim=10**308, basis__min_dim=10**308)),
    (f"{LARGE}", facts(**WIDE, basis__max_dim=LARGE)),
    ("expected at most 16,777,216: it is", lambda directory: os.truncate(directory / CONFIG_FILE, 2**24 + 1)),
    ("not JSON compliant", facts('"dropout": 0.0', '"dropout": 1e999')),
    ("an integer of 401000 digits", facts('"dropout": 0.0', f'"dropout": {NUMBER * 1000}')),
    ("nested deeper than 64 levels", facts('"dropout": 0.0', f'"more": {DEEP}, "dropout": 0.0')),
    ("surrogates not allowed", facts('"dropout": 0.0', '"more": "\\ud800", "dropout": 0.0')),
    ("it is not an object", header("randlora", "[]")),
    ("has a header under a damaged name", header("sandlora")),
    (NOT_SAME, sealed(digest="0" * 64)),
    *((DAMAGED, facts(**lack)) for lack in LACKING),
    (DAMAGED, facts('"sha256"', '"seal"')),
    *((DAMAGED, header("randlora", text)) for text in ("", "null")),
    ("config has no alpha", facts(config__alpha=...)),
    *((DAMAGED, facts(targets__0=shape)) for shape in ([4], [0, 6])),
    *((DAMAGED, facts(model_class={"library": "transformers", **more})) for more in ({}, {"name": "A", "labels": {}})),
    *((DAMAGED, facts(kinds=kinds)) for kinds in ({"0": "convolutions"}, {"c": "experts"})),
    (DAMAGED, facts(config__exclude="(a+)+b")),
    ("does not know rank: was the file written by a newer version", facts(config__rank=2)),
    (DAMAGED, facts(basis__min_dim=0)),
    *((CONTRADICTORY, facts(**change)) for change in CONTRADICTING),
    *(("reads versions 1 to 4: install one", facts(format_version=version)) for version in (0, 5, "1", None, [1])),
    (DAMAGED, facts(format_version=2)),
    *((UNSEALED, facts(f'"{fact}"', f'"more": 1, "{fact}"')) for fact in ("config", "format_version")),
    *((UNSEALED, facts(f'{fact}": "', f'{fact}": "0')) for fact in ("basis_sha256", ' "sha256', "torch_version")),
    *((UNSEALED, unsealed(change)) for change in CHANGES),
)
BY_LAYER: Rows = (
    *((CONTRADICTORY, facts(**change)) for change in CONTRADICTING_BY_LAYER),
    (DAMAGED, facts(format_version=1)),
)
PORTABLE: Rows = (
    (f"{LARGE}", facts(**WIDE)),
    (f"{2**25}", facts(targets={"0": [4, 2**25], "2": [2**25, 4]})),
    (f"{ASKED} {LARGE} x 5", facts(basis__max_dim=LARGE)),
    ("have lost the header that goes with randlora_stream", tensors({})),
    (NOT_SAME, sealed(digest="0" * 64)),
)
STORED: Rows = (
    *NOT_FINITE_ROWS[2:4],
    (f"{OTHERS} {PREFIX}0.bias, {BIAS}", sealed({f"{PREFIX}0.bias": ones(4)})),
    (f"{OTHERS} none", sealed({}, drop=[BIAS])),
    (f"{OTHERS} {PREFIX}2.bias", sealed({f"{PREFIX}2.bias": ones(5)}, drop=[BIAS])),
    (f"there is no {LAMBDA}: expected randlora_lambda and", sealed({}, drop=[LAMBDA, GAMMA])),
    (OTHERS, sealed({f"{PREFIX}4.randlora_lambda": ones(2, 1), f"{PREFIX}4.randlora_gamma": ones(1, 2)})),
    (EDITED, multiplied(BASIS_A, 1, 2)),
    (EDITED, multiplied(BASIS_B, 1, 2)),
)
UNSEEDED: Rows = (
    (EDITED, multiplied(BASIS_A, 1, 2)),
    (EDITED, multiplied(BASIS_B, 1, 2)),
    ("the file holds no bases, and no seed reproduces them", sealed({}, drop=[BASIS_A, BASIS_B])),
)
PEFTS: Rows = (
    *NOT_FINITE_ROWS,
    ("key must be an integer, got '%2000000000d'", fields({"projection_prng_key": "%2000000000d"})),
    ("lacks r, randlora_alpha, projection_prng_key", fields({}, drop=("r", "randlora_alpha", "projection_prng_key"))),
    ("r must be", fields({"r": -1})),
    ("expected (3, num_bases)", fields({"r": 3})),
    (f"expected ({10**6}, num_bases)", fields({"r": 10**6})),
    ("alpha must be a finite number, got None", fields({"randlora_alpha": None})),
    ("an integer of 401 digits", json_text('"randlora_alpha": 40', f'"randlora_alpha": {NUMBER}')),
    ("not JSON compliant", fields({"randlora_alpha": float("nan")})),
    ("surrogates not allowed", json_text('"bias": "none"', '"bias": "\\ud800"')),
    ("nested deeper than 64 levels", json_text('"bias": "none"', f'"more": {DEEP}, "bias": "none"')),
    ("invalid start byte", config(b"\xff\xfe{\0}\0")),
    ("is damaged", config(b"{")),
    (f"{NO_ADAPTER}None", config(b"null")),
    (f"{NO_ADAPTER}'LORA'", config(b'{"peft_type": "LORA"}')),
    (f"{SHAPELESS}, (0, {2**62}, {2**62})", raw({f"{LAMBDA}s": ([0, 2**62, 2**62], 0)}, is_added=True)),
    (f"{SHAPELESS}, (1, 1, 1", raw({f"{LAMBDA}s": ([1] * 65, 4)}, is_added=True)),
    (f"0 has randlora_lambda (0, {2**62})", raw(dict.fromkeys((LAMBDA, GAMMA), ([0, 2**62], 0)))),
    (f"the bases have shapes (2, 1, 0) and ({LARGE}, 0, 2)", raw(NO_BASES)),
    ("has a name of 1000032 characters", raw({LONG: ([1], 4)}, is_added=True)),
    ("the file holds no randlora_lambda and randlora_gamma", raw({f"{PREFIX}0.bias": ([4], 16)})),
    (f"there is no {GAMMA}: expected randlora_lambda and", tensors({}, drop=[GAMMA])),
    ("the file holds one of the two bases: expected both or none", tensors({}, drop=[BASIS_B])),
    ("'0.randlora_lambda' is not the name of an adapter's", tensors({"0.randlora_lambda": ones(1)})),
    ("randlora_lambda (3, 2)", tensors({LAMBDA: ones(3, 2)})),
    ("randlora_lambda ()", tensors({LAMBDA: torch.tensor(1.0)})),
    ("randlora_gamma (3, 4)", tensors({LAMBDA: ones(2, 3), GAMMA: ones(3, 4)})),
    ("lambda (1, 1, 2, 2)", tensors({LAMBDA: ones(1, 1, 2, 2), GAMMA: ones(1, 1, 2, 4)})),
    ("randlora_gamma (0, 0): expected (2, num_bases)", tensors({LAMBDA: ones(2, 0), GAMMA: ones(0, 0)})),
    ("the bases have shapes () and", tensors({BASIS_A: torch.tensor(1.0)})),
    ("the bases have shapes (3, 1, 5)", tensors({BASIS_A: ones(3, 1, 5)})),
    ("and (6, 2, 2), which do not fit r=2", tensors({BASIS_B: ones(6, 2, 2)})),
    ("(0.bias, 2.bias), got", tensors({f"{PREFIX}0.bias": ones(4), f"{PREFIX}0.base_layer.bias": ones(4)})),
    ("0.randlora_lambda holds torch.float8_e4m3fn", tensors({LAMBDA: ones(2, 2).to(torch.float8_e4m3fn)})),
    ("randlora_B holds torch.bool", tensors({BASIS_B: ones(6, 3, 2).bool()})),
    (f"2 problems:\n  - {GAMMA} holds torch.int64", tensors({LAMBDA: ones(2, 2) / 0, GAMMA: ones(2, 4).long()})),
    ("truncated or damaged", pickled(TENSORS_FILE)),
    ("only safetensors files are read, nothing is unpickled", pickled("adapter_model.bin")),
    (f"{CONFIG_FILE} and {TENSORS_FILE}", lambda place: (place / CONFIG_FILE).unlink()),
    *(
        (f"{name} is a directory, a pipe or a device: expected a file", instead(name, make))
        for name in (CONFIG_FILE, TENSORS_FILE)
        for make in NO_FILES
    ),
    (f"{CONFIG_FILE} (Too many levels of symbolic links)", instead(CONFIG_FILE, SPECIAL["link-to-itself"])),
    (f"{TENSORS_FILE}: only safetensors files are read", instead(TENSORS_FILE, SPECIAL["link-to-itself"])),
    (f"has {2**24 + 1:,} bytes, expected at most {2**24:,}", instead(CONFIG_FILE, sparse(2**24 + 1))),
    ("its header has 0 of 3,221,225,472 bytes", instead(TENSORS_FILE, sparse(3 * 2**30))),
    ("header has 3,221,225,472 of", instead(TENSORS_FILE, sparse(2**32, (3 * 2**30).to_bytes(8, "little")))),
    ("header has 18,446,744,073,709,551,615 of 10", lambda place: (place / TENSORS_FILE).write_bytes(ENDLESS)),
)

MAKERS: dict[str, tuple[Callable[[Path], object], Rows]] = {
    "ours": (our_adapter, OURS),
    "by layer": (partial(our_adapter, r={"0": 2, ".*": 4}, alpha={"0": 0.5, ".*": 5}), BY_LAYER),
    "portable": (partial(our_adapter, stream="portable"), PORTABLE),
    "block": (partial(our_adapter, basis="block"), PORTABLE[-2:]),
    "stored": (partial(our_adapter, bases="stored", train_also=["2.bias"]), STORED),
    "unseeded": (unseeded, UNSEEDED),
    "PEFT's": (partial(stored.peft_directory, train_also=["2.bias"]), PEFTS),
}
"""What makes a sound directory, and what is said of it, by every verb, after some damage."""

"""Adapter files that were made to hang a reader, to fill its memory, or to raise what no caller expects."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import randlora
from randlora.checkpoint.header import _seal
from tests.checkpoint_files import (
    BASIS_A,
    BASIS_B,
    CONFIG_FILE,
    GAMMA,
    LAMBDA,
    LINEAR,
    TENSORS_FILE,
    edit_fields,
    peft_directory,
    read_fields,
    read_tensors,
    trained,
    write_tensors,
)

Damage = Callable[[Path], object]


def our_adapter(directory: Path, **options: Any) -> Path:
    """Save an adapter of ours."""
    randlora.save(trained(LINEAR, **options), directory)
    return directory


def portable_adapter(directory: Path) -> Path:
    """Save one whose bases are drawn for its own layers, whatever dims their spec has."""
    return our_adapter(directory, stream="portable")


def reseal_text(directory: Path, edit: Callable[[dict[str, Any]], object], dump: Callable[[Any], str]) -> None:
    """Change the facts of a header, seal them as a save would, and write them as any text."""
    tensors, metadata = read_tensors(directory)
    facts = json.loads(metadata["randlora"])
    edit(facts)
    facts.pop("sha256", None)
    sealed = {**facts, "sha256": _seal(facts, tensors)} if isinstance(facts, dict) else facts
    write_tensors(directory, tensors, {**metadata, "randlora": dump(sealed)})


def facts(**changes: Any) -> Damage:
    """Change facts of the header: ``config_r=3`` is that of its config."""

    def edit(found: dict[str, Any]) -> None:
        for path, value in changes.items():
            *parents, name = path.split("__")
            place = found
            for parent in parents:
                place = place[parent]
            place[name] = value

    return lambda directory: reseal_text(directory, edit, json.dumps)


def text(old: str, new: str) -> Damage:
    """Change the header's text after it was sealed."""
    return lambda directory: reseal_text(directory, lambda _: None, lambda found: json.dumps(found).replace(old, new))


def fields(**changes: Any) -> Damage:
    return lambda directory: edit_fields(directory, changes)


def json_text(old: str, new: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / CONFIG_FILE).write_text(json.dumps(read_fields(directory)).replace(old, new), encoding="utf-8")

    return damage


def raw(tensors: Mapping[str, tuple[list[int], bytes]], *, is_added: bool = False) -> Damage:
    """Write tensors of any names and shapes by hand, in place of those of a file or beside them."""

    def damage(directory: Path) -> None:
        own = read_tensors(directory)[0].items() if is_added else ()
        found = {key: (list(value.shape), value.numpy().tobytes()) for key, value in own} | dict(tensors)
        header: dict[str, Any] = {}
        start = 0
        for name, (shape, held) in found.items():
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + len(held)]}
            start += len(held)
        text = json.dumps(header).encode()
        values = b"".join(held for _, held in found.values())
        (directory / TENSORS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + values)

    return damage


def add(name: str, shape: list[int], held: bytes = b"") -> Damage:
    return raw({name: (shape, held)}, is_added=True)


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else in place of a file."""

    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return damage


def sparse(size: int, start: bytes = b"") -> Callable[[Path], object]:
    """Make a file of any size that takes no space."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device-without-end": lambda path: path.symlink_to("/dev/zero"),
    "device-that-waits": lambda path: path.symlink_to("/dev/tty"),
    "directory": lambda path: path.mkdir(),
    "link-to-itself": lambda path: path.symlink_to(path.name),
}
"""What is no file, though its name is one's."""

NUMBER = "1" + "0" * 400
DEEP = "[" * 5000 + "]" * 5000
LARGE = 2**40


OURS: dict[str, Damage] = {
    "digest-number": facts(basis_sha256=7),
    "no-library-version": lambda directory: reseal_text(directory, lambda it: it.pop("library_version"), json.dumps),
    "no-targets": facts(targets={}, config__targets=[]),
    "targets-regex": facts(config__targets="(a+)+$|" + "a" * 40),
    "exclude-regex": facts(config__exclude="(a+)+$"),
    "max-dim": facts(basis__max_dim=LARGE),
    "wide-spec": facts(basis__max_dim=2**14, basis__min_dim=2**14),
    "both-dims": facts(basis__max_dim=2**20, basis__min_dim=2**20),
    "dims-beyond-floats": facts(basis__max_dim=10**308, basis__min_dim=10**308),
    "wide-layer": facts(targets={"0": [4, LARGE], "2": [5, 4]}, basis__max_dim=LARGE),
    "a-key-twice": text('"config": {', '"config": {"r": 2, '),
    "nan": text('"dropout": 0.0', '"dropout": NaN'),
    "beyond-floats": text('"dropout": 0.0', '"dropout": 1e999'),
    "more-digits": text('"dropout": 0.0', f'"dropout": {NUMBER * 1000}'),
    "deep": text('"dropout": 0.0', f'"more": {DEEP}, "dropout": 0.0'),
    "half-a-character": text('"dropout": 0.0', '"more": "\\ud800", "dropout": 0.0'),
    "another-object": lambda directory: reseal_text(directory, lambda _: None, lambda _: "[]"),
}
"""Damages of a directory of `our_adapter`."""

PORTABLE: dict[str, Damage] = {
    "wide-layer": facts(targets={"0": [4, LARGE], "2": [5, 4]}),
    "wide-layer-of-its-spec": facts(targets={"0": [4, LARGE], "2": [5, 4]}, basis__max_dim=LARGE),
    "high-and-wide": facts(targets={"0": [4, 2**25], "2": [2**25, 4]}),
    "max-dim": facts(basis__max_dim=LARGE),
}
"""Damages of a directory of `portable_adapter`."""

PEFTS: dict[str, Damage] = {
    "format-string": fields(projection_prng_key="%2000000000d"),
    "format-string-cut": fields(projection_prng_key="%"),
    "name-of-half-characters": json_text('"bias": "none"', '"bias": "\\ud800"'),
    "rank-large": fields(r=10**6),
    "alpha-null": fields(randlora_alpha=None),
    "alpha-digits": json_text('"randlora_alpha": 40', f'"randlora_alpha": {NUMBER}'),
    "alpha-nan": json_text('"randlora_alpha": 40', '"randlora_alpha": NaN'),
    "a-key-twice": json_text('"bias": "none"', '"bias": "none", "bias": "all"'),
    "deep": json_text('"bias": "none"', f'"more": {DEEP}, "bias": "none"'),
    "deep-enough": json_text('"bias": "none"', f'"more": {"[" * 400 + "]" * 400}, "bias": "none"'),
    "no-object": lambda directory: (directory / CONFIG_FILE).write_text("7"),
    "utf-16": lambda directory: (directory / CONFIG_FILE).write_text(json.dumps(read_fields(directory)), "utf-16"),
    "empty-and-huge": add(f"{LAMBDA}s", [0, 2**63]),
    "empty-and-huge-twice": add(f"{LAMBDA}s", [0, 2**62, 2**62]),
    "of-many-dims": add(f"{LAMBDA}s", [1] * 5000, b"\0" * 4),
    "all-empty": raw(dict.fromkeys((LAMBDA, GAMMA), ([0, 2**62], b""))),
    "bases-of-nothing": raw({
        LAMBDA: ([2, 2], b"\0" * 16),
        GAMMA: ([2, 4], b"\0" * 32),
        BASIS_A: ([2, 1, 0], b""),
        BASIS_B: ([2**40, 0, 2], b""),
    }),
    "long-name": add("base_model.model." + "a." * 500_000 + "randlora_lambda", [1], b"\0" * 4),
    "no-tensors": raw({}),
    **{f"json-is-{name}": instead(CONFIG_FILE, make) for name, make in SPECIAL.items()},
    **{f"tensors-are-{name}": instead(TENSORS_FILE, make) for name, make in SPECIAL.items()},
    "json-of-3-GB": instead(CONFIG_FILE, sparse(3 * 2**30)),
    "tensors-of-3-GB-of-nothing": instead(TENSORS_FILE, sparse(3 * 2**30)),
    "header-of-3-GB": instead(TENSORS_FILE, sparse(2**32, (3 * 2**30).to_bytes(8, "little"))),
    "header-of-exabytes": lambda directory: (directory / TENSORS_FILE).write_bytes(b"\xff" * 8 + b"{}"),
}
"""Damages of a directory that PEFT might have written."""


MAKERS = ((our_adapter, OURS), (portable_adapter, PORTABLE), (peft_directory, PEFTS))
CASES = {
    f"{maker.__name__}-{name}": (maker.__name__, damage)
    for maker, damages in MAKERS
    for name, damage in damages.items()
}
"""Every damage with the maker of what is damaged."""


def sound_directories(parent: Path) -> dict[str, Path]:
    """Make what all hostile files are made of, by the name of its maker."""
    return {maker.__name__: maker(parent / maker.__name__) for maker, _ in MAKERS}


def hostile(sound: Path, damage: Damage, directory: Path) -> Path:
    """Copy a directory and damage it."""
    shutil.copytree(sound, directory)
    damage(directory)
    return directory


def model_directory(parent: Path) -> Path:
    """Write the checkpoint of the model that these adapters are of, without a config."""
    parent.mkdir()
    save_file(LINEAR.build().state_dict(), parent / "model.safetensors")
    return parent


def verbs(directory: Path, base: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Everything on files that reads an adapter, for one directory."""
    files = randlora.files
    return {
        "inspect": lambda: files.inspect(directory),
        "inspect-base": lambda: files.inspect(directory, base),
        "peft": lambda: files.convert(directory, out, "peft"),
        "native": lambda: files.convert(directory, out, "native"),
        "lora": lambda: files.convert(directory, out, "lora", base=base),
        "merge": lambda: files.merge(directory, out, base=base),
    }

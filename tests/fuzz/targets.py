"""All targets, each with what changes its inputs so that they get far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from random import Random

from tests.fuzz.files import pack, unpack
from tests.fuzz.mutate import MutateBytes, mutate_files, mutate_json_bytes

Mutator = Callable[[bytes, Random, MutateBytes], bytes]


@dataclass(frozen=True)
class Target:
    """What `python -m tests.fuzz` runs under a name.

    Attributes:
        name: Of the module ``target_NAME``, and of the folder with its corpus.
        mutate: Returns a changed input.
        tried: What one run is, for the table of `make torture`.
    """

    name: str
    mutate: Mutator
    tried: str

    def load(self) -> Callable[[bytes], None]:
        """Import and return the function that takes an input and raises if a promise is broken."""
        function: Callable[[bytes], None] = import_module(f"tests.fuzz.target_{self.name}").target
        return function


def _mutate_archive(data: bytes, random: Random, mutate_bytes: MutateBytes, *, spare: tuple[str, ...]) -> bytes:
    files = unpack(data)
    return mutate_bytes(data) if files is None else pack(mutate_files(files, random, mutate_bytes, spare))


def _mutate_options(data: bytes, random: Random, mutate_bytes: MutateBytes) -> bytes:
    return mutate_json_bytes(data, random, lambda data: data)


WORDS = (
    *("inspect", "verify", "convert", "merge", "plan", "--help", "--json", "--base", "--prefix", "--to", "--rank"),
    *("--tolerance", "--overwrite", "--adapter", "--scale", "--out", "--dtype", "--r", "--alpha", "--targets"),
    *("--exclude", "--train-also", "--basis", "--stream", "--blocks", "--seed", "--in-proj", "--"),
    *("ours", "peft", "drawn", "odd", "base", "nf4", "llama", "damaged", "file", "link", "zero", "empty", "out"),
    *("..", "/", "", "/dev/null", "/dev/zero", "0", "1", "2", "-1", "3.5", "nan", "inf", "1e400", "1048576", "1048577"),
    *("9" * 5000, "wide", "tall", "wide=2", ".*=2", "(", "(?i)W", "lora", "native", "block", "portable", "float64"),
    *("\udcff", "a" * 300, "%s", "[red]x", "all", "all-linear", "split", "--no-norms", "-h", "-x", "--to=lora"),
    *("ours/x", ".", "é"),
)


def _mutate_line(data: bytes, random: Random, mutate_bytes: MutateBytes) -> bytes:
    words = data.split(b"\n")
    for _ in range(random.choice((1, 1, 2, 3))):
        place, choice = random.randrange(len(words) + 1), random.randrange(5)
        word = random.choice(WORDS).encode("utf-8", "surrogateescape")
        if choice == 0:
            words.insert(place, word)
        elif choice == 1 and len(words) > 1:
            words.pop(place % len(words))
        elif choice == 2 and words:
            words[place % len(words)] = mutate_bytes(words[place % len(words)])
        elif words:
            words[place % len(words)] = word
    return b"\n".join(words)


_adapter = tuple(f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"))
_files = ("config.json", "model.safetensors", "model.safetensors.index.json", "x/adapter_config.json")
_base = tuple(f"base/{name}" for name in _files)

TARGETS = {
    target.name: target
    for target in (
        Target("adapter", partial(_mutate_archive, spare=_adapter), "adapter directories read, rewritten and loaded"),
        Target("checkpoint", partial(_mutate_archive, spare=_adapter + _base), "base directories verified and merged"),
        Target("peft_config", mutate_json_bytes, "JSON files beside tensors of PEFT"),
        Target("patterns", _mutate_options, "options planned, injected and ejected"),
        Target("command_line", _mutate_line, "command lines run"),
    )
}

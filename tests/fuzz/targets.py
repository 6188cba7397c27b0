"""All targets, each with what changes its inputs so that they get far."""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from tests.fuzz import readers, words
from tests.fuzz.mutate import MutateBytes, mutate_archive, mutate_file, mutate_line


class Target(NamedTuple):
    """What `python -m tests.fuzz` runs under a name, which is also the name of the folder with its corpus.

    ``run`` takes an input and raises if a promise is broken; ``mutate`` returns a changed input; ``tried`` is what one
    run is, for the table of `make torture`.
    """

    run: Callable[[bytes], None]
    mutate: Callable[[bytes, Random, MutateBytes], bytes]
    tried: str


_adapter = [f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "README.md")]
_files = ("config.json", "model.safetensors", "model.safetensors.index.json", "x/adapter_config.json")
_archive = partial(mutate_archive, spare=_adapter)
_archives = partial(mutate_archive, spare=[*_adapter, *(f"base/{name}" for name in _files)])

TARGETS = {
    "adapter": Target(readers.adapter, _archive, "adapter directories read, rewritten and loaded"),
    "checkpoint": Target(readers.checkpoint, _archives, "base directories verified and merged"),
    "peft_config": Target(readers.peft_config, mutate_file, "JSON files beside tensors of PEFT"),
    "patterns": Target(
        words.patterns,
        lambda data, random, _: mutate_file(data, random, lambda part: part),
        "options planned, injected and ejected",
    ),
    "command_line": Target(words.command_line, mutate_line, "command lines run"),
}

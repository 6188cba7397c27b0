"""All targets, and those that take what users write: options by patterns and names of layers, and command lines."""

import io
import json
import os
import re
import warnings
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from random import Random
from typing import Any, NamedTuple

from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.cli.app import main
from randlora.errors import RandLoRAError
from tests.fuzz import readers
from tests.fuzz.files import laid_out, tree
from tests.fuzz.limits import bounded, outcome, writing_only
from tests.fuzz.mutate import MutateBytes, mutate_archive, mutate_file, mutate_line
from tests.fuzz.readers import OF_MODELS, PREPARED
from tests.kit import untouched

LONGEST = 24
"""A regex of the user's may take any time; one of this length over names as short as those below takes little."""
MOST, DEEPEST = 24, 6
OF_PATTERNS = (5.0, 400)


def build() -> nn.Module:
    first = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 6, bias=False)})
    second = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6))
    others = {"e": nn.Embedding(5, 4), "m": nn.MultiheadAttention(4, 2), "n": nn.LayerNorm(4), "c": nn.Conv1d(4, 4, 3)}
    return nn.ModuleDict({"a": first, "b": second, **others, "t": nn.Identity()})


def patterns(data: bytes) -> None:
    try:
        options = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(options, dict) or _is_long(options, DEEPEST):
        return
    options = {key: value for key, value in options.items() if key not in {"model", "config", "self"}}
    if isinstance(blocks := options.get("blocks"), list):
        options["blocks"] = tuple(blocks)
    model = build()
    with bounded(*OF_PATTERNS), untouched(model):
        planned = outcome(lambda: randlora.plan(model, **options))
        injected = outcome(lambda: randlora.inject(model, **options))
        if isinstance(injected, RandLoRAError):  # what is drawn is drawn by inject alone
            assert isinstance(planned, type(injected)) or "draw" in str(injected), (
                f"plan: {planned}; inject: {injected}"
            )
            return
        assert not isinstance(planned, RandLoRAError), f"inject adapts what plan refuses: {planned}"
        assert planned.targets == injected.targets
        wanted, left_out = options.get("targets"), options.get("exclude")
        for fqn in injected.targets:
            assert wanted in (None, "all", "all-linear") or _names(wanted, fqn), f"{fqn} is not in {wanted!r}"
            assert left_out is None or not _names(left_out, fqn), f"{fqn} is adapted, and {left_out!r} matches it"
        config = {key: value for key, value in options.items() if key not in {"name", "active", "trainable"}}
        if config.get("r", 0) is None:  # which means the default of inject alone
            del config["r"]
        whole = RandLoRAConfig(**config)
        assert RandLoRAConfig.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
        randlora.eject(model)


def _is_long(value: Any, depth: int) -> bool:
    if isinstance(value, str):
        return len(value) > LONGEST
    if not isinstance(value, dict | list):
        return False
    entries = [*value, *value.values()] if isinstance(value, dict) else value
    return not depth or len(entries) > MOST or any(_is_long(entry, depth - 1) for entry in entries)


def _names(pattern: Any, fqn: str) -> bool:
    with warnings.catch_warnings(action="ignore"):
        if isinstance(pattern, str):
            return re.fullmatch(pattern, fqn) is not None
    parts = fqn.split(".")
    starts = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(f".{start}".endswith(f".{name}") for start in starts for name in pattern)


def command_line(data: bytes) -> None:
    """Run the command line with arguments that are the lines of ``data``, in a prepared directory."""
    arguments = [os.fsdecode(line) for line in data.replace(b"\0", b"").split(b"\n")][:MOST]
    if any(len(argument) > LONGEST and "(" in argument for argument in arguments):
        return  # a regex of the user's, which may take any time
    no_text = {name.replace("ours", "\udcff"): held for name, held in PREPARED.items() if name.startswith("ours/")}
    with laid_out(PREPARED | no_text) as root:
        before = tree(root)
        with chdir(root), writing_only(root), bounded(*OF_MODELS):
            code, out, err = _run(arguments)
        after = tree(root)
        assert code in {0, 1, 2}, f"exit code {code}"
        assert "Traceback" not in err
        if code:
            refused = "NOT sound" in out or '"passed": false' in out  # which verify prints as a result
            assert after == before, "a command that failed changed files"
            assert err or refused, "a command that failed says nothing"
            assert not out or refused, "a command that failed printed a result"
            return
        lost = {name for name, held in before.items() if after.get(name) != held}
        assert not lost or "--overwrite" in arguments, f"{lost} changed"
        assert out, "a command that worked says nothing"
        if "--json" in arguments and out.startswith("{"):
            assert isinstance(json.loads(out), dict)


def _run(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.BytesIO(), io.BytesIO()
    streams = io.TextIOWrapper(out, "utf-8", "strict"), io.TextIOWrapper(err, "utf-8", "backslashreplace")
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]), warnings.catch_warnings(action="ignore"):
        code = main(arguments)
        for stream in streams:
            stream.flush()
    return code, out.getvalue().decode(), err.getvalue().decode()


class Target(NamedTuple):
    """What `python -m tests.fuzz` runs under a name, which is also the name of the folder with its corpus.

    ``run`` takes an input and raises if a promise is broken; ``mutate`` returns a changed input; ``tried`` is what one
    run is, for the table of `make torture`.
    """

    run: Callable[[bytes], None]
    mutate: Callable[[bytes, Random, MutateBytes], bytes]
    tried: str


SPARE = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md", "base/config.json"]
SPARE += ["base/model.safetensors", "base/model.safetensors.index.json", "base/x/adapter_config.json"]
_archive, _archives = partial(mutate_archive, spare=SPARE[:3]), partial(mutate_archive, spare=SPARE)

TARGETS = {
    "adapter": Target(readers.adapter, _archive, "adapter directories read, rewritten and loaded"),
    "checkpoint": Target(readers.checkpoint, _archives, "base directories verified and merged"),
    "peft_config": Target(readers.peft_config, mutate_file, "JSON files beside tensors of PEFT"),
    "patterns": Target(
        patterns, lambda data, random, _: mutate_file(data, random, bytes), "options planned, injected and ejected"
    ),
    "command_line": Target(command_line, mutate_line, "command lines run"),
}

"""What users write about layers: patterns, names, and options by pattern."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.errors import RandLoRAError
from tests.fuzz.limits import bounded
from tests.fuzz.outcome import outcome
from tests.kit import untouched

LONGEST = 24
"""A regex of the user's may take any time; one of this length over names as short as those below takes little."""

MOST, DEEPEST = 8, 6
LIMITS = (5.0, 400)


def build() -> nn.Module:
    """Build a small model with layers of several kinds under short names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({
            "a": nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 6, bias=False)}),
            "b": nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)),
            "e": nn.Embedding(5, 4),
            "m": nn.MultiheadAttention(4, 2),
            "n": nn.LayerNorm(4),
            "c": nn.Conv1d(4, 4, 3),
            "t": nn.Identity(),
        })


def target(data: bytes) -> None:
    """Plan and inject an adapter with the options of a JSON object, and eject it."""
    try:
        options = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(options, dict) or _is_long(options, DEEPEST):
        return
    options = {
        key: tuple(value) if key == "blocks" and isinstance(value, list) else value for key, value in options.items()
    }
    for reserved in ("model", "config", "self"):
        options.pop(reserved, None)
    model = build()
    with bounded(*LIMITS), untouched(model):
        planned = outcome(partial(randlora.plan, model, **options))
        injected = outcome(partial(randlora.inject, model, **options))
        if isinstance(injected, RandLoRAError):
            # what is drawn is drawn by inject alone
            assert isinstance(planned, type(injected)) or "draw" in str(injected), (
                f"plan: {planned}; inject: {injected}"
            )
            return
        assert not isinstance(planned, RandLoRAError), f"inject adapts what plan refuses: {planned}"
        assert planned.targets == injected.targets
        _check_matches(options, injected.targets)
        config = {key: value for key, value in options.items() if key not in {"name", "active", "trainable"}}
        if config.get("r", 0) is None:  # which means the default of inject alone
            del config["r"]
        whole = RandLoRAConfig(**config)
        assert RandLoRAConfig.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
        randlora.eject(model)


def _is_long(value: Any, depth: int) -> bool:
    """Whether a string is too long for a regex, or a list for this model."""
    if isinstance(value, str):
        return len(value) > LONGEST
    if not isinstance(value, dict | list):
        return False
    entries = [*value, *value.values()] if isinstance(value, dict) else value
    return not depth or len(entries) > MOST * 3 or any(_is_long(entry, depth - 1) for entry in entries)


def _check_matches(options: dict[str, Any], targets: Iterable[str]) -> None:
    """Hold the targets against a matching of this test's own."""
    wanted, left_out = options.get("targets"), options.get("exclude")
    for fqn in targets:
        if wanted is not None and wanted not in ("all", "all-linear"):
            assert _names(wanted, fqn), f"{fqn} is adapted, and {wanted!r} does not match it"
        assert left_out is None or not _names(left_out, fqn), f"{fqn} is adapted, and {left_out!r} matches it"


def _names(pattern: Any, fqn: str) -> bool:
    parts = fqn.split(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(pattern, str):
            return re.fullmatch(pattern, fqn) is not None
    starts = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return any(start == name or start.endswith(f".{name}") for start in starts for name in pattern)

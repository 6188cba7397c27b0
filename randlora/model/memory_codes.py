"""The bytes of quantized weights for `training_memory`: of those that a model has, and of those that it would have."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from randlora.layers.in_place import plain_class
from randlora.layers.linear import Conv1DAdapter, LinearAdapter
from randlora.report import FLOAT32_BYTES
from randlora.targets.census import Census, Site
from randlora.targets.obstacles import tied_names

BLOCK, LEVELS = 64, 16
"""In bitsandbytes, 64 weights share a scale and a layer has 16 levels, both in float32. This is its default; scales may
also be quantized."""


def held_codes(census: Census) -> dict[str, int]:
    """Return the bytes of the quantized weights of a model, with their scales, by the FQN of a parameter."""
    fqns = {id(held.parameter): held.fqn for held in reversed(census.parameters)}
    sites = (site for site in census.sites if site.layer_class.is_quantized and id(site.weight) in fqns)
    return {fqns[id(site.weight)]: site.layer_class.nbytes_of(site.owner) for site in sites}


def planned_codes(census: Census) -> dict[str, int]:
    """Return the bytes that weights would have that transformers loads in 4 bits, with their scales, by FQN."""
    return {f"{site.fqn}.weight": _nbytes_in_4bit(math.prod(site.shape)) for site in _loaded_in_4bit(census)}


def _nbytes_in_4bit(count: int) -> int:
    return math.ceil(count / 2) + FLOAT32_BYTES * (math.ceil(count / BLOCK) + LEVELS)


def _loaded_in_4bit(census: Census) -> list[Site]:
    """Return the linear layers but for the head, the last layer, tied ones, and what the class keeps in float32."""
    last = census.parameters[-1].fqn.removesuffix(".weight") if census.parameters else ""
    kept: Any = getattr(census.model, "_keep_in_fp32_modules", None)
    names = [last, *(kept or ())]
    sites = [site for site in census.sites if _is_linear(site.owner, site) and site.owner is not census.head]
    tied = tied_names(census, sites)
    return [
        site
        for site in sites
        if site.key not in tied
        and not any(site.fqn.endswith(name) or f"{site.fqn}.".startswith(f"{name}.") for name in names)
    ]


def _is_linear(owner: nn.Module, site: Site) -> bool:
    kind = site.layer_class
    return issubclass(kind, Conv1DAdapter) or (
        plain_class(owner) is nn.Linear and (issubclass(kind, LinearAdapter) or kind is LinearAdapter.as_read)
    )

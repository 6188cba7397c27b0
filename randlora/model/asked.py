"""The config that the arguments of a call ask for: a config, or single options, or else what is meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from randlora.bases.spec import KINDS
from randlora.config import LARGEST_RANK, OPTIONS, RandLoRAConfig
from randlora.errors import ConfigError, spelled
from randlora.hints import shortly


def one_config(arguments: Mapping[str, Any]) -> RandLoRAConfig:
    """Return the config among the arguments of `inject`, or one of its options; with ``like_lora`` r is chosen later.

    Arguments that are no options of the table are ignored.
    """
    config, r, like_lora = (arguments.get(name) for name in ("config", "r", "like_lora"))
    for option, value in (("r", r), ("config", config)):
        if _is_of_peft(value):
            raise ConfigError(f"{option} is a {type(value).__name__} of PEFT: give options by name, {_call_for(value)}")
    if isinstance(r, RandLoRAConfig):
        raise ConfigError("r is a RandLoRAConfig: give it by name, randlora.inject(model, config=config)")
    given = {name: arguments[name] for name in OPTIONS if name in arguments and (name != "r" or r is not None)}
    if like_lora is not None:
        if r is not None or config is not None:
            other = spelled("r") if config is None else "config=, which has an r"
            raise ConfigError(f"give {spelled('like_lora')} or {other}, not both")
        if not (type(like_lora) is int and 0 < like_lora <= LARGEST_RANK):
            raise ConfigError(f"like_lora must be the rank of a LoRA, a positive integer, got {shortly(like_lora)}")
        given["r"] = _multiple_of(given.get("blocks"))
    built = RandLoRAConfig(**given)
    if config is None:
        return built
    if not isinstance(config, RandLoRAConfig):
        raise ConfigError(f"config must be a RandLoRAConfig, got {type(config).__name__}: give options by name instead")
    if r is not None or built != RandLoRAConfig():
        raise ConfigError(
            "give either config= or single options, not both: dataclasses.replace(config, r=16) changes one"
        )
    return config


def _multiple_of(blocks: Any) -> int:
    """Return an r that blocks divide, of which the r that is chosen later is a multiple."""
    if not (isinstance(blocks, tuple | list) and all(type(count) is int and count > 0 for count in blocks)):
        return 1
    if (least := math.lcm(*blocks)) > LARGEST_RANK:
        raise ConfigError(f"like_lora needs an r that both blocks divide, and none up to {LARGEST_RANK} is one")
    return least


def _is_of_peft(value: object) -> bool:
    """Whether a value is a config of PEFT, which is not imported."""
    return type(value).__module__.startswith("peft.") and hasattr(value, "target_modules")


def _call_for(config: Any) -> str:
    """Return the call of `inject` that is nearest to a config of PEFT."""
    own = vars(config)
    by_name = {
        option.name: [name for name in (option.peft, *option.meant) if name in own] for option in OPTIONS.values()
    }
    given = {name: own[theirs[0]] for name, theirs in by_name.items() if theirs}
    if is_lora := "lora_alpha" in own:  # whose r and alpha are others
        del given["r"], given["alpha"]
    else:
        flags = own["sparse"] and not own["very_sparse"], own["very_sparse"]
        given["basis"] = next(name for name, kind in KINDS.items() if kind.peft_flags == flags)
    listed = {name: sorted(value) if isinstance(value, set) else value for name, value in given.items()}
    words = ["model", *(f"{name}={value!r}" for name, value in listed.items() if value)]
    if is_lora:
        words.append(f"alpha=randlora.equivalent_alpha({own['r']}, {own['lora_alpha']})")
    return f"randlora.inject({', '.join(words)})"

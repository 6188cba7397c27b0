"""Adapters of other libraries that a model has already."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

LIBRARIES = {"peft": "PEFT", "loralib": "loralib", "lycoris": "LyCORIS"}
"""Names of libraries of adapters, by their package."""

PARTS = frozenset({"lora_A", "lora_B", "lora_a", "lora_b", "lora_down", "lora_up", "vera_A", "vera_B"})
"""Names of modules that hold a matrix of an adapter, in whatever library or code of one's own."""


def foreign_adapters(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Return a message for each library that has adapters in a model, given the model's modules by FQN."""
    found: dict[str, list[str]] = {}
    kinds: dict[type, str | None] = {}
    for fqn, module in modules:
        kind = type(module)
        if kind not in kinds:
            packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
            kinds[kind] = next((package for package in packages if package in LIBRARIES), None)
        if (package := kinds[kind]) is not None:
            found.setdefault(package, []).append(f"{fqn or 'the model itself'} ({kind.__module__}.{kind.__name__})")
    return [
        f"the model has adapters of {LIBRARIES[package]}: {', '.join(places[-2:])}"
        f"{f' and {len(places) - 2} more modules' if len(places) > 2 else ''}; they would be frozen, and their "
        "matrices are no layers of the model: merge or remove them first, as with merge_and_unload() or unload() of a "
        "PeftModel, or build the model anew; a RandLoRA adapter of PEFT can be saved there and read with randlora.load"
        for package, places in found.items()
    ]


def is_part(fqn: str) -> bool:
    """Whether a module is, or lies within, one that holds a matrix of an adapter, by its name."""
    return not PARTS.isdisjoint(fqn.split("."))

"""Attention of diffusers that has joined its projections: ``fuse_qkv_projections()`` makes one layer of several.

An adapter of a layer in whose place another one is called would be a silent no-op.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from randlora.errors import AdapterError
from randlora.layers.in_place import adapter_layers_of, plain_class

ATTENTION = "diffusers.models.attention.AttentionModuleMixin"
OLDER_ATTENTION = "diffusers.models.attention_processor.Attention"

JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""The names of joined projections, and those of the layers that they are made of."""


def can_join(module: nn.Module) -> bool:
    """Whether a module is an attention of diffusers."""
    return ATTENTION in _parents(module) or OLDER_ATTENTION in _parents(module)


def left_by_joining(attention: Any) -> Iterator[tuple[nn.Module, str]]:
    """Go through the projections that an attention does not call, each with the reason, a phrase after its name.

    After ``fuse_qkv_projections()`` these are the single ones. An older kind of attention keeps the joined ones after
    ``unfuse_qkv_projections()``, and its processor decides. No other module has any.
    """
    held = attention._modules
    if not any(joined in held for joined in JOINED) or not can_join(attention):
        return
    is_older = OLDER_ATTENTION in _parents(attention)
    is_fused = type(attention.processor).__name__.startswith("Fused") if is_older else attention.fused_projections
    for joined, parts in JOINED.items():
        if all(held.get(name) is not None for name in (joined, *parts)):
            unused, used = (parts, joined) if is_fused else ((joined,), ", ".join(parts))
            reason = f"is not called, because {plain_class(attention).__name__} calls {used} instead"
            yield from ((held[name], reason) for name in unused)


def require_called(attention: nn.Module, args: Any) -> None:  # noqa: ARG001  # a hook's signature
    """Check that an attention calls its adapted projections; a hook of one that has some.

    Raises:
        AdapterError: If it has joined them, or taken them apart, since they were adapted.
    """
    for child, reason in left_by_joining(attention):
        if adapter_layers_of(child):
            name = next(name for name, held in attention._modules.items() if held is child)
            raise AdapterError(
                f"{name} is adapted and {reason}: undo fuse_qkv_projections() or unfuse_qkv_projections(), which was "
                "called since, or eject the adapters first and adapt the layers that are called"
            )


def _parents(module: nn.Module) -> list[str]:
    return [f"{parent.__module__}.{parent.__qualname__}" for parent in type(module).__mro__]

"""Checking the calls of a model with adapters: for names that it would ignore, and for layers that are not called."""

from __future__ import annotations

from typing import Any

from torch import nn

from randlora.errors import AdapterError
from randlora.layers.joined import can_join, require_called
from randlora.targets.walk import Census

ARGUMENT = "adapter_names"
"""What PEFT calls the names in a call of a model. Models of transformers accept any argument and ignore this one."""


def check_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001  # a hook's signature
    """Check a call of a model with adapters, before its forward; a hook of the module that has them.

    Raises:
        AdapterError: If the call names adapters, which no model would use.
    """
    if ARGUMENT in kwargs:
        raise AdapterError(
            f"{ARGUMENT} has no effect on this model: call it inside `with randlora.serving.routed(model, names):`, "
            "which takes a name for each row"
        )


def watch_calls(root: nn.Module) -> None:
    """Check the calls of a module from now on."""
    root.register_forward_pre_hook(check_call, with_kwargs=True, prepend=True)


def watch_attention(census: Census) -> None:
    """Check in the calls of attention that it calls the projections that are adapted; see `randlora.layers.joined`."""
    for module in census.around_adapted:
        if can_join(module) and require_called not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(require_called)


def unwatch_attention(census: Census) -> None:
    """Remove the hooks of `watch_attention`."""
    for module in census.modules:
        for number in [number for number, hook in module._forward_pre_hooks.items() if hook is require_called]:
            del module._forward_pre_hooks[number]


def unwatch_calls(root: nn.Module) -> None:
    """Remove the hook, which a copy of the module has too."""
    for number in [number for number, hook in root._forward_pre_hooks.items() if hook is check_call]:
        del root._forward_pre_hooks[number], root._forward_pre_hooks_with_kwargs[number]

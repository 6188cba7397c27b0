"""Counting each call of a model with adapters, and checking it for names that it would ignore."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from randlora.errors import AdapterError
from randlora.layers.joined import can_join, require_called
from randlora.state import attached_state
from randlora.targets.walk import Census

ARGUMENT = "adapter_names"
"""What PEFT calls the names in a call of a model. Models of transformers accept any argument and ignore this one."""


def check_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001  # as below
    """Count and check a call of a model with adapters, before its forward; a hook of the module that has them.

    Raises:
        AdapterError: If the call names adapters, which no model would use.
    """
    state = attached_state(root)
    if state is not None and not torch.compiler.is_compiling():
        state.forwards.begin()
    if ARGUMENT in kwargs:
        raise AdapterError(
            f"{ARGUMENT} has no effect on this model: call it inside `with randlora.routed(model, names):`, which "
            "takes a name for each row"
        )


def end_call(root: nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG001  # a hook's signature
    """Count the end of a call, also of one that has raised; a hook of the module that has the adapters."""
    state = attached_state(root)
    if state is not None and not torch.compiler.is_compiling():
        state.forwards.end()


def watch_calls(root: nn.Module) -> None:
    """Check and count the calls of a module from now on."""
    root.register_forward_pre_hook(check_call, with_kwargs=True, prepend=True)
    root.register_forward_hook(end_call, always_call=True)


def watch_attention(census: Census) -> None:
    """Check in the calls of attention that it calls the projections that are adapted; see `randlora.layers.joined`."""
    for module in census.around_adapted:
        if can_join(module) and require_called not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(require_called)


def unwatch_attention(census: Census) -> None:
    """Remove the hooks of `watch_attention`."""
    for module in (census.model, *(visit.module for visit in census.first_visits)):
        for number in [number for number, hook in module._forward_pre_hooks.items() if hook is require_called]:
            del module._forward_pre_hooks[number]


def unwatch_calls(root: nn.Module) -> None:
    """Remove the hooks, which a copy of the module has too."""
    for number in [number for number, hook in root._forward_pre_hooks.items() if hook is check_call]:
        del root._forward_pre_hooks[number], root._forward_pre_hooks_with_kwargs[number]
    for number in [number for number, hook in root._forward_hooks.items() if hook is end_call]:
        del root._forward_hooks[number], root._forward_hooks_always_called[number]

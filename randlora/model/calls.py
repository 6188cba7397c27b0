"""Watching the calls of a model with adapters: of which modules, and for names and layers that they would ignore."""

from __future__ import annotations

from typing import Any

from torch import nn

from randlora.errors import AdapterError
from randlora.layers.in_place import adapter_layers_of
from randlora.layers.joined import can_join, require_called
from randlora.layers.read_weight import ReadWeight
from randlora.layers.scopes import begin_call, end_call
from randlora.replaced import CASTS
from randlora.targets.match import prefixes
from randlora.targets.walk import Census

ARGUMENT = "adapter_names"
"""What PEFT calls the names in a call of a model. Models of transformers accept any argument and ignore this one."""


NUMBER = int.from_bytes(b"randlora", "big")
"""The number of these hooks in each module: where torch counts, compiled code of a module would not fit another."""


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
    """Check and count the calls of a module from now on."""
    root.register_forward_pre_hook(check_call, with_kwargs=True, prepend=True)
    _count(root)


def watch_reads(census: Census) -> None:
    """Watch the calls of the modules that have a weight that is read, or that are around one, and no others' any more.

    See `randlora.layers.scopes`. Those of the model itself are watched by `watch_calls`.
    """
    around = {name for visit in census.visits if _is_read(visit.module) for name in prefixes(visit.fqn)}
    inside = {id(visit.module) for visit in census.visits if visit.fqn in around}
    for module in {visit.module: None for visit in census.visits}:
        if id(module) not in inside:
            _remove(module, begin_call, end_call)
        else:
            _count(module)


def _count(module: nn.Module) -> None:
    module._forward_pre_hooks[NUMBER], module._forward_hooks[NUMBER] = begin_call, end_call
    module._forward_hooks_always_called[NUMBER] = True


def _is_read(module: nn.Module) -> bool:
    """Whether code reads a weight of a module as something else than the parameter."""
    return CASTS in vars(module) or any(isinstance(each, ReadWeight) for each in adapter_layers_of(module).values())


def watch_attention(census: Census) -> None:
    """Check in the calls of attention that it calls the projections that are adapted; see `randlora.layers.joined`."""
    for module in census.around_adapted:
        if can_join(module) and require_called not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(require_called)


def unwatch_attention(census: Census) -> None:
    """Remove the hooks of `watch_attention`."""
    for module in census.modules:
        _remove(module, require_called)


def unwatch_calls(root: nn.Module) -> None:
    """Remove the hooks, which a copy of the module has too."""
    _remove(root, check_call, begin_call, end_call)


def _remove(module: nn.Module, *hooks: Any) -> None:
    """Remove functions from the hooks of a module, which may be a copy, of which no handle is known."""
    for held in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in held.items() if hook in hooks]:
            del held[number]
            for options in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                options.pop(number, None)

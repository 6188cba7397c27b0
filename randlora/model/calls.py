"""Watching the calls of a model with adapters: which are running, and arguments that the model would ignore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from randlora.errors import AdapterError
from randlora.layers.in_place import adapter_layers_of
from randlora.layers.scopes import begin_call, end_call
from randlora.replaced import CASTS
from randlora.targets.census import Census
from randlora.targets.match import prefixes

ARGUMENT = "adapter_names"
"""PEFT's argument for adapter names in a call. Models of transformers accept any argument and ignore this one."""

NUMBER = int.from_bytes(b"randlora", "big")
"""The fixed number of counting hooks in each module. If torch numbered them, compiled code would not be shared."""

Check = Callable[[nn.Module, Any], None]

_checks: dict[Check, Callable[[nn.Module], bool]] = {}


def register_check(where: Callable[[nn.Module], bool]) -> Callable[[Check], Check]:
    """Register a check of calls of modules that contain adapted ones; a decorator of a forward pre-hook."""

    def register(check: Check) -> Check:
        _checks[check] = where
        return check

    return register


def check_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001  # a hook's signature
    """Check a call of a model with adapters, before its forward. Used as a hook.

    Raises:
        AdapterError: If the call names adapters, because models ignore this argument.
    """
    if ARGUMENT in kwargs:
        raise AdapterError(
            f"{ARGUMENT} has no effect on this model: call the model inside `with randlora.serving.routed(model, "
            "names):`, which takes a name for each row"
        )


def watch(census: Census) -> None:
    """Watch the calls of a model with adapters, and of those modules in it for which a check is registered.

    Calls of modules around a weight that is read are counted: see `randlora.layers.scopes`.
    """
    root = census.model
    if check_call not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(check_call, with_kwargs=True, prepend=True)
    for module in census.around_adapted:
        for check, where in _checks.items():
            if where(module) and check not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(check)
    _count(census)


def unwatch(census: Census) -> None:
    """Stop watching a model without adapters, except modules in which a parameter is still cast as it is read."""
    for module in census.modules:
        _remove(module, check_call, *_checks)
    _count(census)


def _count(census: Census) -> None:
    read = [visit for visit in census.visits if _is_read(visit.module)]
    around = {name for visit in read for name in prefixes(visit.fqn)[:-1]}
    inside = {visit.module for visit in census.visits if visit.fqn in around}
    # their own calls too where the forward is not ours: beside a copy that is cast, or set on the module
    inside.update(visit.module for visit in read if vars(visit.module).keys() & {CASTS, "forward"})
    if around or census.adapted:
        inside.add(census.model)
    for module in census.modules:
        if module not in inside:
            _remove(module, begin_call, end_call)
        elif NUMBER not in module._forward_hooks:
            module._forward_pre_hooks[NUMBER], module._forward_hooks[NUMBER] = begin_call, end_call
            module._forward_hooks_always_called[NUMBER] = True


def _is_read(module: nn.Module) -> bool:
    """Whether code reads a weight of a module as something else than the parameter."""
    return CASTS in vars(module) or any(layer.is_read for layer in adapter_layers_of(module).values())


def _remove(module: nn.Module, *hooks: Any) -> None:
    """Remove functions from the hooks of a module, which may be a copy, of which no handle is known."""
    for held in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in held.items() if hook in hooks]:
            del held[number]
            for options in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                options.pop(number, None)

"""What trainers check as training begins: that the optimizer trains the adapter, at a rate near the report's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from randlora.errors import AdapterError, warn
from randlora.model.listing import adapter_parameters
from randlora.report import adapter_report
from randlora.state import adapted_root
from randlora.targets.census import Census, shapes_of

NEAR = 1 / 20, 3.0
"""The smallest and the largest rate that are not warned of, over the report's. Long runs may need a tenth of it."""


def check_optimizers(model: nn.Module, optimizers: Iterable[Any], *, is_supervised: bool = True) -> None:
    """Warn if an Adam's learning rate is far from the one that the report of `randlora.inject` names.

    Warn too if optimizers have the parameters of an adapter that was removed, or lack those of one of several.
    Preferences and rewards need lower rates, which are not warned of.

    Raises:
        AdapterError: If the optimizers have frozen parameters in place of the adapters', as if made before these.
    """
    found = [*map(_innermost, optimizers)]
    groups = [group for optimizer in found for group in optimizer.param_groups]
    root, state = adapted_root(model)
    census, held = Census.of(root), {id(parameter) for group in groups for parameter in group["params"]}
    every = {name: adapter_parameters(census, adapter) for name, adapter in state.adapters.items()}
    trained = {name: own for name, whole in every.items() if (own := [each for each in whole if each.requires_grad])}
    is_theirs = any(id(each) in held for own in trained.values() for each in own)  # else perhaps an engine's copies
    if not is_theirs and any(id(each.tensor) in held for each in census.parameters if not each.tensor.requires_grad):
        raise AdapterError(
            "the optimizer has frozen parameters and none of an adapter, so it is older than these: make one "
            "of randlora.trainable_parameters(model), after randlora.inject"
        )
    shapes = sorted(tuple(each.shape) for group in groups for each in group["params"])
    own_shapes = sorted(tuple(each.shape) for own in trained.values() for each in own)
    if not is_theirs and groups and shapes == own_shapes:
        warn(
            "the optimizer's parameters are those of an adapter that the model no longer has: make one of "
            "randlora.trainable_parameters(model)"
        )
    elif is_theirs and (without := [name for name, own in trained.items() if held.isdisjoint(map(id, own))]):
        named = ", ".join(without)
        warn(f"the optimizer does not train {named}: make one of all trainable_parameters, or call set_trainable")
    kinds = [type(optimizer).__name__.lower() for optimizer in found]
    if not groups or not all("adam" in kind and "muon" not in kind for kind in kinds):
        return  # for which the report names no rate
    rates = [max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group) for group in groups]
    for name in trained:
        sites = [site for site in census.adapted if name in site.layer.adapters and not site.layer.is_rows]
        adapter = state.adapters[name]
        first = (sites and adapter_report(census, adapter, shapes_of(sites, adapter.config)).learning_rate) or 0.0
        named = f"{first:.2g}, which the report of adapter {name!r} names"
        if is_supervised and max(rates) < first * NEAR[0]:
            warn(f"learning rate {max(rates):.2g} is far below {named}: it will learn little")
        elif min(rates) > first * NEAR[1] > 0:
            warn(f"learning rate {min(rates):.2g} is far above {named}: training may diverge")


def _innermost(optimizer: Any) -> Any:
    """Return what wrappers of accelerate and DeepSpeed step."""
    while (inner := vars(optimizer).get("optimizer")) is not None:
        optimizer = inner
    return optimizer

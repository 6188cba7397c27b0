"""Parameters of which `FullyShardedDataParallel`, the first FSDP, leaves each process a part, flattened with others.

They are whole in a block of its ``summon_full_params`` only. Outside of one, the part of a small parameter may have all
of its values in one process and none in another, so that a shape does not tell: the wrapper's state does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from randlora.places import Keeper, register_keeper

FLATTENED = "_fsdp_flattened"
"""An attribute that FSDP sets on parameters, of which it leaves a flat part or nothing."""

WHOLE = "FullyShardedDataParallel.summon_full_params"


def flattening(model: nn.Module) -> Iterator[Any]:
    """Yield the `FullyShardedDataParallel` wrappers in a model, itself included."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FullyShardedDataParallel", ())
    return (each for each in model.modules() if isinstance(each, kind))


def _is_whole(wrapper: Any) -> bool:
    names = wrapper.sharding_strategy.name, wrapper.training_state.name
    return "NO_SHARD" in names or "SUMMON_FULL_PARAMS" in names


@register_keeper
class Flattening(Keeper):
    """Keeps parameters in flat shards, and lends whole ones to a block."""

    def lent(self, tensor: Tensor) -> str | None:
        """Return in which block a flattened parameter is whole."""
        return f"it is sharded by FSDP: call this inside {WHOLE}(model)" if FLATTENED in vars(tensor) else None

    def withheld(self, model: nn.Module) -> str | None:
        """Return why the values of flattened parameters are not here."""
        wrappers = [*flattening(model)]
        if any(not _is_whole(each) for each in wrappers):
            return (
                "FullyShardedDataParallel leaves each process a part of the values: call and iterate, in every "
                f"process, in a block of {WHOLE}(model), or shard the model by fully_shard instead"
            )
        around = {id(parameter) for each in wrappers for parameter in each.parameters()}
        if any(FLATTENED in vars(each) and id(each) not in around for each in model.parameters()):
            return (
                "FullyShardedDataParallel may leave each process a part of the values, which only its wrapper tells: "
                f"give the wrapper instead of the model in it, in a block of {WHOLE}(wrapper)"
            )
        return None

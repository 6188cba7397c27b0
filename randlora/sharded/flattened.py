"""Parameters that `FullyShardedDataParallel`, the first FSDP, flattens together and splits over processes.

They are whole only in a block of its ``summon_full_params``. Outside, a small parameter may have all of its values on
one process and none on another, so that the wrapper's state has to tell, not a shape.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from randlora.places import Keeper, register_keeper

FLATTENED = "_fsdp_flattened"
"""An attribute that FSDP sets on parameters that it flattens."""

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
    """Keeps parameters in flat shards, and lends whole parameters to a block."""

    def lent(self, tensor: Tensor) -> str | None:
        """Return the block in which a flattened parameter is whole."""
        return f"it is sharded by FSDP: call this inside {WHOLE}(model)" if FLATTENED in vars(tensor) else None

    def withheld(self, model: nn.Module) -> str | None:
        """Return why the values of flattened parameters are not here."""
        wrappers = [*flattening(model)]
        if any(not _is_whole(each) for each in wrappers):
            return (
                "FullyShardedDataParallel leaves each process only a part of the values: call and iterate in a block "
                f"of {WHOLE}(model), in every process, or shard the model with fully_shard instead"
            )
        around = {id(parameter) for each in wrappers for parameter in each.parameters()}
        if any(FLATTENED in vars(each) and id(each) not in around for each in model.parameters()):
            return (
                "FullyShardedDataParallel may leave each process only a part of the values, and only its wrapper can "
                f"tell: give the wrapper instead of the model in it, in a block of {WHOLE}(wrapper)"
            )
        return None

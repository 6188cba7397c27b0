"""A weight that other code reads, such as an attention's or the experts': it is adapted as it is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.update import folded, sum_updates


class ReadWeight(AdapterLayer):
    """Adapts a parameter that code outside of its owner's forward, or its owner's own, reads by name.

    Reading it gives weight + update while adapters act, and the parameter itself otherwise. The update is formed for
    what is read and when it is read. The owner's ``state_dict`` and ``parameters()`` hold the parameter itself.
    """

    @classmethod
    def site_fqn(cls, owner_fqn: str) -> str:
        """Return the name of the weight on disk: the parameter's own."""
        return f"{owner_fqn}.{cls.attribute}"

    @classmethod
    def parameter_names(cls) -> tuple[str, str]:
        """Return the names under which the owner, which may hold several such weights, holds Λ and Γ."""
        return f"{cls.attribute}_randlora_lambda", f"{cls.attribute}_randlora_gamma"

    def read(self, owner: nn.Module) -> Tensor:
        """Return what reading the weight gives at this moment, in the layout and dtype of the weight."""
        weight = self.weight_of(owner)
        assert weight is not None, "obstacles() asks for a weight"
        active = self.active()
        if not active:
            return weight
        updates = [self.update(owner, adapter, factor) for adapter, factor in active]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return folded(
            weight, self.in_storage_layout(sum_updates(updates, self.shape, device=weight.device, dtype=dtype))
        )

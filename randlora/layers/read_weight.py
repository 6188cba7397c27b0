"""Base class of adapter layers for weights that other code reads, such as those of attention or experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.update import folded, sum_updates


class ReadWeight(AdapterLayer):
    """Adapts a parameter that code reads by name, in the owner's forward or elsewhere.

    Reading the attribute returns weight + update while adapters are active, and the parameter otherwise. The update is
    computed on each read. ``state_dict()`` and ``parameters()`` of the owner return the parameter.
    """

    @classmethod
    def site_fqn(cls, owner_fqn: str) -> str:
        """Return the name of the weight in files: the FQN of the parameter, or of the module for its ``weight``."""
        return owner_fqn if cls.attribute == "weight" else f"{owner_fqn}.{cls.attribute}"

    @classmethod
    def parameter_names(cls) -> tuple[str, str]:
        """Return the names of Λ and Γ on the owner, which may have several such weights."""
        if cls.attribute == "weight":
            return super().parameter_names()
        return f"{cls.attribute}_randlora_lambda", f"{cls.attribute}_randlora_gamma"

    def read(self, owner: nn.Module) -> Tensor:
        """Return the value of the attribute, in the shape and dtype of the weight."""
        weight = self.weight_of(owner)
        assert weight is not None, "obstacles() asks for a weight"
        active = self.active()
        if not active:
            return weight
        updates = [self.update(owner, part, factor) for part, factor in active]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = sum_updates(updates, self.shape, device=weight.device, dtype=dtype, united=self.united)
        return folded(weight, self.in_storage_layout(delta))

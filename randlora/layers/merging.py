"""Merging updates into one weight, and restoring it. The original is kept wherever the weight's values are."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from randlora.layers.stored import StoredWeight
from randlora.layers.update import Into, Merged, Update
from randlora.places import Kept, place_of
from randlora.ranks import run_collectives


class MergeableWeight(StoredWeight):
    """A weight of a module that updates can be merged into, reversibly or for good.

    Attributes:
        unmerged: The original weight while it is merged into.
    """

    unmerged: Kept | None = None

    @abstractmethod
    def whole_updates(self, owner: nn.Module, weights: dict[str, float]) -> list[Update]:
        """Return the updates of some adapters with all values of Λ and Γ; a collective if these are sharded."""

    def merge_obstacle(self, owner: nn.Module, into: Into | None) -> str | None:  # noqa: ARG002  # for quantized layers
        """Return why this weight cannot be merged into, as a phrase that follows its name, or ``None``.

        If ``into`` is ``None``, the merged weight is only computed, and the owner does not change.
        """
        return None

    def written_out(self, owner: nn.Module) -> Tensor:
        """Return the owner's weight without any update, dequantized if it is quantized."""
        weight = self.weight_of(owner)
        assert weight is not None, "the caller asks for a weight"
        return weight.detach()

    @classmethod
    def bias_of(cls, owner: nn.Module) -> Tensor | None:
        """Return the bias that the owner adds to the product, if any."""
        return owner._parameters.get("bias")

    def compute_dtype(self, owner: nn.Module) -> torch.dtype | None:  # noqa: ARG002  # for quantized layers
        """Return the dtype that the layer computes in, or ``None`` for the dtype of its input."""
        return None

    @torch.no_grad()
    def merged(self, owner: nn.Module, weights: dict[str, float], into: Into) -> Merged:  # noqa: ARG002  # for quantized layers
        """Return the weight plus the updates of some adapters, added in float32 or wider and rounded once.

        If it is merged already, the updates are added to the original weight. For a sharded weight the result is the
        part that this process holds. A collective if Λ and Γ are sharded.

        Args:
            owner: The adapted module, which is not changed.
            weights: Adapter names and factors.
            into: What a quantized layer becomes.
        """
        weight, place = self.weight_of(owner), place_of(owner, self.attribute)
        assert weight is not None, "merge() asks for a weight"
        updates, own = run_collectives([partial(self.whole_updates, owner, weights), place.read])
        if self.unmerged is not None:  # then it is plain
            own = self.unmerged.values.to(device=weight.device, dtype=weight.dtype)
        part, shape = place.part, tuple(weight.shape)
        return Merged(self.part_with_updates(own, part, shape, updates) if part else self.with_updates(own, updates))

    def fold(self, owner: nn.Module, merged: Merged) -> None:
        """Replace the owner's weight by a merged one and keep the original in `unmerged`."""
        place = place_of(owner, self.attribute)
        if self.unmerged is None:
            self.unmerged = place.keep()  # before the values change, so that `unfold` can undo that
        place.write(merged.weight)

    def keep_merged(self, owner: nn.Module) -> None:
        """Make a merge permanent: the original parameter, which an optimizer may hold, gets the merged values."""
        assert self.unmerged is not None, "it was merged into"
        (own, place), self.unmerged = self.unmerged, None
        if place is None and not own.is_inference():  # whose data cannot be set: it would be of both modes
            merged = self.weight_of(owner)
            assert merged is not None, "it was merged into"
            own.data = merged.data
            owner._parameters[self.attribute] = own

    def save_unmerged(self, owner: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the original weight into a state dict that has the merged one, on its device and in its dtype."""
        weight = self.weight_of(owner)
        assert weight is not None, "it was merged into"
        assert self.unmerged is not None, "it was merged into"
        if (own := self.unmerged.stored(place_of(owner, self.attribute))) is not None:
            destination[f"{prefix}{self.attribute}"] = own.detach().to(device=weight.device, dtype=weight.dtype)

    @torch.inference_mode(mode=False)  # the weight must not be an inference tensor
    def unfold(self, owner: nn.Module) -> None:
        """Restore the original weight bit for bit, on the device and in the dtype that the owner has now."""
        if self.unmerged is not None:
            self.unmerged.put_back(place_of(owner, self.attribute))
            self.unmerged = None

"""How one kind of layer stores the weight that is adapted, and the arithmetic of merging updates into it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from randlora.bases.spec import Shape
from randlora.config import RandLoRAConfig
from randlora.functional.region import Region, Spans
from randlora.layers.update import Update, folded, sum_updates
from randlora.places import Part, Place, is_hooked, place_at, place_of


class StoredWeight(ABC):
    """How one kind of layer stores its weight, a named parameter of the module. Used as a class; it has no state.

    Attributes:
        attribute: The name of the parameter.
        is_transposed: Whether the weight is stored as ``(in_features, out_features)``, or as a stack of such matrices.
        is_quantized: Whether the module holds codes instead of the values of the weight.
        is_forward_only: Whether only the module's forward reads the codes, so that there is no weight to merge into.
    """

    attribute: ClassVar[str] = "weight"
    is_transposed: ClassVar[bool] = False
    is_quantized: ClassVar[bool] = False
    is_forward_only: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)`` of a module's weight, even if it has no values.

        For a stack of matrices these are the features of one of them.
        """

    @staticmethod
    @abstractmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return an update, as `as_one_matrix` returns it, in the layout of the owner's weight.

        The result has the shape of the weight, a shape that broadcasts to it, or the shape of the weight viewed as a
        matrix.
        """

    @staticmethod
    def as_one_matrix(delta: Tensor) -> Tensor:
        """Return an update in a form in which updates of one weight that differ in shape can be added."""
        return delta

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this module cannot be adapted, as a phrase that follows its name, or ``None``."""
        weight = cls.weight_of(owner)  # not the attribute, whose value may include updates
        assert weight is not None, "obstacles() asks for a weight"
        if weight.dtype.is_floating_point and weight.dtype.itemsize > 1:  # torch does not add 8-bit numbers
            return None
        return f"has a weight of {weight.dtype}, expected a floating dtype of 16 bits or more: dequantize it first"

    @classmethod
    def shape_of(cls, owner: nn.Module, config: RandLoRAConfig) -> Shape:  # noqa: ARG003  # for stacks of matrices
        """Return the shape of the update of an adapter with these options: ``(out_features, in_features)``.

        For a stack of matrices, each with its own Λ and Γ, the number of matrices comes first.
        """
        in_features, out_features = cls.features(owner)
        return out_features, in_features

    @classmethod
    def weight_of(cls, owner: nn.Module) -> Tensor | None:
        """Return the owner's parameter without any update, or ``None`` if it is computed from others.

        For codes that are held under another name, that is the tensor that has them.
        """
        held = owner._parameters
        return held[cls.attribute] if cls.attribute in held else None  # noqa: SIM401  # ZeRO-3 does not see a get()

    @classmethod
    def nbytes_of(cls, owner: nn.Module) -> int:
        """Return the bytes of the owner's weight as it is held, with the scales of its codes."""
        weight = cls.weight_of(owner)
        return 0 if weight is None else weight.nbytes

    @classmethod
    def place_in(cls, owner: nn.Module) -> Place:
        """Return where the values of the owner's weight are."""
        return place_of(owner, cls.attribute)

    @classmethod
    def site_fqn(cls, owner_fqn: str) -> str:
        """Return the name of the weight in files: the FQN of the parameter, or of the module for its ``weight``."""
        return owner_fqn if cls.attribute == "weight" else f"{owner_fqn}.{cls.attribute}"

    @classmethod
    def parameter_names(cls) -> tuple[str, str]:
        """Return the names under which the owner, which may have several such weights, holds Λ and Γ."""
        prefix = "" if cls.attribute == "weight" else f"{cls.attribute}_"
        return f"{prefix}randlora_lambda", f"{prefix}randlora_gamma"

    @classmethod
    def device_beside(cls, owner: nn.Module) -> torch.device:
        """Return the device of Λ and Γ: the weight's device, or the CPU if accelerate offloads the weight."""
        weight = cls.weight_of(owner)
        assert weight is not None, "obstacles() asks for a weight"
        return torch.device("cpu") if cls.is_offloaded(owner) else weight.device

    @classmethod
    def is_offloaded(cls, owner: nn.Module) -> bool:
        """Whether accelerate offloads the weight and loads it for each forward."""
        weight = cls.weight_of(owner)
        return weight is not None and weight.is_meta and is_hooked(owner)

    @classmethod
    def with_updates(cls, weight: Tensor, updates: Sequence[Update], region: Region | None = None) -> Tensor:
        """Return a weight of this kind plus some updates of it, added in float32 or wider and rounded once.

        This is the arithmetic of merging, in memory and on disk.

        Args:
            weight: The weight, or the part of it within the region.
            updates: The updates of the whole weight.
            region: The part of the weight that is given, from `region_of`; ``None`` for all of it.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = cls.summed(updates, region, device=weight.device, dtype=dtype)
        return folded(weight, cls.in_storage_layout(delta))

    @classmethod
    def part_with_updates(cls, own: Tensor, part: Part, shape: Shape, updates: Sequence[Update]) -> Tensor:
        """Return a part of the weight plus that part of some updates, added as `with_updates` does.

        Args:
            own: The part, in the layout of the weight.
            part: Which entries of each dimension of the weight it has.
            shape: The shape of the whole weight, as stored.
            updates: The updates, with all of Λ and Γ.
        """
        if not own.numel():
            return own
        return cls.with_updates(own, updates, cls.region_of(shape, part))

    @classmethod
    def summed(
        cls, updates: Iterable[Update], region: Region | None, *, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return the sum of some updates, `as_one_matrix`, or of their parts within a region, computed alone."""
        parts = updates if region is None else [update.within(region) for update in updates]
        return sum_updates(parts, (), device=device, dtype=dtype, as_one_matrix=cls.as_one_matrix)

    @classmethod
    def region_here(cls, weight: Tensor) -> Region:
        """Return the part of the update for this process's part of a sharded weight."""
        part = place_at(weight).part
        assert part is not None, "it is sharded"
        return cls.region_of(tuple(weight.shape), part)

    @classmethod
    def region_of(cls, shape: Shape, spans: Sequence[Spans]) -> Region:  # noqa: ARG003  # for convolutions
        """Return the part of the update, `as_one_matrix`, for a part of the parameter.

        Args:
            shape: The shape of the whole parameter.
            spans: The part, in each dimension.
        """
        *stack, rows, columns = spans
        if cls.is_transposed:
            rows, columns = columns, rows
        return Region(rows, columns, stack[0] if stack else None)

"""The weight that is adapted: its updates, how a kind of layer stores it and merges them, and how it is split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.bases.spec import Shape
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError, MergeError
from randlora.functional import Compute, Diagonals, Pair, delta_weight, update_norm
from randlora.functional.region import Region, Spans, take_spans
from randlora.functional.scratch import without_autocast
from randlora.places import Kept, Part, Place, converted, is_hooked, place_of
from randlora.ranks import run_collectives

COMPUTED = "computes its weight from other parameters: remove the parametrization first"
"""What is said of a weight that is no parameter, as after pruning, weight norm or another parametrization."""

Quantized = Literal["requantize", "dequantize"]


class Update(NamedTuple):
    """One adapter's update of one weight as factors: whole Λ and Γ, or stacks of them, and the shape of all of it."""

    basis: Basis
    lam: Tensor
    gamma: Tensor
    scaling: float  # times the adapter's weight
    shape: Shape
    region: Region | None = None  # the part that is computed

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Pair, Diagonals]:
        """Return the arguments of `randlora.functional`: for a part of the weight, slices of the bases and of Γ."""
        matrix, gamma, sides = self.shape[-2:], self.gamma, None
        if self.region is not None:
            sides = self.region.sides(is_wide=self.is_wide)
            gamma = take_spans(gamma, sides.small, -1)
        pair = self.basis.pair(max(matrix), min(matrix), device=device, dtype=dtype, sides=sides)
        lam = self.lam if self.lam.device == device else self.lam.to(device)
        return pair, Diagonals(lam, gamma if gamma.device == device else gamma.to(device), self.scaling)

    def diagonals(self, device: torch.device) -> Diagonals:
        """Return Λ and Γ of the whole update, with the scaling."""
        return Diagonals(self.lam.to(device), self.gamma.to(device), self.scaling)

    def norm(self, device: torch.device) -> Tensor:
        """Return the approximate norm of the whole update. Gradients flow through it; see `update_norm`."""
        matrix, diagonals = self.shape[-2:], self.diagonals(device)
        dtype = torch.promote_types(diagonals.lam.dtype, torch.float32)
        squares = self.basis.squares(max(matrix), min(matrix), device=device, dtype=dtype)
        with without_autocast(device.type):
            return update_norm(*squares, diagonals)

    @property
    def is_wide(self) -> bool:
        """Whether the input of the whole layer has ``min_dim`` features, which includes square layers."""
        return self.shape[-1] == min(self.shape[-2:])

    def within(self, region: Region) -> Update:
        """Return the part of the update for a part of the weight."""
        if region.matrices is None or len(self.shape) == 2:
            return self._replace(region=region)
        lam, gamma = (take_spans(diagonal, region.matrices, 0) for diagonal in (self.lam, self.gamma))
        return self._replace(lam=lam, gamma=gamma, shape=(len(lam), *self.shape[1:]), region=region)


def sum_updates(
    updates: Iterable[Update],
    shape: Shape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    as_one_matrix: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the sum of some updates of one weight, added in their order, in a shape or one that is broadcast to it."""
    total = torch.zeros(shape, dtype=dtype, device=device)
    with without_autocast(device.type):
        for update in updates:
            delta = delta_weight(*update.parts(device, dtype), is_wide=update.is_wide)
            total = total + (delta if as_one_matrix is None else as_one_matrix(delta))
    return total


def rounded_sum(weight: Tensor, delta: Tensor) -> Tensor:
    """Return weight + delta, which may broadcast, added in the wider dtype and rounded once to the weight's."""
    if delta.numel() == weight.numel():
        delta = delta.reshape(weight.shape)
    total = (weight.to(delta.dtype) + delta).to(weight.dtype)  # in the weight's memory format too
    return total if total.stride() == weight.stride() else total.contiguous()


class Into(NamedTuple):
    """What a merge turns quantized layers into: layers of their kind, or plain ones in a dtype or the layer's own."""

    quantized: Quantized = "requantize"
    dtype: torch.dtype | None = None


class RoundingLoss(NamedTuple):
    """The rounding error of quantizing a merged weight.

    Attributes:
        largest: The largest absolute error of an entry.
        step: The widest gap between two neighboring levels of the new codes, at the layer's largest scale.
        relative: The norm of the error as a share of the norm of the merged update.
    """

    largest: float
    step: float
    relative: float


class Merged(NamedTuple):
    """A merged weight, or this process's part of it, before any quantization."""

    weight: Tensor
    held: Any = None  # what replaces the codes of a quantized layer, for its `write_merged`
    rounding: RoundingLoss | None = None


class StoredWeight(ABC):
    """How one kind of layer stores its weight, a named parameter of the module, and how updates are merged into it."""

    attribute: ClassVar[str] = "weight"  # the name of the parameter
    is_transposed: ClassVar[bool] = False  # whether stored as (in_features, out_features), or a stack of such matrices
    is_quantized: ClassVar[bool] = False  # whether the module holds codes instead of values
    is_forward_only: ClassVar[bool] = False  # whether only its forward reads the codes, so that nothing can be merged
    original: Kept | None = None  # the original weight while it is merged into

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise a `TypeError` for a class that overrides `weight_of`, the name of `find_weight` in version 0.2."""
        super().__init_subclass__(**kwargs)
        if "weight_of" in vars(cls):
            raise TypeError(f"{cls.__name__} overrides weight_of, which would not be called: name it find_weight")

    @staticmethod
    @abstractmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)`` of a module's weight, or of each of a stack, even without values."""

    @staticmethod
    @abstractmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return an update, as `as_one_matrix` returns it, in the layout of the owner's weight.

        Its shape is the weight's, one that broadcasts to it, or that of the weight viewed as a matrix.
        """

    @staticmethod
    def as_one_matrix(delta: Tensor) -> Tensor:
        """Return an update in a form in which updates of one weight that differ in shape can be added."""
        return delta

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this module cannot be adapted, as a phrase that follows its name, or ``None``."""
        weight = cls.weight_of(owner)  # not the attribute, whose value may include updates
        if weight.dtype.is_floating_point and weight.dtype.itemsize > 1:  # torch does not add 8-bit numbers
            return None
        return f"has a weight of {weight.dtype}, expected a floating dtype of 16 bits or more: dequantize it first"

    @classmethod
    def shape_of(cls, owner: nn.Module, config: RandLoRAConfig) -> Shape:  # noqa: ARG003  # for stacks of matrices
        """Return the shape of an update by an adapter with these options; for a stack, the number of matrices first."""
        in_features, out_features = cls.features(owner)
        return out_features, in_features

    @classmethod
    def find_weight(cls, owner: nn.Module) -> Tensor | None:
        """Return the owner's parameter without any update, or ``None`` if it is computed from others.

        This is the method to override for a weight that is elsewhere, such as codes under a different name.
        """
        own = owner._parameters
        return own[cls.attribute] if cls.attribute in own else None  # noqa: SIM401  # ZeRO-3 does not see a get()

    @classmethod
    @final
    def weight_of(cls, owner: nn.Module) -> Tensor:
        """Return what `find_weight` finds, or raise an `AdapterError` if there is nothing."""
        if (weight := cls.find_weight(owner)) is None:
            base = getattr(owner, "randlora_base", type(owner))
            raise AdapterError(
                f"{cls.attribute} of an adapted {base.__name__} is no longer a parameter, such as after a "
                "parametrization or pruning: undo this, and merge or eject the adapters first"
            )
        return weight

    @classmethod
    def nbytes_of(cls, owner: nn.Module) -> int:
        """Return the bytes of the owner's weight as it is held, with the scales of its codes."""
        weight = cls.find_weight(owner)
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
    def parameter_names(cls) -> tuple[str, ...]:
        """Return the names under which the owner, which may have several such weights, holds Λ and Γ."""
        prefix = "" if cls.attribute == "weight" else f"{cls.attribute}_"
        return f"{prefix}randlora_lambda", f"{prefix}randlora_gamma"

    @classmethod
    def device_beside(cls, owner: nn.Module) -> torch.device:
        """Return the device of Λ and Γ: the weight's device, or the CPU if accelerate offloads the weight."""
        weight = cls.weight_of(owner)
        return torch.device("cpu") if weight.is_meta and is_hooked(owner) else weight.device

    @classmethod
    def with_updates(cls, weight: Tensor, updates: Sequence[Update], region: Region | None = None) -> Tensor:
        """Return a weight, or its part in a region, plus some updates, added in float32 or wider, rounded once."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        delta = cls.summed(updates, region, device=weight.device, dtype=dtype)
        return rounded_sum(weight, cls.in_storage_layout(delta))

    @classmethod
    def part_with_updates(cls, own: Tensor, part: Part, shape: Shape, updates: Sequence[Update]) -> Tensor:
        """Return a part of a weight of this shape, as stored, plus that part of some whole updates."""
        return cls.with_updates(own, updates, cls.region_of(shape, part)) if own.numel() else own

    @classmethod
    def summed(
        cls, updates: Iterable[Update], region: Region | None, *, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return the sum of some updates, `as_one_matrix`, or of their parts within a region, computed alone."""
        parts = updates if region is None else [update.within(region) for update in updates]
        return sum_updates(parts, (), device=device, dtype=dtype, as_one_matrix=cls.as_one_matrix)

    @classmethod
    def region_of(cls, shape: Shape, spans: Sequence[Spans]) -> Region:  # noqa: ARG003  # for convolutions
        """Return the part of the update, `as_one_matrix`, for a part of a parameter of this shape in each dimension."""
        *stack, rows, columns = spans
        if cls.is_transposed:
            rows, columns = columns, rows
        return Region(rows, columns, stack[0] if stack else None)

    @abstractmethod
    def whole_updates(self, owner: nn.Module, weights: dict[str, float]) -> list[Update]:
        """Return the updates of some adapters with all values of Λ and Γ; a collective if these are sharded."""

    def merge_obstacle(self, owner: nn.Module, into: Into | None) -> str | None:  # noqa: ARG002  # for quantized layers
        """Return why this weight cannot be merged into, or only be computed merged for ``None``, as a phrase."""
        return None

    def written_out(self, owner: nn.Module) -> Tensor:
        """Return the owner's weight without any update, dequantized if it is quantized."""
        return self.weight_of(owner).detach()

    @classmethod
    def bias_of(cls, owner: nn.Module) -> Tensor | None:
        """Return the bias that the owner adds to the product, if any."""
        return owner._parameters.get("bias")

    def compute_dtype(self, owner: nn.Module) -> torch.dtype | None:  # noqa: ARG002  # for quantized layers
        """Return the dtype that the layer computes in, or ``None`` for the dtype of its input."""
        return None

    @torch.no_grad()
    def compute_merged(self, owner: nn.Module, weights: dict[str, float], into: Into) -> Merged:  # noqa: ARG002  # for quantized layers
        """Return the original weight, or its part here, plus adapters' updates; a collective if these are sharded."""
        weight, place = self.weight_of(owner), place_of(owner, self.attribute)
        updates, own = run_collectives([partial(self.whole_updates, owner, weights), place.read])
        if self.original is not None:  # then it is plain
            own = self.original.values.to(device=weight.device, dtype=weight.dtype)
        if (part := place.part) is None:
            return Merged(self.with_updates(own, updates))
        return Merged(self.part_with_updates(own, part, tuple(weight.shape), updates))

    def write_merged(self, owner: nn.Module, merged: Merged) -> None:
        """Replace the owner's weight by a merged one and keep that of before in `original`."""
        place = place_of(owner, self.attribute)
        if self.original is None:
            self.original = place.keep()  # before the values change, so that `restore_original` can undo that
        place.write(merged.weight)

    def keep_merged(self, owner: nn.Module) -> None:
        """Make a merge permanent: the original parameter, which an optimizer may hold, gets the merged values."""
        assert self.original is not None, "it was merged into"
        (own, place), self.original = self.original, None
        if place is None and not own.is_inference():  # whose data cannot be set: it would be of both modes
            own.data = self.weight_of(owner).data
            owner._parameters[self.attribute] = own

    def save_original(self, owner: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the original weight into a state dict that has the merged one, on its device and in its dtype."""
        if (weight := self.find_weight(owner)) is None:
            raise MergeError(f"cannot save the weight from before the merge: {prefix.removesuffix('.')} {COMPUTED}")
        assert self.original is not None, "it was merged into"
        if (own := self.original.stored(place_of(owner, self.attribute))) is not None:
            destination[f"{prefix}{self.attribute}"] = own.detach().to(device=weight.device, dtype=weight.dtype)

    def convert_original(self, convert: Any) -> None:
        """Convert the original weight as `nn.Module._apply` converts the merged one."""
        if self.original is not None and isinstance(self.original.values, Tensor) and not self.is_quantized:
            self.original = self.original._replace(values=converted(self.original.values, convert))

    @torch.inference_mode(mode=False)  # the weight must not be an inference tensor
    def restore_original(self, owner: nn.Module) -> None:
        """Restore the original weight bit for bit, on the device and in the dtype that the owner has now."""
        if self.original is not None:
            self.original.put_back(place_of(owner, self.attribute))
            self.original = None


class Split(ABC):
    """A weight of which this process has a part, with the tensors that its layer computes with."""

    @abstractmethod
    def product(self, update: Update, x: Tensor, compute: Compute) -> Tensor:
        """Return the product of an input, ``(..., in_features)``, with an update, split as the layer's output."""

    @abstractmethod
    def rows(self, updates: Sequence[Update], ids: Tensor, padding_idx: int | None) -> Tensor:
        """Return rows of a table with updates, split as the layer's lookup. The padding row gets no gradient."""

    @abstractmethod
    def value(self, updates: Sequence[Update]) -> Tensor:
        """Return the weight with updates, split as it is."""


class Splitter:
    """A way of splitting weights over processes, for `SPLITTERS`."""

    def split(self, layer: type[StoredWeight], weight: Tensor) -> Split | None:  # noqa: ARG002
        """Return how to compute with a split weight of a kind of layer, or ``None``; see `split_of`."""
        return None

    def obstacle(self, owner: nn.Module, weight: Tensor, *, is_quantized: bool) -> str | None:  # noqa: ARG002
        """Return why a split weight cannot be adapted, as a phrase after its name, or ``None``."""
        return None

    def adopt(self, owner: nn.Module, layer: Any, forward_name: str) -> bool:  # noqa: ARG002
        """Have an adapter layer computed within a forward that was set on its owner, if this splitter set it."""
        return False


SPLITTERS: list[Splitter] = []


def split_of(layer: type[StoredWeight], weight: Tensor) -> Split | None:
    """Return how to compute with a weight that is split over processes, or ``None`` if it is not split."""
    for splitter in SPLITTERS:  # torch 2.6 does not compile next() with a default
        if (split := splitter.split(layer, weight)) is not None:
            return split
    return None


def split_obstacle(owner: nn.Module, weight: Tensor, *, is_quantized: bool) -> str | None:
    """Return why a weight that is split over processes cannot be adapted, as a phrase after its name, or ``None``."""
    reasons = (splitter.obstacle(owner, weight, is_quantized=is_quantized) for splitter in SPLITTERS)
    return next((reason for reason in reasons if reason is not None), None)

"""`ReadWeight`: weights that code reads, and torch's modules that have some: attention, convolutions, embeddings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases.spec import Shape
from randlora.blocks import BatchRows, ForwardCall
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError
from randlora.functional import update_rows
from randlora.functional.region import Region, Spans, all_of
from randlora.layers.base import AdapterLayer, input_of
from randlora.layers.in_place import adapter_layers_of, plain_class
from randlora.layers.linear import FORWARD, LinearAdapter
from randlora.layers.registry import FORMS, refuse_layer, register_layer
from randlora.layers.scopes import cast, read_so_far, run_forward
from randlora.layers.weight import Update, split_of

LOOKUP = nn.Embedding.forward  # read on import, in case it is replaced later
PROJECTIONS = 3  # query, key and value


class ReadWeight(AdapterLayer):
    """Adapts a parameter that code reads by name, in the forward of its owner or of a module around it.

    In these forwards the attribute is weight + update while adapters are active (see `randlora.layers.scopes`).
    Everywhere else it is the parameter. The update is computed on each read.
    """

    is_called: ClassVar[bool] = False
    is_read: ClassVar[bool] = True
    is_read_once: ClassVar[bool] = False  # whether an update is kept until the forward of its owner ends

    @classmethod
    def takes_dropout(cls, owner: nn.Module) -> bool:  # noqa: ARG003
        """Return ``False``: an update that is added to the weight has the same input as the weight."""
        return False

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows:
        """Return which arguments of the owner's forward have the rows of the batch."""
        return BatchRows.first(args, kwargs, plain_class(owner).__name__)

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the owner's forward, which reads its weights."""
        for layer in adapter_layers_of(owner).values():
            layer.weight_of(owner)  # or raise an error
        own = self.own_forward or base_forward
        if self.state.runs and (run := self.state.run) is not None and run.takes_over:
            inside = (each for module in owner.modules() for each in adapter_layers_of(module).values())
            if any(map(run.concerns, inside)):
                return run.reading(self, ForwardCall(owner, partial(run_forward, owner, own), args, kwargs))
        return run_forward(owner, own, *args, **kwargs)

    def read(self, owner: nn.Module) -> Tensor:
        """Return the value of the attribute, in the shape and dtype of the weight."""
        values = read_so_far() if self.is_read_once and not torch.compiler.is_compiling() else None
        if values is None:
            return self.value(owner)
        key = id(owner), self.attribute, torch.is_grad_enabled(), id(self.activation), self.state.is_disabled
        if key not in values:
            values[key] = self.value(owner)
        return values[key]

    def value(self, owner: nn.Module) -> Tensor:
        """Compute the weight plus the updates of the active adapters."""
        weight, active = self.weight_of(owner), self.active()
        if not active:
            return weight
        updates = [self.update(owner, site_adapter, factor) for site_adapter, factor in active]
        if (split := split_of(type(self), weight)) is not None:
            return split.value(updates)
        return self.with_updates(weight, self.here(updates))

    def here(self, updates: list[Update]) -> list[Update]:
        """Return the parts of updates for the part of the weight on this process (all of it, or a piece)."""
        return updates if self.piece is None else [self.piece.part(update) for update in updates]


class ReadLinear(ReadWeight, LinearAdapter):
    """Adapts an `nn.Linear` whose weight code reads: the module around it, a trainer, or the forward of a subclass.

    The plain forward, if it is called, computes layer and adapter as one operation and does not form the update.
    """

    is_called: ClassVar[bool] = True

    @classmethod
    def takes_dropout(cls, owner: nn.Module) -> bool:
        """Whether the module's class has the plain forward. Code that reads the weight cannot drop entries."""
        return plain_class(owner).forward is FORWARD

    def value(self, owner: nn.Module) -> Tensor:
        """Compute the weight plus the updates of the active adapters."""
        if owner.training and any(site_adapter.adapter.config.dropout for site_adapter, _ in self.active()):
            raise AdapterError(
                f"code reads the weight of an adapted {plain_class(owner).__name__} instead of calling it, so the "
                "adapter's dropout cannot act (TRL's trainers do this with an output head): make the adapter without "
                "dropout, or exclude the layer"
            )
        return super().value(owner)

    def adds_to_output(self, owner: nn.Module) -> bool:
        """Whether the module has the plain forward. Any other forward reads weight + update."""
        return self.runs_plain_forward(owner)

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the plain forward plus the active adapters' outputs, or any other forward's result."""
        kind = LinearAdapter if self.adds_to_output(owner) else ReadWeight
        return kind.forward(self, owner, base_forward, *args, **kwargs)

    def base_output(self, owner: Any, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the plain forward without adapters. The attribute is not read."""
        if not self.adds_to_output(owner):
            return super().base_output(owner, base_forward, *args, **kwargs)
        return F.linear(input_of(owner, args, kwargs), cast(owner, "weight", self.weight_of(owner)), owner.bias)


LinearAdapter.as_read = ReadLinear


class ProjectionAdapter(ReadWeight):
    """Adapts a matrix that attention multiplies by, stored ``(out_features, in_features)``."""

    kind = "attention"
    is_read_once = True
    in_storage_layout = staticmethod(LinearAdapter.in_storage_layout)

    @classmethod
    def features(cls, owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, from ``ds_shape`` if DeepSpeed's ZeRO-3 emptied the weight."""
        weight = cls.weight_of(owner)
        out_features, in_features = getattr(weight, "ds_shape", weight.shape)
        return int(in_features), int(out_features)

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows:
        """Return which arguments have the rows. ``batch_first`` says where; a mask may have a row for each head."""
        base = plain_class(owner)
        given = inspect.signature(partial(base.forward, owner)).bind(*args, **kwargs).arguments
        x: Tensor = next(iter(given.values()))
        axis = 0 if owner.batch_first else 1
        if x.dim() != 3:
            raise AdapterError(
                f"an adapted {base.__name__} was given an input of shape {tuple(x.shape)}, which has no "
                "batch: routed needs (batch, tokens, features), in the order that batch_first says"
            )
        axes: dict[int | str, tuple[int, int]] = {}
        for name, value in given.items():
            if isinstance(value, Tensor) and name != "attn_mask":
                axes[name] = (0, 1) if name == "key_padding_mask" else (axis, 1)
            elif isinstance(value, Tensor) and value.dim() == 3:
                axes[name] = 0, value.shape[0] // x.shape[axis]
        return BatchRows((), dict(given), axes, x.shape[axis], x.device, (axis, 0), is_declared=True)


@register_layer("open_clip.transformer.Attention")
@register_layer(nn.MultiheadAttention)
class InProjAdapter(ProjectionAdapter):
    """Adapts an ``in_proj_weight``, ``(3 * embed_dim, embed_dim)``, as one matrix or as three."""

    attribute = "in_proj_weight"

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return the obstacle for any weight, or that this one is not a stack of three matrices of equal size."""
        out_features = cls.features(owner)[1]
        if out_features % PROJECTIONS:
            return f"has {out_features} rows, expected equally many for query, key and value: exclude it"
        return super().obstacle(owner)

    @classmethod
    def shape_of(cls, owner: nn.Module, config: RandLoRAConfig) -> Shape:
        """Return ``(3 * embed_dim, embed_dim)``, or ``(3, embed_dim, embed_dim)`` if the options say ``"split"``."""
        in_features, out_features = cls.features(owner)
        is_split = config.in_proj == "split"
        return (PROJECTIONS, out_features // PROJECTIONS, in_features) if is_split else (out_features, in_features)

    @staticmethod
    def as_one_matrix(delta: Tensor) -> Tensor:
        """Return an update of either form as one matrix."""
        return delta.flatten(end_dim=-2)

    @classmethod
    def summed(
        cls, updates: Iterable[Update], region: Region | None, *, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return the sum of some updates as one matrix, or the slice of this sum within a region.

        A region may begin in one of the three matrices and end in a different one.
        """
        total = super().summed(updates, None, device=device, dtype=dtype)
        return total if region is None else region.of(total)


@register_layer(nn.MultiheadAttention)
class _QueryAdapter(ProjectionAdapter):  # these three where keys or values have a different width
    attribute = "q_proj_weight"


@register_layer(nn.MultiheadAttention)
class _KeyAdapter(ProjectionAdapter):
    attribute = "k_proj_weight"


@register_layer(nn.MultiheadAttention)
class _ValueAdapter(ProjectionAdapter):
    attribute = "v_proj_weight"


register_layer(nn.modules.linear.NonDynamicallyQuantizableLinear)(ProjectionAdapter)  # its ``out_proj``, not called


class ConvolutionAdapter(ReadWeight):
    """Adapts the kernel of a convolution, viewed as a matrix.

    The update is ``(out_channels, in_channels/groups·prod(kernel_size))``. For a transposed convolution, which stores
    its kernel with the input channels first, it is ``(in_channels, out_channels/groups·prod(kernel_size))``. The
    owner's forward convolves once, with kernel + update, which autograd keeps for backward.
    """

    kind: ClassVar[str] = "convolution"
    in_storage_layout = staticmethod(LinearAdapter.in_storage_layout)  # entries are in the kernel's order

    @staticmethod
    def features(owner: Any) -> tuple[int, int]:
        """Return the sizes of a row and a column of the kernel as a matrix, even if DeepSpeed's ZeRO-3 emptied it."""
        first, second = int(owner.out_channels), int(owner.in_channels)
        if owner.transposed:
            first, second = second, first
        return second // owner.groups * math.prod(owner.kernel_size), first

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows:
        """Return which arguments have the rows of the batch. Raises an error if the input has no batch."""
        x: Tensor = args[0] if args else kwargs["input"]
        if x.dim() != len(owner.kernel_size) + 2:
            raise AdapterError(
                f"an adapted {owner.randlora_base.__name__} was given an input of shape {tuple(x.shape)}, which has no "
                "batch: routed needs (batch, channels, ...)"
            )
        return super().rows_of(owner, args, kwargs)

    @classmethod
    def region_of(cls, shape: Shape, spans: Sequence[Spans]) -> Region:
        """Return the part of the update for a part of the kernel, which may be split by its channels."""
        rows, channels, *inside = spans
        if inside != [all_of(size) for size in shape[2:]]:
            raise AdapterError(f"a kernel of shape {tuple(shape)} is split inside, into {spans}: split its channels")
        entries = math.prod(shape[2:])
        return Region(rows, tuple((start * entries, stop * entries) for start, stop in channels))


FORMS.update({"in_proj_weight": InProjAdapter, "kernel": ConvolutionAdapter})


for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(convolution)(ConvolutionAdapter)


@register_layer(nn.Embedding)
class EmbeddingAdapter(ReadWeight):
    """Adapts the table of an embedding; the update is ``(num_embeddings, embedding_dim)``.

    For every index, including ``padding_idx``, the output is that row of weight + update. Only the rows that a batch
    looks up are computed, unless a subclass has its own forward or other code reads the weight: these read the table
    with the whole update.
    """

    kind: ClassVar[str] = "embedding"
    is_called: ClassVar[bool] = True
    in_storage_layout = staticmethod(LinearAdapter.in_storage_layout)

    @staticmethod
    def features(owner: Any) -> tuple[int, int]:
        """Return ``(embedding_dim, num_embeddings)``, the sizes of a row and of a column of the table."""
        return int(owner.embedding_dim), int(owner.num_embeddings)

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``nn.Embedding.forward``, as torch defines it."""
        return LOOKUP

    @classmethod
    def obstacle(cls, owner: Any) -> str | None:
        """Return why the table cannot be adapted: its dtype is not floating, or its forward changes it."""
        if owner.max_norm is None:
            return super().obstacle(owner)
        return (
            f"has max_norm={owner.max_norm}, with which its forward changes the weight in place: adapted weights are "
            "frozen; renormalize the rows once and set max_norm to None, or exclude the layer"
        )

    def forward(self, owner: Any, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the embeddings of indices, ``(*indices.shape, embedding_dim)``, or an overridden forward's result."""
        is_plain = self.runs_plain_forward(owner)
        if is_plain and self.state.runs and (run := self.state.run) is not None and run.takes_over:
            return run.rows(self, ForwardCall(owner, base_forward, args, kwargs))
        if not is_plain or not (active := self.active()):
            return super().forward(owner, base_forward, *args, **kwargs)
        weight, ids = self.weight_of(owner), input_of(owner, args, kwargs)
        num_rows, row_size = self.shape
        if (owner.num_embeddings, owner.embedding_dim) != self.shape:  # as by transformers' resize_token_embeddings
            raise AdapterError(
                f"the table of {type(owner).__name__}({owner.num_embeddings}, {owner.embedding_dim}) had the shape "
                f"{self.shape} when it was adapted: resize it before adapting it"
            )
        if (split := split_of(type(self), weight)) is not None:
            updates = [self.update(owner, site_adapter, factor) for site_adapter, factor in active]
            return split.rows(updates, ids, owner.padding_idx)
        table, frequency = cast(owner, "weight", weight), owner.scale_grad_by_freq
        output = F.embedding(ids, table, owner.padding_idx, scale_grad_by_freq=frequency, sparse=owner.sparse)
        for site_adapter, factor in active:
            pair, diagonals = self.update(owner, site_adapter, factor).parts(output.device, output.dtype)
            rows = update_rows(ids, pair, diagonals, num_rows=num_rows, is_wide=row_size <= num_rows)
            if owner.padding_idx is not None:  # which gets no gradient, as in torch
                rows = torch.where((ids == owner.padding_idx).unsqueeze(-1), rows.detach(), rows)
            output = output + rows
        return output


for quantized in ("Embedding8bit", "Embedding4bit"):
    refuse_layer(
        f"bitsandbytes.nn.modules.{quantized}",
        "its table is quantized, but only a table of a floating dtype can be adapted: leave the embedding unquantized",
    )

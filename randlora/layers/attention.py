"""`nn.MultiheadAttention`, which reads the weights of its projections in its forward, and that of ``out_proj`` too.

Its ``in_proj_weight`` has the query, key and value projections one above the other; if keys or values have another
width, there are ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.spec import Shape
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError
from randlora.functional.region import Region
from randlora.layers.read_weight import ReadWeight, base_class
from randlora.layers.registry import register_layer
from randlora.layers.rows import Rows
from randlora.layers.update import Update

PROJECTIONS = 3
"""Query, key and value."""


class ProjectionAdapter(ReadWeight):
    """Adapts a matrix that attention multiplies by, stored ``(out_features, in_features)``."""

    kind = "attention"
    is_read_once = True

    @classmethod
    def features(cls, owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, from ``ds_shape`` if DeepSpeed's ZeRO-3 emptied the weight."""
        weight = owner._parameters[cls.attribute]
        assert weight is not None, "is_held_by() asks for a weight"
        out_features, in_features = getattr(weight, "ds_shape", weight.shape)
        return int(in_features), int(out_features)

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the update unchanged, ``(out_features, in_features)``."""
        return delta

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """Return which arguments have the rows: ``batch_first`` says where, and a mask may have one for each head."""
        base = base_class(owner)
        given = inspect.signature(base.forward).bind(owner, *args, **kwargs).arguments
        del given["self"]
        x: Tensor = next(iter(given.values()))
        axis = 0 if owner.batch_first else 1
        if x.dim() != 3:
            raise AdapterError(
                f"an adapted {base.__name__} was given an input of shape {tuple(x.shape)}, which has no "
                "batch: routed needs (batch, tokens, features), in the order that batch_first says"
            )
        axes: dict[int | str, tuple[int, int]] = {}
        for name, value in given.items():
            if name == "attn_mask":
                if isinstance(value, Tensor) and value.dim() == 3:
                    axes[name] = 0, value.shape[0] // x.shape[axis]
            elif isinstance(value, Tensor):
                axes[name] = (0, 1) if name == "key_padding_mask" else (axis, 1)
        return Rows((), dict(given), axes, x.shape[axis], x.device, (axis, 0), is_declared=True)


@register_layer("open_clip.transformer.Attention")
@register_layer(nn.MultiheadAttention)
class InProjAdapter(ProjectionAdapter):
    """Adapts an ``in_proj_weight``, ``(3 * embed_dim, embed_dim)``: as one matrix, or as three."""

    attribute = "in_proj_weight"

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return the obstacles of any weight, or that this one is no stack of three matrices of one size."""
        out_features = cls.features(owner)[1]
        if out_features % PROJECTIONS:
            return f"has {out_features} rows, expected those of query, key and value, equally many: exclude it"
        return super().obstacle(owner)

    @classmethod
    def shape_of(cls, owner: nn.Module, config: RandLoRAConfig) -> Shape:
        """Return ``(3 * embed_dim, embed_dim)``, or ``(3, embed_dim, embed_dim)`` if the options say ``"split"``."""
        in_features, out_features = cls.features(owner)
        if config.in_proj == "split":
            return PROJECTIONS, out_features // PROJECTIONS, in_features
        return out_features, in_features

    @staticmethod
    def as_one_matrix(delta: Tensor) -> Tensor:
        """Return an update of either form as one matrix."""
        return delta.flatten(end_dim=-2)

    @classmethod
    def summed(
        cls, updates: Iterable[Update], region: Region | None, *, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return the sum of some updates as one matrix, or of the parts within a region, a slice of the whole sum.

        A region may begin in one of the three matrices and end in another.
        """
        total = super().summed(updates, None, device=device, dtype=dtype)
        return total if region is None else region.of(total)


@register_layer(nn.MultiheadAttention)
class QueryAdapter(ProjectionAdapter):
    """Adapts a ``q_proj_weight``, ``(embed_dim, embed_dim)``."""

    attribute = "q_proj_weight"


@register_layer(nn.MultiheadAttention)
class KeyAdapter(ProjectionAdapter):
    """Adapts a ``k_proj_weight``, ``(embed_dim, kdim)``."""

    attribute = "k_proj_weight"


@register_layer(nn.MultiheadAttention)
class ValueAdapter(ProjectionAdapter):
    """Adapts a ``v_proj_weight``, ``(embed_dim, vdim)``."""

    attribute = "v_proj_weight"


@register_layer(nn.modules.linear.NonDynamicallyQuantizableLinear)
class OutProjAdapter(ProjectionAdapter):
    """Adapts the weight of ``out_proj``, ``(embed_dim, embed_dim)``, a layer that attention does not call.

    Its own forward, if anything calls it, reads the weight as well.
    """

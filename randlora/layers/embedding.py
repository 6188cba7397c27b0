"""`nn.Embedding`: of the update of the table only the rows are computed that a batch looks up."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.blocks import Forward
from randlora.errors import AdapterError
from randlora.functional import update_rows
from randlora.layers.cast import cast
from randlora.layers.inputs import input_of
from randlora.layers.read_weight import ReadWeight
from randlora.layers.registry import refuse_layer, register_layer
from randlora.layers.scopes import run_forward
from randlora.layers.split import split_of

FORWARD = nn.Embedding.forward  # read on import, in case it is replaced later


@register_layer(nn.Embedding)
class EmbeddingAdapter(ReadWeight):
    """Adapts the table of an embedding; the update is ``(num_embeddings, embedding_dim)``.

    The output is that of an embedding with the table weight + update, for every index, ``padding_idx`` too. Only the
    rows that a batch looks up are computed, unless a subclass has its own forward or other code reads the weight: they
    read the table with the whole update.
    """

    kind: ClassVar[str] = "embedding"
    is_called: ClassVar[bool] = True

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(embedding_dim, num_embeddings)``, the sizes of a row and of a column of the table."""
        assert isinstance(owner, nn.Embedding)
        return int(owner.embedding_dim), int(owner.num_embeddings)

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the update unchanged, ``(num_embeddings, embedding_dim)``."""
        return delta

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``nn.Embedding.forward``, as torch defines it."""
        return FORWARD

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why the table cannot be adapted: it is not of a floating dtype, or its forward changes it."""
        assert isinstance(owner, nn.Embedding)
        if owner.max_norm is None:
            return super().obstacle(owner)
        return (
            f"has max_norm={owner.max_norm}, with which its forward changes the weight in place: adapted weights are "
            "frozen; renormalize the rows once and set max_norm to None, or exclude the layer"
        )

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the embeddings of some indices.

        Args:
            owner: The adapted embedding.
            base_forward: Its forward without adapters, except that it reads the weight, which includes them.
            *args: Arguments of the forward; the first is the indices.
            **kwargs: Keyword arguments of the forward; the indices may be the first of them.

        Returns:
            ``(*indices.shape, embedding_dim)`` in the dtype of the weight, or what a forward of its own returns.
        """
        assert isinstance(owner, nn.Embedding)
        weight = self.held_weight(owner)
        own = partial(run_forward, owner, self.own_forward or base_forward)
        if (run := self.state.run) is not None and run.takes_over:
            if not self.runs_plain_forward(owner):
                return run.reading(self, Forward(owner, own, args, kwargs))
            return run.rows(self, Forward(owner, base_forward, args, kwargs))
        active = self.active()
        if not active or not self.runs_plain_forward(owner):
            return run_forward(owner, self.own_forward or base_forward, *args, **kwargs)
        ids = input_of(owner, args, kwargs)
        num_rows, row_size = self.shape
        if (owner.num_embeddings, owner.embedding_dim) != self.shape:  # as by transformers' resize_token_embeddings
            raise AdapterError(
                f"the table of {type(owner).__name__}({owner.num_embeddings}, {owner.embedding_dim}) had the shape "
                f"{self.shape} when it was adapted: resize it before adapting it"
            )
        if (split := split_of(type(self), weight)) is not None:
            updates = [self.update(owner, part, factor) for part, factor in active]
            return split.rows(updates, ids, owner.padding_idx)
        table, frequency = cast(owner, "weight", weight), owner.scale_grad_by_freq
        output = F.embedding(ids, table, owner.padding_idx, scale_grad_by_freq=frequency, sparse=owner.sparse)
        for part, factor in active:
            pair, diagonals = self.update(owner, part, factor).parts(output.device, output.dtype)
            rows = update_rows(ids, pair, diagonals, num_rows=num_rows, is_wide=row_size <= num_rows)
            if owner.padding_idx is not None:  # which gets no gradient, as in torch
                rows = torch.where((ids == owner.padding_idx).unsqueeze(-1), rows.detach(), rows)
            output = output + rows
        return output


for quantized in ("Embedding8bit", "Embedding4bit"):
    refuse_layer(
        f"bitsandbytes.nn.modules.{quantized}",
        "its table is quantized, and only one of a floating dtype can be adapted: leave the embedding unquantized",
    )

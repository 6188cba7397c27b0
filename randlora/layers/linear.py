"""Layers whose forward is the product with their weight: `nn.Linear`, and transformers' ``Conv1D`` (transposed)."""

import sys
from collections.abc import Callable

from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.registry import refuse_layer, register_layer

FORWARD = nn.Linear.forward  # read on import, in case it is replaced later


@register_layer("transformers.models.falcon.modeling_falcon.FalconLinear")
@register_layer("timm.layers.linear.Linear")
@register_layer(nn.Linear)
class LinearAdapter(AdapterLayer):
    """Adapts an `nn.Linear`; `as_read` adapts a subclass with a different forward, unless it is registered."""

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, even if the weight is codes or DeepSpeed's ZeRO-3 emptied it."""
        assert isinstance(owner, nn.Linear)
        return int(owner.in_features), int(owner.out_features)  # which are tensors in some models

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the update unchanged."""
        return delta

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``nn.Linear.forward``, as torch defines it."""
        return FORWARD


@register_layer("transformers.pytorch_utils.Conv1D")
class Conv1DAdapter(AdapterLayer):
    """Adapts a ``Conv1D``, registered by name so that transformers need not be imported."""

    is_transposed = True

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, from ``ds_shape`` if DeepSpeed's ZeRO-3 emptied the weight."""
        weight = owner._parameters["weight"]
        assert weight is not None, "a Conv1D has a weight"
        in_features, out_features = getattr(weight, "ds_shape", weight.shape)
        return int(in_features), int(out_features)

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the transpose, ``(in_features, out_features)``."""
        return delta.T

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor]:
        """Return ``Conv1D.forward``. transformers is imported if a ``Conv1D`` exists."""
        forward: Callable[..., Tensor] = sys.modules["transformers.pytorch_utils"].Conv1D.forward
        return forward


for router in ("llama4.modeling_llama4.Llama4Router", "phimoe.modeling_phimoe.PhimoeTopKRouter"):
    refuse_layer(
        f"transformers.models.{router}",
        "its forward returns the experts that it chooses, not the product with its weight: exclude it",
    )
refuse_layer(
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear",
    "its forward multiplies each group of its input by some rows of its weight: exclude it",
)
for quantized in ("utils.WeightedQuantizedModule", "embedding_ops.Embedding"):
    refuse_layer(
        f"torch.ao.nn.quantized.modules.{quantized}",
        "it was quantized by torch.ao, which leaves no weight to adapt: adapt and merge before quantizing",
    )

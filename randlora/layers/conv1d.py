"""transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored ``(in_features, out_features)``."""

import sys
from collections.abc import Callable

from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.registry import register_layer


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

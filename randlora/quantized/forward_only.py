"""Layers of GPTQ, AWQ, AQLM and EETQ, whose kernels multiply by codes that nothing here dequantizes.

They are known by name, so none of these libraries is imported.
"""

from __future__ import annotations

from typing import Any

from randlora.layers.registry import refuse_layer, register_layer
from randlora.quantized.layer import ForwardOnly


@register_layer("gptqmodel.nn_modules.qlinear.BaseQuantLinear")
@register_layer("awq.modules.linear.gemm.WQLinear_GEMM")
@register_layer("aqlm.inference.QuantizedLinear")
class CodesAdapter(ForwardOnly):
    """Adapts layers of gptqmodel (GPTQ, AWQ and its other formats), autoawq and aqlm."""


@register_layer("transformers.integrations.eetq.EetqLinear")
class EetqAdapter(ForwardOnly):
    """Adapts a layer of EETQ as in transformers: int8 with a scale for each output."""

    @staticmethod
    def features(owner: Any) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, as the codes are stored."""
        in_features, out_features = owner.weight.shape
        return in_features, out_features


refuse_layer(
    "gptqmodel.nn_modules.qlinear.torch.TorchQuantEmbeddings",
    "it is a quantized embedding: exclude it",
)

"""The capability table: one row per kind of layer that can be adapted. Every law runs over every row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers.pytorch_utils import Conv1D

from tests.codes import step, written_out


@dataclass(frozen=True)
class LayerKind:
    """How to make a layer of one kind with random weights, and how to read it.

    Attributes:
        name: For test ids.
        build: Makes a layer from ``(in_features, out_features, bias, dtype)``.
        weight: Reads its weight as ``(out_features, in_features)``.
        dtypes: What it can hold, or compute in where it holds codes; the most exact first.
        step: Reads how far apart the levels of its codes are, ``(out_features, in_features)``; ``None`` without codes.
        is_one_operation: Whether base layer and adapter are computed as one, in training.
        keeps_dtype: Whether its output is of the input's dtype under autocast too.
    """

    name: str
    build: Callable[[int, int, bool, torch.dtype], nn.Module]
    weight: Callable[[nn.Module], Tensor]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    step: Callable[[nn.Module], Tensor] | None = None
    is_one_operation: bool = True
    keeps_dtype: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether it holds codes."""
        return self.step is not None

    @property
    def exact(self) -> torch.dtype:
        """The most exact dtype that a layer of this kind gives outputs of."""
        return self.dtypes[0]


def _linear(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def _conv1d(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias)
    if not bias:
        nn.init.zeros_(layer.bias)
    converted: nn.Module = layer.to(dtype)
    return converted


def _of_4_bits(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, blocksize: int = 64, **options: Any
) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(in_features, out_features, bias, compute_dtype=dtype, **options)
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(out_features, in_features) * 0.3, blocksize=blocksize, module=layer, **options
    )
    layer.support_avx512bf16_for_cpu = False  # see tests/test_quantized_layers.py for what it does otherwise
    return _quantize(layer, dtype)


def _of_8_bits(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, threshold: float = 0.0
) -> nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(in_features, out_features, bias, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(out_features, in_features) * 0.3, requires_grad=False)
    return _quantize(layer, dtype)


def _quantize(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Move it to its device, as a user does; its own forward would give the bias the input's dtype."""
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer.to("cpu")


_quantized = partial(
    LayerKind,
    weight=written_out,
    step=step,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
_quantized_4bit = partial(_quantized, keeps_dtype=True)
LAYER_KINDS = (
    LayerKind("Linear", _linear, lambda layer: layer.get_parameter("weight").detach()),
    LayerKind("Conv1D", _conv1d, lambda layer: layer.get_parameter("weight").detach().T),
    _quantized_4bit("NF4", partial(_of_4_bits, quant_type="nf4", compress_statistics=False)),
    _quantized_4bit("NF4-double", partial(_of_4_bits, quant_type="nf4", blocksize=128)),
    _quantized_4bit("FP4", partial(_of_4_bits, quant_type="fp4", blocksize=32, compress_statistics=False)),
    _quantized_4bit("FP4-double", partial(_of_4_bits, quant_type="fp4")),
    _quantized("8bit", _of_8_bits, is_one_operation=False),
    _quantized("8bit-outliers", partial(_of_8_bits, threshold=2.0), is_one_operation=False),
)

every_kind = pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.name)
every_dense_kind = pytest.mark.parametrize(
    "kind", [kind for kind in LAYER_KINDS if not kind.is_quantized], ids=lambda kind: kind.name
)
compiles_codes = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7", reason="the compiler of torch 2.6 does not know bitsandbytes' parameters"
)
COMPILED = "Linear", "Conv1D", "NF4-double"
"""What `make test` compiles; `make slow` compiles the others."""


def _compiled(kind: LayerKind) -> Any:
    marks = [compiles_codes] * kind.is_quantized + [pytest.mark.slow] * (kind.name not in COMPILED)
    return pytest.param(kind, marks=marks)


every_kind_compiled = pytest.mark.parametrize(
    "kind", [_compiled(kind) for kind in LAYER_KINDS], ids=lambda kind: kind.name
)
every_kind_of_4_bits_compiled = pytest.mark.parametrize(
    "kind", [_compiled(kind) for kind in LAYER_KINDS if kind.keeps_dtype], ids=lambda kind: kind.name
)
every_quantized_kind = pytest.mark.parametrize(
    "kind", [kind for kind in LAYER_KINDS if kind.is_quantized], ids=lambda kind: kind.name
)


def _id(value: object) -> str:
    return value.name if isinstance(value, LayerKind) else str(value).removeprefix("torch.")


_all = [(kind, dtype) for kind in LAYER_KINDS for dtype in kind.dtypes]
every_kind_and_dtype = pytest.mark.parametrize(("kind", "dtype"), _all, ids=_id)
every_dense_kind_and_dtype = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind, dtype in _all if not kind.is_quantized], ids=_id
)
every_quantized_kind_and_dtype = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind, dtype in _all if kind.is_quantized], ids=_id
)

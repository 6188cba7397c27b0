"""The capability table: one row per kind of layer that can be adapted. Every law runs over every row."""

import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes
import bitsandbytes.backends.default.ops as portable
import pytest
import torch
from hypothesis import reject
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers.pytorch_utils import Conv1D

from randlora.layers import register_layer
from randlora.quantized import ForwardOnly
from tests.codes import step, written_out

for _compute in ("_dequantize_4bit_compute", "_dequantize_blockwise_compute"):
    # else it is compiled for each shape whose rows are odd, for a second each and in each process
    vars(portable)[_compute] = vars(portable)[_compute].__wrapped__

try:
    quantization: Any = importlib.import_module("torchao.quantization")
except Exception:  # it raises whatever comes of a torch that it was not built for
    quantization = None


@dataclass(frozen=True)
class LayerKind:
    """How to make a layer of one kind with random weights, and how to read it."""

    name: str
    build: Callable[[int, int, bool, torch.dtype], nn.Module]  # from (in_features, out_features, bias, dtype)
    weight: Callable[[Any], Tensor]  # (out_features, in_features)
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    """What it can hold, or compute in where it holds codes; the most exact first."""
    step: Callable[[nn.Module], Tensor] | None = None  # how far apart the levels of its codes are
    library: str = ""  # that quantized it
    merges: bool = True
    is_one_operation: bool = True  # whether base layer and adapter are computed as one, in training
    converts: bool = True  # whether it computes in another dtype, also float64, once its model is converted
    backpropagates: bool = True  # whether the layer alone computes the gradient of its input
    rounds_inputs: bool = False  # which must then not be empty, so that outputs are off by percents
    pickles: bool = True  # without an adapter

    @property
    def is_quantized(self) -> bool:
        return bool(self.library)

    @property
    def exact(self) -> torch.dtype:
        return self.dtypes[0]


def _conv1d(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
    layer: Any = Conv1D(out_features, in_features)
    layer.weight = nn.Parameter(torch.randn(in_features, out_features, dtype=dtype) * 0.3)
    layer.bias = nn.Parameter(torch.randn(out_features, dtype=dtype) * bias)
    return layer  # type: ignore[no-any-return]


def _of_4_bits(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, blocksize: int = 64, **options: Any
) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(in_features, out_features, bias, compute_dtype=dtype, **options)
    weight = torch.randn(out_features, in_features) * 0.3
    layer.weight = bitsandbytes.nn.Params4bit(weight, blocksize=blocksize, module=layer, **options)
    layer.support_avx512bf16_for_cpu = False  # see tests/test_quantized_bnb.py for what it does otherwise
    return _quantized_on_cpu(layer, dtype)


def _of_8_bits(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype, *, threshold: float = 0.0
) -> nn.Module:
    layer = bitsandbytes.nn.Linear8bitLt(in_features, out_features, bias, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(out_features, in_features) * 0.3, requires_grad=False)
    return _quantized_on_cpu(layer, dtype)


def _quantized_on_cpu(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer.to("cpu")


class Coded(nn.Module):
    """A layer of which only the forward is known: codes in one dimension, as the kernel of a library would have."""

    codes: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.randint(-40, 41, (out_features * in_features,), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.view(self.out_features, -1).to(x.dtype) / 64, self.bias)


@register_layer(Coded)
class CodedAdapter(ForwardOnly):
    """Adapts it."""


CODED = (torch.float32, torch.bfloat16, torch.float16)
_quantized = partial(LayerKind, weight=written_out, step=step, dtypes=CODED)
_quantized_4bit = partial(_quantized, library="bitsandbytes")
_quantized_8bit = partial(_quantized, library="bitsandbytes", is_one_operation=False)


def _of_torchao(name: str, config: str, *, weight_dtype: str | None = None, **columns: Any) -> list[LayerKind]:
    def build(in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        if 1 in (in_features, out_features):
            reject()  # which torchao can neither quantize nor multiply by
        layer = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        nn.init.normal_(layer.weight, std=0.3)
        options = {"weight_dtype": getattr(torch, weight_dtype)} if weight_dtype else {}
        quantization.quantize_(nn.Sequential(layer), getattr(quantization, config)(**options))
        del layer.extra_repr  # which cannot be pickled, and hides the adapters
        return layer

    kind = _quantized(name, build, library="torchao", is_one_operation=False, converts=False, **columns)
    return [kind] if quantization is not None else []


LAYER_KINDS = (
    LayerKind(
        "Linear",
        lambda into, out, bias, dtype: nn.Linear(into, out, bias, dtype=dtype),
        lambda layer: layer.weight.detach(),
    ),
    LayerKind("Conv1D", _conv1d, lambda layer: layer.weight.detach().T),
    _quantized_4bit("NF4", partial(_of_4_bits, quant_type="nf4", compress_statistics=False)),
    _quantized_4bit("NF4-double", partial(_of_4_bits, quant_type="nf4", blocksize=128)),
    _quantized_4bit("FP4", partial(_of_4_bits, quant_type="fp4", blocksize=32, compress_statistics=False)),
    _quantized_4bit("FP4-double", partial(_of_4_bits, quant_type="fp4")),
    _quantized_8bit("8bit", _of_8_bits),
    _quantized_8bit("8bit-outliers", partial(_of_8_bits, threshold=2.0)),
    *_of_torchao("int8", "Int8WeightOnlyConfig"),
    *_of_torchao("int8-inputs", "Int8DynamicActivationInt8WeightConfig", backpropagates=False, rounds_inputs=True),
    *_of_torchao("float8", "Float8WeightOnlyConfig", pickles=False),
    *_of_torchao("int4", "IntxWeightOnlyConfig", weight_dtype="int4"),
    LayerKind(
        "forward-only",
        lambda into, out, bias, dtype: Coded(into, out, bias=bias, dtype=dtype),
        lambda layer: layer.codes.view(layer.out_features, -1).double() / 64,
        dtypes=CODED,
        library="tests",
        merges=False,
        is_one_operation=False,
    ),
)
BITSANDBYTES = [kind for kind in LAYER_KINDS if kind.library == "bitsandbytes"]
COMPILED = "Linear", "Conv1D", "NF4-double"
"""What `make test` compiles; `make slow` compiles the others."""
DEVICE = os.environ.get("RANDLORA_TEST_DEVICE", "cpu")
"""Another one than the CPU takes few sizes and dtypes of codes: see `CODES` of tests/test_layers.py."""


def _marks(kind: LayerKind) -> list[pytest.MarkDecorator]:
    is_old, reason = TorchVersion(torch.__version__) < "2.7", "torch 2.6 does not know bitsandbytes' parameters"
    marks = [pytest.mark.skipif(is_old and kind.is_quantized, reason=reason)]
    return marks if kind.name in COMPILED else [*marks, pytest.mark.slow]


def _every(kinds: Iterable[LayerKind], *, compiled: bool = False) -> pytest.MarkDecorator:
    rows = [pytest.param(kind, marks=_marks(kind) if compiled else [], id=kind.name) for kind in kinds]
    return pytest.mark.parametrize("kind", rows)


def _every_dtype(kinds: Iterable[LayerKind]) -> pytest.MarkDecorator:
    rows = [(kind, dtype) for kind in kinds for dtype in kind.dtypes]
    ids = [f"{kind.name}-{str(dtype).removeprefix('torch.')}" for kind, dtype in rows]
    return pytest.mark.parametrize(("kind", "dtype"), rows, ids=ids)


_dense = [kind for kind in LAYER_KINDS if not kind.is_quantized]
_here = LAYER_KINDS if DEVICE == "cpu" else _dense
_mergeable = [kind for kind in LAYER_KINDS if kind.merges]

every_kind = _every(_here)
every_dense_kind = _every(_dense)
every_mergeable_kind = _every(_mergeable)
every_quantized_kind = _every(kind for kind in _mergeable if kind.is_quantized)
every_convertible_kind = _every(kind for kind in _here if kind.converts)
every_kind_compiled = _every(_here, compiled=True)
every_kind_and_dtype = _every_dtype(_here)
every_mergeable_kind_and_dtype = _every_dtype(_mergeable)
every_dense_kind_and_dtype = _every_dtype(_dense)

"""Adapter layers of what other libraries than bitsandbytes quantized: HQQ, torchao, GPTQ, AWQ, AQLM and EETQ.

A library is imported only if the model has layers of it. Written for hqq 0.2.8 and torchao 0.18; a layer of torchao
remains an `nn.Linear`, with a weight of a subclass of `torch.Tensor`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.layers.base import input_of
from randlora.layers.linear import LinearAdapter
from randlora.layers.registry import BY_WEIGHT, qualified_names, refuse_layer, register_layer
from randlora.layers.weight import Into
from randlora.model.install import CHECKS
from randlora.places import Keeper, Place
from randlora.quantized.layer import NOT_HERE, ForwardOnly, QuantizedLayer, twin_of

HQQ = "hqq.core.quantize"
TORCHAO = "torchao.quantization"
INT8, FLOAT8, INTX = f"{TORCHAO}.Int8Tensor", f"{TORCHAO}.Float8Tensor", f"{TORCHAO}.IntxUnpackedToInt8Tensor"
ANY = "torchao.utils.TorchAOBaseTensor"  # the base class of weights, also of those whose codes are packed for kernels


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


refuse_layer("gptqmodel.nn_modules.qlinear.torch.TorchQuantEmbeddings", "it is a quantized embedding: exclude it")
FP4 = {"transformers.integrations.mxfp4": "Mxfp4GptOssExperts", "transformers.integrations.nvfp4": "NVFP4Linear"}
WIDER = "through which no gradient passes: load the model with Mxfp4Config(dequantize=True), or without NVFP4Config"
for fp4 in map(".".join, FP4.items()):
    refuse_layer(fp4, f"has 4-bit floats, {WIDER}")


def _has_fp4(module: nn.Module) -> bool:
    kinds = tuple(getattr(sys.modules[name], kind) for name, kind in FP4.items() if name in sys.modules)
    return bool(kinds) and any(isinstance(each, kinds) for each in module.modules())


def refuse_training(module: nn.Module, args: Any) -> None:  # noqa: ARG001  # a hook's signature
    """Raise an `AdapterError` if a model is trained whose adapted layers would get some of their gradients only."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
        raise AdapterError(f"cannot train a model with 4-bit floats, {WIDER}")


CHECKS[refuse_training] = _has_fp4


@register_layer(f"{HQQ}.HQQLinear")
class HQQAdapter(QuantizedLayer):
    """Adapts an ``HQQLinear``. Its own forward runs, with any of its backends, and the adapter's output is added."""

    kept: ClassVar[tuple[str, ...]] = (
        *("ready", "in_gpu", "bias", "axis", "channel_wise", "device", "compute_dtype", "quant_config", "del_orig"),
        *("offload_meta", "linear_layer", "meta", "encoded_state_dict"),
    )

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``HQQLinear.forward``, which belongs to the chosen backend."""
        return sys.modules[HQQ].HQQLinear.forward  # type: ignore[no-any-return]

    @classmethod
    def nbytes_of(cls, owner: Any) -> int:
        """Return the bytes of codes, scales and zeros."""
        return super().nbytes_of(owner) + sum(held.nbytes for held in owner.meta.values() if isinstance(held, Tensor))

    def product(self, owner: nn.Module, x: object) -> None:
        """Return ``None``: the layer's own forward dequantizes and multiplies."""

    def compute_dtype(self, owner: Any) -> torch.dtype | None:
        """Return the dtype that the layer computes in."""
        return owner.compute_dtype  # type: ignore[no-any-return]

    def merge_obstacle(self, owner: Any, into: Into | None) -> str | None:
        """Return why the owner cannot be quantized again, or become a plain layer, or ``None``."""
        if into is not None and into.quantized == "requantize" and "scale" not in owner.meta:
            return "has scales that are quantized or offloaded: merge with quantized='dequantize'"
        return super().merge_obstacle(owner, into)

    def written_out(self, owner: Any, held: tuple[nn.Parameter, dict[str, Any]] | None = None) -> Tensor:
        """Return the dequantized weight in float32."""
        twin = twin_of(owner)
        codes, meta = held or self.codes(owner)
        twin._parameters["W_q"], twin.meta = codes, dict(meta)  # dequantizing adds to it, and removes
        return twin.dequantize().float()  # type: ignore[no-any-return]

    def requantized(self, owner: Any, weight: Tensor) -> tuple[tuple[nn.Parameter, dict[str, Any]], float]:
        """Quantize a weight to codes of as many bits, with a scale for as many entries."""
        options = copy.deepcopy(owner.quant_config)
        layer = type(owner).randlora_base(
            None, {**options, "offload_meta": False}, compute_dtype=owner.compute_dtype, device=str(weight.device)
        )
        layer.quantize(weight, **options)
        return (layer.W_q, layer.meta), float(layer.meta["scale"].abs().max())

    def codes(self, owner: Any) -> tuple[nn.Parameter, dict[str, Any]]:
        """Return the codes with their scales and the way in which they are packed."""
        return owner.W_q, owner.meta

    def put_in(self, owner: Any, held: tuple[nn.Parameter, dict[str, Any]]) -> None:
        """Replace the codes of the layer and their scales."""
        owner._parameters["W_q"], owner.meta = held

    def write_state(self, layer: nn.Module, destination: dict[str, Any], prefix: str) -> None:
        """Write the entries that the layer itself writes, which torch's own saving leaves out."""
        layer.state_dict(destination=destination, prefix=prefix)

    def move(self, owner: Any, device: torch.device) -> None:
        """Move the owner. Its ``to`` does nothing."""
        owner.cuda(str(device))


class TorchaoPackedAdapter(ForwardOnly):
    """Adapts an `nn.Linear` with a weight of torchao in any other format, such as int4 packed for a GPU."""


class TorchaoAdapter(QuantizedLayer):
    """Adapts an `nn.Linear` with int8, float8 or 1 to 8 bits. Its own forward runs, and an adapter adds to it."""

    kept: ClassVar[tuple[str, ...]] = ("extra_repr",)

    @classmethod
    def obstacle(cls, owner: nn.Module) -> str | None:
        """Return why this layer cannot be adapted, or ``None``."""
        weight: Any = owner.get_parameter("weight")
        if weight.qdata.is_meta:
            return NOT_HERE
        if isinstance(weight.block_size, list | tuple) and _granularity(weight) is not None:
            return None
        return f"has a scale for each block of {weight.block_size}, expected one for each row, group or tensor"

    plain_forward = LinearAdapter.plain_forward

    @classmethod
    def nbytes_of(cls, owner: nn.Module) -> int:
        """Return the bytes of codes, scales and zeros."""
        weight: Any = owner.get_parameter("weight")
        return sum(getattr(weight, name).nbytes for name in weight.tensor_data_names)

    def compute_dtype(self, owner: nn.Module) -> torch.dtype | None:
        """Return the dtype that the weight had before it was quantized."""
        return owner.get_parameter("weight").dtype

    def base_output(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the owner's output, with gradients of the input, which torchao lacks if it quantizes the input."""
        x, weight, bias = input_of(owner, args, kwargs), owner._parameters["weight"], owner._parameters["bias"]
        options = (getattr(weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
        quantizes_input = any(option is not None for option in options) and isinstance(x, Tensor)
        if quantizes_input and torch.is_grad_enabled() and self.runs_plain_forward(owner):
            return _Through.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]
        return super().base_output(owner, base_forward, *args, **kwargs)

    def written_out(self, owner: nn.Module, held: Any = None) -> Tensor:
        """Return the dequantized weight in float32."""
        weight: Any = owner.get_parameter("weight") if held is None else held
        return _dequantized(weight, torch.float32)

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[nn.Parameter, float]:
        """Quantize a weight to codes of the same dtype, with a scale for as many entries."""
        own: Any = owner.get_parameter("weight")
        if _is_of(own, INTX):
            mapping = sys.modules["torchao.quantization"].MappingType
            codes = type(own).from_hp(
                weight.to(own.dtype),
                own.block_size,
                own.target_dtype,
                mapping_type=mapping.ASYMMETRIC if own.zero_point.any() else mapping.SYMMETRIC,
                activation_quantization=own.activation_quantization,
            )
            return nn.Parameter(codes, requires_grad=False), float(codes.scale.max())
        options, step = {"granularity": _granularity(own), "act_quant_kwargs": own.act_quant_kwargs}, 1.0
        if (dtype := own.qdata.dtype) != torch.int8:
            options |= {"float8_dtype": dtype, "mm_config": own.mm_config, "kernel_preference": own.kernel_preference}
            numbers = torch.finfo(dtype)
            step = 2.0 ** (math.frexp(numbers.max)[1] - 1) * numbers.eps
        codes = type(own).from_hp(weight.to(own.dtype), **options)
        return nn.Parameter(codes, requires_grad=False), step * float(codes.scale.max())

    def codes(self, owner: nn.Module) -> nn.Parameter:
        """Return the weight."""
        return owner.get_parameter("weight")

    def put_in(self, owner: nn.Module, held: nn.Parameter) -> None:
        """Replace the weight."""
        owner._parameters["weight"] = held


BY_WEIGHT[ANY] = TorchaoPackedAdapter
BY_WEIGHT.update(dict.fromkeys((INTX, FLOAT8, INT8), TorchaoAdapter))


class _Through(torch.autograd.Function):
    """The product with a weight that quantizes the input, and the gradient of that with the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_bias = ctx.needs_input_grad
        grad_x = grad @ _dequantized(ctx.weight, grad.dtype) if needs_x else None
        return grad_x, None, grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None


class Codes(Place):
    """The place of a weight of torchao, whose values are its dequantized codes."""

    exchanges = "nothing"

    def __init__(self, weight: Any) -> None:
        """Take the weight."""
        self._weight = weight

    @property
    def is_complete(self) -> bool:
        """Whether there are codes."""
        return not self._weight.is_meta

    def read(self) -> Tensor:
        """Return the values, in the dtype that the weight had before it was quantized."""
        return self._weight.dequantize()  # type: ignore[no-any-return]

    whole = read

    def write(self, value: Tensor) -> None:  # noqa: ARG002
        """Refuse to write, because `TorchaoAdapter` exchanges the whole weight."""
        raise AdapterError("the weight is quantized by torchao: merge into it by randlora.merge")


class Torchao(Keeper):
    """Keeps weights as codes of torchao."""

    def place_at(self, tensor: Tensor) -> Codes | None:
        """Return the place of a weight of torchao."""
        return Codes(tensor) if type(tensor) is not nn.Parameter and _is_of(tensor, ANY) else None


def _is_of(weight: Tensor, kind: str) -> bool:
    """Whether a weight is of a class, or of a subclass, without importing it: an `isinstance` by name."""
    return kind in qualified_names(type(weight))


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    values: Tensor = weight.to(dtype).dequantize() if _is_of(weight, INTX) else weight.dequantize(dtype)
    return values


def _granularity(weight: Any) -> Any:
    """Return for which entries of a weight there is one scale, as torchao says it; ``None`` for what is not known."""
    sizes = sys.modules["torchao.quantization.granularity"]
    block, (rows, columns) = tuple(weight.block_size), weight.shape
    if block == (1, columns):
        return sizes.PerRow()
    if block == (rows, columns):
        return sizes.PerTensor()
    return sizes.PerGroup(block[1]) if block[0] == 1 else None

"""What the codes of bitsandbytes mean, read by tables in float64; shares no code with the library."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def written_out(layer: nn.Module) -> Tensor:
    """Write a quantized layer's weight out, ``(out_features, in_features)`` in float64."""
    if _is_of_torchao(layer):
        return _of_torchao(layer.weight)
    return _of_8_bits(layer) if hasattr(layer, "state") else _of_4_bits(layer.weight)


def step(layer: nn.Module) -> Tensor:
    """Measure the widest gap between neighboring levels around each entry, ``(out_features, in_features)``."""
    if _is_of_torchao(layer):
        weight: Any = layer.weight
        widest = 1 if weight.qdata.dtype == torch.int8 else 448 - 416
        return widest * _of_each(weight.scale, weight)
    if hasattr(layer, "state"):
        scales: Tensor = _scales_of_8_bits(layer)
        return (scales.double() / 127).unsqueeze(1).expand(layer.weight.shape)  # type: ignore[arg-type]
    state: Any = layer.weight.quant_state  # type: ignore[union-attr]
    gap: float = np.diff(np.sort(state.code.double().numpy())).max()
    return gap * scale_of(layer).abs()


def scale_of(layer: nn.Module) -> Tensor:
    """Repeat the scales of 4-bit codes for each entry, ``(out_features, in_features)``."""
    state: Any = layer.weight.quant_state  # type: ignore[union-attr]
    return torch.from_numpy(_scale_of_each(state, state.shape.numel())).view(state.shape)


def assert_rounded_to_nearest(layer: nn.Module, exact: Tensor) -> None:
    """Check that the levels of a layer are those nearest to exact entries, ``(out_features, in_features)``.

    Half a gap away at most; scales that are codes themselves add what is lost in them, much for a block of small
    entries beside others.
    """
    exact = exact.double()
    lost = _lost_in_scales(layer, exact)
    is_nested = getattr(getattr(layer.weight, "quant_state", None), "nested", False)
    assert lost.max() <= exact.abs().max() * (0.05 if is_nested else 1e-5)
    error, allowed = (written_out(layer) - exact).abs(), step(layer) / 2 + 1e-5 * exact.abs().max()
    assert (error <= allowed + 1.2 * lost).all()  # a level is off by as much, half a gap by a fifth of it at most


def _is_of_torchao(layer: nn.Module) -> bool:
    return hasattr(layer.weight, "qdata")


def _of_torchao(weight: Any) -> Tensor:
    zeros = getattr(weight, "zero_point", torch.zeros(1, 1))
    values: Tensor = (weight.qdata.double() - _of_each(zeros, weight)) * _of_each(weight.scale, weight)
    return values


def _of_each(scales: Tensor, weight: Any) -> Tensor:
    """Repeat scales, one for a block of columns of each row, for each entry."""
    return scales.double().expand(len(weight), -1).repeat_interleave(weight.shape[1] // scales.shape[1], 1)


def _lost_in_scales(layer: nn.Module, exact: Tensor) -> Tensor:
    """Measure how far each entry's scale is from the largest entry that shares it, ``(out_features, in_features)``."""
    if _is_of_torchao(layer):
        return torch.zeros_like(exact)
    if hasattr(layer, "state"):
        return (_scales_of_8_bits(layer) - exact.abs().amax(dim=1)).abs().unsqueeze(1).expand(exact.shape)
    state: Any = layer.weight.quant_state  # type: ignore[union-attr]
    blocks = exact.flatten().split(state.blocksize)
    return (scale_of(layer) - torch.cat([block.abs().max().expand_as(block) for block in blocks]).view_as(exact)).abs()


def _of_8_bits(layer: Any) -> Tensor:
    rows = zip(layer.weight.tolist(), _scales_of_8_bits(layer).tolist(), strict=True)
    return torch.tensor([[code * scale / 127 for code in row] for row, scale in rows], dtype=torch.float64)


def _scales_of_8_bits(layer: Any) -> Tensor:
    scales: Tensor = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return scales


def _of_4_bits(weight: Any) -> Tensor:
    state = weight.quant_state
    packed = weight.data.contiguous().view(torch.uint8).flatten().numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: state.shape.numel()]
    levels = state.code.double().numpy()[codes]
    return torch.from_numpy(levels * _scale_of_each(state, len(levels))).view(state.shape)


def _scale_of_each(state: Any, count: int) -> Any:
    """Repeat each block's scale; scales may be codes themselves, in blocks of their own."""
    if not state.nested:
        return np.repeat(state.absmax.double().numpy(), state.blocksize)[:count]
    scales = state.state2.code.double().numpy()[state.absmax.numpy()].reshape(-1)
    outer = np.repeat(state.state2.absmax.double().numpy(), state.state2.blocksize)[: len(scales)]
    return np.repeat(scales * outer + state.offset.item(), state.blocksize)[:count]

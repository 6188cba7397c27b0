"""What the codes of bitsandbytes and torchao mean, read by tables in float64; shares no code with the library."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Codes(NamedTuple):
    """What the codes of a layer stand for before they are scaled, ``(out_features, in_features)`` in float64.

    ``scales`` has one for each entry, and ``gap`` is the widest between two neighboring levels.
    """

    levels: Tensor
    scales: Tensor
    gap: float


def written_out(layer: nn.Module) -> Tensor:
    """Write a quantized layer's weight out, ``(out_features, in_features)`` in float64."""
    codes = _codes_of(layer)
    return codes.levels * codes.scales


def step(layer: nn.Module) -> Tensor:
    """Measure the widest gap between neighboring levels around each entry, ``(out_features, in_features)``."""
    codes = _codes_of(layer)
    return codes.gap * codes.scales.abs()


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


def _codes_of(layer: Any) -> Codes:
    weight = layer.weight
    if hasattr(weight, "qdata"):  # of torchao
        zeros = getattr(weight, "zero_point", torch.zeros(1, 1))
        gap = 1 if weight.qdata.dtype == torch.int8 else 448 - 416
        return Codes(weight.qdata.double() - _of_each(zeros, weight), _of_each(weight.scale, weight), gap)
    if hasattr(layer, "state"):  # of 8 bits
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        return Codes(weight.double(), (scales.double() / 127).unsqueeze(1).expand(weight.shape), 1)
    state = weight.quant_state
    packed = weight.data.contiguous().view(torch.uint8).flatten().numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: state.shape.numel()]
    table = state.code.double().numpy()
    levels, each = (torch.from_numpy(values).view(state.shape) for values in (table[codes], _scales(state, len(codes))))
    return Codes(levels, each, np.diff(np.sort(table)).max())


def _of_each(scales: Tensor, weight: Any) -> Tensor:
    return scales.double().expand(len(weight), -1).repeat_interleave(weight.shape[1] // scales.shape[1], 1)


def _scales(state: Any, count: int) -> Any:
    """Repeat each block's scale for each of its entries; scales may be codes themselves, in blocks of their own."""
    if not state.nested:
        return np.repeat(state.absmax.double().numpy(), state.blocksize)[:count]
    scales = state.state2.code.double().numpy()[state.absmax.numpy()].reshape(-1)
    outer = np.repeat(state.state2.absmax.double().numpy(), state.state2.blocksize)[: len(scales)]
    return np.repeat(scales * outer + state.offset.item(), state.blocksize)[:count]


def _lost_in_scales(layer: Any, exact: Tensor) -> Tensor:
    """Measure how far each entry's scale is from the largest entry that shares it, ``(out_features, in_features)``."""
    if hasattr(layer.weight, "qdata"):
        return torch.zeros_like(exact)
    scales = _codes_of(layer).scales
    if hasattr(layer, "state"):
        return (scales * 127 - exact.abs().amax(dim=1, keepdim=True)).abs()
    blocks = exact.flatten().split(layer.weight.quant_state.blocksize)
    return (scales - torch.cat([block.abs().max().expand_as(block) for block in blocks]).view_as(exact)).abs()

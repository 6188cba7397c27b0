"""Options and results of merging one layer."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Quantized = Literal["requantize", "dequantize"]


class Into(NamedTuple):
    """What a merge turns quantized layers into.

    Attributes:
        quantized: ``"requantize"`` for the same kind of layer, ``"dequantize"`` for a plain `nn.Linear`.
        dtype: The dtype of plain layers; ``None`` means the one that the quantized layer computes in.
    """

    quantized: Quantized = "requantize"
    dtype: torch.dtype | None = None


class RoundingLoss(NamedTuple):
    """The rounding error of quantizing a merged weight.

    Attributes:
        largest: The largest absolute error of an entry.
        step: The widest gap between two neighboring levels of the new codes, at the layer's largest scale.
        relative: The norm of the error as a share of the norm of the merged update.
    """

    largest: float
    step: float
    relative: float


class Merged(NamedTuple):
    """A weight before any quantization, the value for `AdapterLayer.exchange`, and the error if it was quantized."""

    weight: Tensor
    held: Any
    rounding: RoundingLoss | None = None

"""What a merge makes of one layer, before anything reads it."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Quantized = Literal["requantize", "dequantize"]


class Into(NamedTuple):
    """What a merge turns quantized layers into.

    Attributes:
        quantized: The same kind of layer with new codes, or a plain `nn.Linear`.
        dtype: Of a plain layer, if the caller named one.
        model_dtype: Of a plain layer otherwise, read from the model; where it shows none, a plain layer has the dtype
            that the quantized one computes in.
    """

    quantized: Quantized = "requantize"
    dtype: torch.dtype | None = None
    model_dtype: torch.dtype | None = None


class RoundingLoss(NamedTuple):
    """What rounding a merged weight to codes did to it.

    Attributes:
        largest: The largest difference between an entry and what its code stands for.
        step: The widest gap between two neighboring levels of the new codes, at the layer's largest scale.
        relative: The norm of all differences as a share of the norm of what was merged in.
    """

    largest: float
    step: float
    relative: float


class Merged(NamedTuple):
    """A layer with adapters folded in.

    Attributes:
        weight: Its weight, before any rounding to codes.
        held: What `AdapterLayer.exchange` puts in for the owner to read.
        rounding: What rounding to codes did, where that happened.
    """

    weight: Tensor
    held: Any
    rounding: RoundingLoss | None = None

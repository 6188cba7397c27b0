"""What a merge makes of one layer, before anything reads it."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Quantized = Literal["requantize", "dequantize"]


class Into(NamedTuple):
    """What a merge turns quantized layers into.

    Attributes:
        quantized: The same kind of layer with new codes, or a plain `nn.Linear`.
        dtype: Of a plain layer; ``None`` means that of the quantized layer's inputs.
        model_dtype: What that means before the first input; where the model does not show it, the dtype that the layer
            computes in.
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
        held: What `AdapterLayer.exchange` puts in for the base layer to read.
        error: What rounding to codes did, where that happened.
    """

    weight: Tensor
    held: Any
    error: RoundingLoss | None = None

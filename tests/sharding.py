"""What others make of a model's parameters when they spread them over processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Zero3:
    """What DeepSpeed's ZeRO-3 does to parameters: each is an empty plain tensor that keeps its shape beside it.

    As seen with DeepSpeed 0.19.8, which is not installed here.
    """

    def __init__(self, model: nn.Module) -> None:
        self.whole: dict[nn.Parameter, Tensor] = {}
        for index, parameter in enumerate(model.parameters()):
            self.whole[parameter] = parameter.data
            vars(parameter).update(ds_id=index, ds_shape=parameter.shape, ds_numel=parameter.numel())
        self._partition()

    def _partition(self) -> None:
        for parameter in self.whole:
            vars(parameter)["ds_status"] = "NOT_AVAILABLE"
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Make the parameters whole inside the block, as ``GatheredParameters`` does."""
        for parameter, whole in self.whole.items():
            vars(parameter)["ds_status"] = "AVAILABLE"
            parameter.data = whole
        yield
        self._partition()

"""`nn.Linear`: the weight is stored ``(out_features, in_features)``."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from randlora.blocks import Forward
from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer
from randlora.layers.cast import cast
from randlora.layers.in_place import plain_class
from randlora.layers.inputs import input_of
from randlora.layers.read_weight import ReadWeight
from randlora.layers.registry import refuse_layer, register_layer
from randlora.layers.scopes import run_forward

FORWARD = nn.Linear.forward  # read on import, in case it is replaced later


class ReadLinear(ReadWeight):
    """Adapts an `nn.Linear` whose weight code reads: the module around it, a trainer, or the forward of a subclass.

    Whatever computes with the weight gets weight + update, as it would after merging. The plain forward, if anything
    calls it, computes layer and adapter as one operation and does not form the update.
    """

    is_called: ClassVar[bool] = True

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, even if the weight is codes or DeepSpeed's ZeRO-3 emptied it."""
        assert isinstance(owner, nn.Linear)
        return int(owner.in_features), int(owner.out_features)  # which are tensors in some models

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the update unchanged, ``(out_features, in_features)``."""
        return delta

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``nn.Linear.forward``, as torch defines it."""
        return FORWARD

    @classmethod
    def takes_dropout(cls, owner: nn.Module) -> bool:
        """Whether the module's class has the plain forward; what reads the weight cannot drop entries."""
        return plain_class(owner).forward is FORWARD

    def value(self, owner: nn.Module) -> Tensor:
        """Compute the weight plus the updates of the active adapters."""
        if owner.training and any(part.adapter.config.dropout for part, _ in self.active()):
            raise AdapterError(
                f"code reads the weight of an adapted {plain_class(owner).__name__} instead of calling it, where the "
                "adapter's dropout cannot reach, as TRL's trainers do with an output head: make the adapter without "
                "dropout, or exclude the layer"
            )
        return super().value(owner)

    def adds_to_output(self, owner: nn.Module) -> bool:
        """Whether the module has the plain forward; another one reads weight + update."""
        return self.runs_plain_forward(owner)

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the plain forward plus those of the active adapters, or what another forward returns."""
        if self.adds_to_output(owner):
            return super().forward(owner, base_forward, *args, **kwargs)
        self.held_weight(owner)
        own = partial(run_forward, owner, self.own_forward or base_forward)  # which reads the weight
        if (run := self.state.run) is not None and run.takes_over:
            return run.reading(self, Forward(owner, own, args, kwargs))
        return own(*args, **kwargs)

    def base_output(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the plain forward without adapters, which does not read the attribute."""
        if not self.adds_to_output(owner):
            return super().base_output(owner, base_forward, *args, **kwargs)
        bias: Any = owner.bias
        return F.linear(input_of(owner, args, kwargs), cast(owner, "weight", self.held_weight(owner)), bias)


@register_layer("transformers.models.falcon.modeling_falcon.FalconLinear")
@register_layer("timm.layers.linear.Linear")
@register_layer(nn.Linear)
class LinearAdapter(AdapterLayer):
    """Adapts an `nn.Linear`, or a subclass whose forward is the product with its weight.

    A subclass with another forward is adapted by `ReadLinear` unless it is registered.
    """

    as_read: ClassVar[type[AdapterLayer] | None] = ReadLinear

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)``, even if the weight is codes or DeepSpeed's ZeRO-3 emptied it."""
        return ReadLinear.features(owner)

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the update unchanged, ``(out_features, in_features)``."""
        return delta

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return ``nn.Linear.forward``, as torch defines it."""
        return FORWARD


for router in ("llama4.modeling_llama4.Llama4Router", "phimoe.modeling_phimoe.PhimoeTopKRouter"):
    refuse_layer(
        f"transformers.models.{router}",
        "its forward returns the experts that it chooses, not the product with its weight: exclude it",
    )
refuse_layer(
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear",
    "its forward multiplies each group of its input by some rows of its weight: exclude it",
)
for quantized in ("utils.WeightedQuantizedModule", "embedding_ops.Embedding"):
    refuse_layer(
        f"torch.ao.nn.quantized.modules.{quantized}",
        "it was quantized by torch.ao, without a weight to train beside: adapt and merge before quantizing",
    )

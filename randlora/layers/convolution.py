"""torch's convolutions, whose kernel is adapted as a matrix: one row per output channel."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from randlora.bases.spec import Shape
from randlora.errors import AdapterError
from randlora.functional.region import Region, Spans, all_of
from randlora.layers.read_weight import ReadWeight
from randlora.layers.registry import register_layer
from randlora.layers.rows import Rows


@register_layer(nn.Conv1d)
@register_layer(nn.Conv2d)
@register_layer(nn.Conv3d)
@register_layer(nn.ConvTranspose1d)
@register_layer(nn.ConvTranspose2d)
@register_layer(nn.ConvTranspose3d)
class ConvolutionAdapter(ReadWeight):
    """Adapts the kernel of a convolution, viewed as a matrix.

    The update is ``(out_channels, in_channels/groups·prod(kernel_size))``, and for a transposed convolution, whose
    kernel is stored with the input channels first, ``(in_channels, out_channels/groups·prod(kernel_size))``.

    The owner's forward reads kernel + update and convolves with it once, so stride, padding, dilation, groups and
    memory format are torch's. Its autograd keeps this sum for backward, a tensor of the size of the kernel.
    """

    kind: ClassVar[str] = "convolution"

    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        """Return the sizes of a row and a column of the kernel as a matrix, even if DeepSpeed's ZeRO-3 emptied it."""
        assert isinstance(owner, nn.modules.conv._ConvNd)
        first, second = int(owner.out_channels), int(owner.in_channels)
        if owner.transposed:
            first, second = second, first
        return second // owner.groups * math.prod(owner.kernel_size), first

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        """Return the update unchanged, which has the kernel's entries in their order."""
        return delta

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """Return which arguments have the rows of the batch, which an input may lack."""
        x: Tensor = args[0] if args else kwargs["input"]
        if x.dim() != len(owner.kernel_size) + 2:
            raise AdapterError(
                f"an adapted {owner.randlora_base.__name__} was given an input of shape {tuple(x.shape)}, which has no "
                "batch: routed needs (batch, channels, ...)"
            )
        return super().rows_of(owner, args, kwargs)

    @classmethod
    def region_of(cls, shape: Shape, spans: Sequence[Spans]) -> Region:
        """Return the part of the update for a part of the kernel, which may be split by its channels."""
        rows, channels, *inside = spans
        if inside != [all_of(size) for size in shape[2:]]:
            raise AdapterError(f"a kernel of shape {tuple(shape)} is split inside, into {spans}: split its channels")
        entries = math.prod(shape[2:])
        return Region(rows, tuple((start * entries, stop * entries) for start, stop in channels))

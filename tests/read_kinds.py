"""The table of layers whose weight is adapted as it is read: tests/test_read_kinds.py runs every law over each row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from tests import reference
from tests.kit import fill

EVERY_DTYPE = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class ReadKind:
    """How to make a module of one kind with random weights, what to give it, and what an update means to it.

    Attributes:
        name: For test ids.
        kind: The kind of weight that its adapter layer states.
        build: Makes the module in float32.
        inputs: Makes the arguments of its forward in float32, always the same.
        attribute: The parameter that is adapted.
        in_layout: Puts an update, as `randlora.delta_weight` gives it, into the shape of the second argument.
        dtypes: What the module computes in.
        is_whole_read: Whether the forward reads all of weight + update, so that it computes the same bits as merged.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    attribute: str = "weight"
    in_layout: Callable[[Tensor, Tensor], Tensor] = lambda update, weight: update.reshape(weight.shape)
    dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE
    is_whole_read: bool = True

    @property
    def target(self) -> str:
        """The FQN of the weight in the model of `model`."""
        return "0" if self.attribute == "weight" else f"0.{self.attribute}"

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """Make a model of one such module, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(self.build()).to(dtype)

    def adapted(self, dtype: torch.dtype = torch.float32, *, filled: bool = True, **options: Any) -> nn.Sequential:
        """Make such a model with an adapter of the weight, with values as after some training if ``filled``."""
        model = self.model(dtype)
        randlora.inject(model, **{"r": 3, "alpha": 6, "targets": [self.target], "stream": "portable", **options})
        return fill(model) if filled else model

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """Make the arguments of the forward, those that are floating in a dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            given = self.inputs()
        return tuple(
            part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part for part in given
        )

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """Run the module of such a model."""
        output = model.get_submodule("0")(*self.arguments(dtype))
        found = output[0] if isinstance(output, tuple) else output
        assert isinstance(found, Tensor)
        return found

    def layer(self, model: nn.Module) -> AdapterLayer:
        """Return what adapts the weight."""
        return adapter_layers_of(model.get_submodule("0"))[self.attribute]

    def weight(self, model: nn.Module) -> nn.Parameter:
        """Return the parameter without any update."""
        return dict(model.named_parameters())[f"0.{self.attribute}"]

    def oracle_update(self, model: nn.Module, name: str = "default") -> Tensor:
        """Compute the update of one adapter in float64, as the library gives it: a matrix or a stack of them."""
        layer, owner = self.layer(model), model.get_submodule("0")
        part = layer.adapters[name]
        out_features, in_features = part.shape[-2:]
        sides = max(out_features, in_features), min(out_features, in_features)
        bases = part.basis.slices(*sides, device="cpu", dtype=torch.float64)
        lam, gamma = layer.diagonals_of(owner, name)
        matrix = partial(reference.delta_weight, *bases, scaling=part.scaling, in_features=in_features)
        if lam.dim() == 2:
            return matrix(lam, gamma)
        return torch.stack([matrix(*each) for each in zip(lam, gamma, strict=True)])

    def changed(self, base: nn.Module, *updates: Tensor) -> nn.Module:
        """Make a float64 copy of a plain model with updates added to the weight: an oracle by torch's own forward."""
        twin = self.model().double()
        twin.load_state_dict({name: tensor.double() for name, tensor in base.state_dict().items()})
        with torch.no_grad():
            weight = self.weight(twin)
            for update in updates:
                weight.add_(self.in_layout(update, weight))
        return twin


class Scaled(nn.Embedding):
    """An embedding that multiplies, as those of Gemma do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the rows times a number."""
        return super().forward(input) * 3


def _image(channels: int, *sizes: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, channels, *sizes),)


def _channels_last() -> nn.Module:
    return nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _ids(num_rows: int, *shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, num_rows, shape),)


_convolution = partial(ReadKind, kind="convolution")
_embedding = partial(ReadKind, kind="embedding", is_whole_read=False)
CONVOLUTIONS = (
    _convolution(name="Conv1d", build=lambda: nn.Conv1d(6, 8, 3), inputs=_image(6, 9)),
    _convolution(
        name="Conv1d-circular",
        build=lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular", bias=False),
        inputs=_image(4, 7),
    ),
    _convolution(name="Conv2d-stride", build=lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), inputs=_image(3, 7, 7)),
    _convolution(
        name="Conv2d-groups", build=lambda: nn.Conv2d(6, 4, (3, 2), dilation=2, groups=2), inputs=_image(6, 6, 5)
    ),
    _convolution(name="Conv2d-depthwise", build=lambda: nn.Conv2d(12, 12, 3, groups=12), inputs=_image(12, 4, 4)),
    _convolution(
        name="Conv2d-same",
        build=lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        inputs=_image(4, 4, 5),
    ),
    _convolution(
        name="Conv2d-channels-last",
        build=_channels_last,
        inputs=lambda: (torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last),),
    ),
    _convolution(name="Conv3d", build=lambda: nn.Conv3d(3, 4, 2, groups=1), inputs=_image(3, 3, 3, 3)),
    _convolution(
        name="ConvTranspose1d", build=lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), inputs=_image(6, 4)
    ),
    _convolution(
        name="ConvTranspose2d",
        build=lambda: nn.ConvTranspose2d(3, 5, 2, stride=2, output_padding=1),
        inputs=_image(3, 3, 3),
    ),
    _convolution(name="ConvTranspose3d", build=lambda: nn.ConvTranspose3d(2, 3, 2), inputs=_image(2, 2, 2, 2)),
)
EMBEDDINGS = (
    _embedding(name="Embedding", build=lambda: nn.Embedding(30, 12), inputs=_ids(30, 2, 5)),
    _embedding(name="Embedding-many", build=lambda: nn.Embedding(14, 12), inputs=_ids(14, 4, 5)),
    _embedding(name="Embedding-few-rows", build=lambda: nn.Embedding(9, 12), inputs=_ids(9, 5)),
    _embedding(name="Embedding-square", build=lambda: nn.Embedding(12, 12), inputs=_ids(12, 1, 3)),
    _embedding(
        name="Embedding-padding",
        build=lambda: nn.Embedding(30, 12, padding_idx=2),
        inputs=lambda: (torch.tensor([[2, 7, 7], [3, 2, 29]]),),
    ),
    _embedding(name="Embedding-scaled", build=lambda: Scaled(20, 12), inputs=_ids(20, 2, 4), is_whole_read=True),
)
READ_KINDS = (*CONVOLUTIONS, *EMBEDDINGS)


def _id(value: object) -> str:
    return value.name if isinstance(value, ReadKind) else str(value).removeprefix("torch.")


every_read_kind = pytest.mark.parametrize("kind", READ_KINDS, ids=_id)
every_read_kind_and_dtype = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in READ_KINDS for dtype in kind.dtypes], ids=_id
)

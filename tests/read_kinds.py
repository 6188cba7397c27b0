"""The table of weights that other code reads: the laws of tests/test_readers_*.py run over its rows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding as ScaledEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import randlora
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from tests.kit import fill
from tests.laws import oracle_of

EVERY_DTYPE = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class ReadKind:
    """How to make a module of one kind with random weights, what to give it, and what an update means to it.

    Attributes:
        kind: The kind of weight that its adapter layer states.
        inputs: Makes the arguments of its forward in float32, always the same.
        attribute: The parameter that is adapted.
        place: Where in the module its owner is.
        other: Options of a second adapter, of another form where there are several.
        in_layout: Puts the oracle's update into the shape of the second argument.
        is_whole_read: Whether the forward reads all of weight + update, so that it computes the same bits as merged.
        is_one_graph: Whether the forward does the same for all values, so that it can be compiled to one graph.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    attribute: str = "weight"
    place: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    in_layout: Callable[[Tensor, Tensor], Tensor] = lambda update, weight: update.reshape(weight.shape)
    dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE
    is_whole_read: bool = True
    is_one_graph: bool = True

    @property
    def owner_fqn(self) -> str:
        return f"0.{self.place}" if self.place else "0"

    @property
    def parameter_fqn(self) -> str:
        return f"{self.owner_fqn}.{self.attribute}"

    @property
    def target(self) -> str:
        return self.owner_fqn if self.attribute == "weight" else self.parameter_fqn

    @property
    def adapter_options(self) -> dict[str, Any]:
        return {"r": 3, "alpha": 6, "targets": [self.target], "stream": "portable", **self.options}

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(self.build()).to(dtype)

    def adapted(self, dtype: torch.dtype = torch.float32, *, filled: bool = True, **options: Any) -> nn.Sequential:
        """Make such a model with an adapter of the weight, with values as after some training if ``filled``."""
        model = self.model(dtype)
        randlora.inject(model, **{**self.adapter_options, **options})
        return fill(model) if filled else model

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return tuple(part.to(dtype) if part.is_floating_point() else part for part in self.inputs())

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return output_of(model.get_submodule("0")(*self.arguments(dtype)))

    def gradients(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return torch.autograd.grad(weighted(self.run(model, dtype)), tuple(randlora.trainable_parameters(model)))

    def owner(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.owner_fqn)

    def layer(self, model: nn.Module) -> AdapterLayer:
        return adapter_layers_of(self.owner(model))[self.attribute]

    def diagonals(self, model: nn.Module, name: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
        lam, gamma = self.layer(model).diagonals_of(self.owner(model), name)
        return lam, gamma

    def weight(self, model: nn.Module) -> nn.Parameter:
        return dict(model.named_parameters())[self.parameter_fqn]

    def oracle_update(self, model: nn.Module) -> Tensor:
        """Compute the update in float64, as the library gives it: a matrix or a stack of them."""
        update = oracle_of(self.owner(model), self.attribute)
        return update.flatten(end_dim=-2) if self.kind == "attention" else update

    def changed(self, base: nn.Module, update: Tensor) -> nn.Module:
        twin = copy.deepcopy(base).double()
        with torch.no_grad():
            self.weight(twin).add_(self.in_layout(update, self.weight(twin)))
        return twin


def output_of(result: object) -> Tensor:
    output = result[0] if isinstance(result, tuple) else result
    assert isinstance(output, Tensor)
    return output


def weighted(output: Tensor) -> Tensor:
    """Sum all numbers, each with another weight."""
    return (output * torch.linspace(0.5, 2, output.numel(), dtype=output.dtype).view(output.shape)).sum()


class Absolute(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, (self.weight - 0.1).abs(), self.bias)


def _convolution(
    name: str, build: Callable[[], nn.Module], *shape: int, layout: Any = torch.contiguous_format
) -> ReadKind:
    def made() -> Any:
        module = build()  # torch converts no fake module
        return module if layout is torch.contiguous_format else module.to(memory_format=layout)  # type: ignore[call-overload]

    return ReadKind(name, "convolution", made, lambda: (torch.randn(2, *shape).to(memory_format=layout),))


def _embedding(name: str, build: Callable[[], nn.Embedding], *shape: int, **row: Any) -> ReadKind:
    """Make a row whose first ids are the padding's, if there is any."""

    def inputs() -> tuple[Tensor]:
        module = build()
        ids = torch.randint(0, module.num_embeddings, shape)
        return (ids.index_fill(-1, torch.tensor(0), module.padding_idx or 0),)

    return ReadKind(name, "embedding", build, inputs, **{"is_whole_read": False, **row})


CONVOLUTIONS = (
    _convolution("Conv1d-circular", lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular", bias=False), 4, 7),
    _convolution("Conv2d-stride", lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), 3, 7, 7),
    _convolution("Conv2d-groups", lambda: nn.Conv2d(6, 4, (3, 2), dilation=2, groups=2), 6, 6, 5),
    _convolution("Conv2d-channels-last", lambda: nn.Conv2d(4, 6, 3, padding=1), 4, 5, 5, layout=torch.channels_last),
    _convolution("Conv3d", lambda: nn.Conv3d(3, 4, 2, groups=1), 3, 3, 3, 3),
    _convolution("ConvTranspose1d", lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), 6, 4),
    _convolution("ConvTranspose2d", lambda: nn.ConvTranspose2d(3, 5, 2, stride=2, output_padding=1), 3, 3, 3),
    _convolution("ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 2), 2, 2, 2, 2),
)
EMBEDDINGS = (
    _embedding("Embedding", lambda: nn.Embedding(30, 12), 2, 5),
    _embedding("Embedding-few-rows", lambda: nn.Embedding(9, 12), 4, 5),  # fewer than are looked up
    _embedding("Embedding-padding", lambda: nn.Embedding(30, 12, padding_idx=2), 2, 3),
    _embedding("Embedding-scaled", lambda: ScaledEmbedding(20, 12, 0, embed_scale=3.5), 2, 4, is_whole_read=True),
)


def _attention(name: str, *, widths: tuple[int, ...] = (12, 12, 12), bias: bool = True, **row: Any) -> ReadKind:
    def build() -> nn.Module:
        module = nn.MultiheadAttention(12, 2, bias=bias, kdim=widths[1], vdim=widths[2], batch_first=True)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        return module

    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, 5, width) for width in widths)

    return ReadKind(f"attention-{name}", "attention", build, inputs, **row)


CONTEXT, PACKED, SPLIT = (12, 8, 20), {"in_proj": "packed"}, {"in_proj": "split"}
ATTENTION = (
    _attention("in_proj", attribute="in_proj_weight", options=PACKED, other=SPLIT),
    _attention("in_proj-split", attribute="in_proj_weight", options=SPLIT, other=PACKED),
    _attention("q_proj", attribute="q_proj_weight", widths=CONTEXT),
    _attention("k_proj", attribute="k_proj_weight", widths=CONTEXT),
    _attention("v_proj-no-bias", attribute="v_proj_weight", widths=CONTEXT, bias=False),
    _attention("out_proj", place="out_proj"),
)


def _experts(name: str, attribute: str, experts: str = "each", implementation: str = "eager", *,
             inner: int = 20, is_transposed: bool = False, **row: Any) -> ReadKind:  # fmt: skip
    options = {"hidden_size": 16, "intermediate_size": inner, "num_local_experts": 4}

    def build() -> nn.Module:
        config: Any = transformers.GptOssConfig if is_transposed else transformers.MixtralConfig
        of = config(**options, experts_implementation=implementation)
        module: nn.Module = GptOssExperts(of) if is_transposed else MixtralExperts(of)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        return module

    def in_layout(update: Tensor, weight: Tensor) -> Tensor:
        return (update.mT if is_transposed else update).expand(weight.shape)

    other = {"experts": "each" if experts == "shared" else "shared"}
    return ReadKind(
        f"experts-{name}", "experts", build, _routed, attribute, options={"experts": experts}, other=other,
        in_layout=in_layout, is_whole_read=False, is_one_graph=implementation != "eager", **row,
    )  # fmt: skip


def _routed() -> tuple[Tensor, ...]:
    """Six tokens, of which none goes to the last expert."""
    return torch.randn(6, 16), torch.tensor([[0, 1], [2, 0], [1, 2]] * 2), torch.rand(6, 2)


EXPERTS = (
    _experts("gate_up", "gate_up_proj"),
    _experts("gate_up-shared", "gate_up_proj", "shared"),
    _experts("down-shared-batched", "down_proj", "shared", "batched_mm"),
    _experts("down-square-batched", "down_proj", "each", "batched_mm", inner=16),
    _experts("transposed-gate_up-shared-batched", "gate_up_proj", "shared", "batched_mm", is_transposed=True),
    _experts("transposed-down-square", "down_proj", inner=16, is_transposed=True),
)
LINEAR = ReadKind("Linear-other-forward", "linear", lambda: Absolute(12, 8), lambda: (torch.randn(2, 5, 12),))
READ_KINDS = (*CONVOLUTIONS, *EMBEDDINGS, *ATTENTION, *EXPERTS, LINEAR)


def _id(value: object) -> str:
    return value.name if isinstance(value, ReadKind) else str(value).removeprefix("torch.")


def of(*names: str) -> pytest.MarkDecorator:
    rows = {kind.name: kind for kind in READ_KINDS}
    return pytest.mark.parametrize("kind", [rows[name] for name in names], ids=_id)


every_read_kind = pytest.mark.parametrize("kind", READ_KINDS, ids=_id)
FAMILIES = (
    *("Conv2d-groups", "ConvTranspose2d", "Embedding-padding", "Embedding-scaled", "attention-in_proj-split"),
    *("attention-out_proj", "experts-gate_up", "experts-transposed-gate_up-shared-batched", "Linear-other-forward"),
)
"""One row of each family, for laws in which the sizes of a weight do not matter."""
every_family = of(*FAMILIES)


def or_medium(is_quick: bool, *values: object) -> Any:
    """Mark a set of parameters as medium where the quick run covers the same law by others."""
    return pytest.param(*values, marks=[] if is_quick else [pytest.mark.medium])


every_read_kind_and_dtype = pytest.mark.parametrize(
    ("kind", "dtype"),
    [or_medium(dtype in (torch.float32, torch.bfloat16), kind, dtype) for kind in READ_KINDS for dtype in EVERY_DTYPE],
    ids=_id,
)

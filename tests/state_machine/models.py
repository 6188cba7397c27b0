"""The models of the state machine: every kind of layer, shared modules and tied parameters, all of them tiny."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D


class Weight(NamedTuple):
    """A weight that can be adapted: its FQN in files, and ``(out_features, in_features)``, of one matrix of a stack.

    ``option`` is the name and the value of the option with which each matrix of the stack has its Λ and Γ.
    """

    fqn: str
    shape: tuple[int, int]
    parameter: str | None = None
    stack: int = 1
    option: tuple[str, str] = ("", "")
    is_transposed: bool = False
    is_called: bool = False

    @property
    def name(self) -> str:
        return self.parameter or f"{self.fqn}.weight"

    def matrices(self, options: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
        """Return how many matrices have a Λ and a Γ each with these options, 0 for one alone, and their shape."""
        name, apart = self.option
        if not name or name == "experts":
            return (self.stack if name and options[name] == apart else 0), self.shape
        return (self.stack, self.shape) if options[name] == apart else (0, (self.stack * self.shape[0], self.shape[1]))

    def placed(self, update: Tensor, like: Tensor) -> Tensor:
        """Return an update in the layout of the parameter."""
        update = update.mT if self.is_transposed else update
        return update.reshape(like.shape) if update.numel() == like.numel() else update.expand(like.shape)


class Kind(NamedTuple):
    """A model: how to make it, what to give it, what can be adapted, and some of what can be trained beside."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    weights: tuple[Weight, ...]
    others: tuple[str, ...]

    def build(self, dtype: torch.dtype) -> nn.Module:
        """Make the model, always with the same random numbers, whatever its layers start with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.4)
            return model.to(dtype).eval()

    def draw(self) -> tuple[Tensor, ...]:
        """Make the arguments, always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.inputs()


class Text(nn.Module):
    """Square, wide and transposed layers, one of them used twice, and two norms that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.square = nn.Linear(8, 8)
        self.up = nn.Linear(8, 12, bias=False)
        self.down = Conv1D(8, 12)
        self.norm = nn.LayerNorm(8)
        self.twin = nn.LayerNorm(8)
        self.twin.weight = self.norm.weight
        self.again = self.square
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        x = x + torch.tanh(self.square(x))
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        return self.head(self.twin(x + self.again(x)))


class Image(nn.Module):
    """Convolutions in groups, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.wider = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, pixels: Tensor) -> Any:
        x = torch.tanh(self.wider(torch.tanh(self.patches(pixels))))
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """torch's own layer of a transformer, which has a fast path, and attention with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Any:
        x = self.layer(x)
        return self.head(x + self.cross(x, key, value, need_weights=False)[0])


class Experts(nn.Module):
    """Stacks of experts in both layouts."""

    def __init__(self) -> None:
        super().__init__()
        sides = {"hidden_size": 8, "num_local_experts": 3, "experts_implementation": "eager"}
        self.mixtral = MixtralExperts(transformers.MixtralConfig(**sides, intermediate_size=5))
        self.between = nn.Linear(8, 8)
        self.oss = GptOssExperts(transformers.GptOssConfig(**sides, intermediate_size=6))

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor) -> Any:
        x = x + self.between(torch.tanh(self.mixtral(x, experts, shares)))
        return x + self.oss(torch.tanh(x), experts, shares)


EACH, SPLIT = ("experts", "each"), ("in_proj", "split")

TEXT = Kind(
    "text",
    Text,
    lambda: (torch.randint(0, 11, (2, 4)),),
    (
        Weight("square", (8, 8), is_called=True),
        Weight("up", (12, 8), is_called=True),
        Weight("down", (8, 12), is_transposed=True, is_called=True),
        Weight("embed", (11, 8)),
        Weight("head", (3, 8), is_called=True),
    ),
    ("norm.weight", "twin.bias", "square.bias", "up.weight", "head.weight", "down.bias"),
)
IMAGE = Kind(
    "image",
    Image,
    lambda: (torch.randn(2, 4, 3, 3),),
    (Weight("patches", (6, 18)), Weight("wider", (6, 8)), Weight("head", (5, 4), is_called=True)),
    ("patches.bias", "wider.weight", "head.weight", "head.bias"),
)
ATTENTION = Kind(
    "attention",
    Attention,
    lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 10)),
    (
        Weight("layer.self_attn.in_proj_weight", (8, 8), "layer.self_attn.in_proj_weight", 3, SPLIT),
        Weight("layer.self_attn.out_proj", (8, 8)),
        Weight("layer.linear1", (12, 8), is_called=True),
        Weight("cross.q_proj_weight", (8, 8), "cross.q_proj_weight"),
        Weight("cross.k_proj_weight", (8, 6), "cross.k_proj_weight"),
        Weight("cross.v_proj_weight", (8, 10), "cross.v_proj_weight"),
        Weight("cross.out_proj", (8, 8)),
    ),
    ("layer.self_attn.in_proj_bias", "layer.norm1.weight", "layer.linear1.weight", "cross.in_proj_bias", "head.weight"),
)
EXPERTS = Kind(
    "experts",
    Experts,
    lambda: (torch.randn(5, 8), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), torch.rand(5, 2)),
    (
        Weight("mixtral.gate_up_proj", (10, 8), "mixtral.gate_up_proj", 3, EACH),
        Weight("mixtral.down_proj", (8, 5), "mixtral.down_proj", 3, EACH),
        Weight("between", (8, 8), is_called=True),
        Weight("oss.gate_up_proj", (12, 8), "oss.gate_up_proj", 3, EACH, is_transposed=True),
        Weight("oss.down_proj", (8, 6), "oss.down_proj", 3, EACH, is_transposed=True),
    ),
    ("between.weight", "between.bias", "oss.down_proj_bias"),
)
KINDS = {kind.name: kind for kind in (TEXT, IMAGE, ATTENTION, EXPERTS)}

"""The models of the state machine: every kind of layer, shared modules and tied parameters, all of them tiny."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D


class Weight(NamedTuple):
    """A weight that can be adapted: its FQN in files, its parameter, and the out and in features of one matrix.

    ``option`` is the name and the value of the option with which each matrix of a stack has its Λ and Γ.
    """

    fqn: str
    name: str
    shape: tuple[int, int]
    stack: int
    option: tuple[str, str]
    is_transposed: bool
    is_called: bool

    def matrices(self, options: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
        option, apart = self.option
        if option and options[option] == apart:
            return self.stack, self.shape
        return 0, (self.stack * self.shape[0] if option == "in_proj" else self.shape[0], self.shape[1])

    def placed(self, update: Tensor, like: Tensor) -> Tensor:
        update = update.mT if self.is_transposed else update
        return update.reshape(like.shape) if update.numel() == like.numel() else update.expand(like.shape)


def weight_of(model: nn.Module, fqn: str) -> Weight:
    name = fqn if fqn in dict(model.named_parameters()) else f"{fqn}.weight"
    owner, value = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).data
    is_transposed, stack, option = isinstance(owner, Conv1D | GptOssExperts), 1, ("", "")
    if name.endswith("in_proj_weight"):
        stack, option, value = 3, ("in_proj", "split"), value.unflatten(0, (3, -1))[0]
    elif isinstance(owner, MixtralExperts | GptOssExperts):
        stack, option, value = len(value), ("experts", "each"), value[0]
    rows, columns = value.T.shape if is_transposed else value.flatten(1).shape
    return Weight(fqn, name, (rows, columns), stack, option, is_transposed, type(owner) in {nn.Linear, Conv1D})


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    weights: tuple[Weight, ...]
    others: tuple[str, ...]

    def build(self, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Make the model and its arguments, always with the same random numbers, whatever its layers start with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.4)
            return model.to(dtype).eval(), self.inputs()


class Text(nn.Module):
    """Square, wide and transposed layers, one of them used twice, and two norms that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.square = nn.Linear(8, 8)
        self.up = nn.Linear(8, 12, bias=False)
        self.down = Conv1D(8, 12)
        self.norm, self.twin = nn.LayerNorm(8), nn.LayerNorm(8)
        self.twin.weight = self.norm.weight
        self.again = self.square
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        x = x + torch.tanh(self.square(x))
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        return self.head(self.twin(x + self.again(x)))


def image() -> nn.Module:
    patches, wider = nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
    head = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return nn.Sequential(OrderedDict(patches=patches, tanh=nn.Tanh(), wider=wider, head=head))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Any:
        x = self.layer(x)
        return self.head(x + self.cross(x, key, value, need_weights=False)[0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sides = {"hidden_size": 8, "num_local_experts": 3, "experts_implementation": "eager"}
        self.mixtral = MixtralExperts(transformers.MixtralConfig(**sides, intermediate_size=5))
        self.between = nn.Linear(8, 8)
        self.oss = GptOssExperts(transformers.GptOssConfig(**sides, intermediate_size=6))

    def forward(self, x: Tensor, experts: Tensor, shares: Tensor) -> Any:
        x = x + torch.tanh(self.mixtral(x, experts, shares))  # onto what tells the rows apart, as in every model
        x = x + self.between(torch.tanh(x))
        return x + self.oss(torch.tanh(x), experts, shares)


def kind(make: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], adapted: str, others: str) -> Kind:
    model = make()
    return Kind(make, inputs, tuple(weight_of(model, fqn) for fqn in adapted.split()), tuple(others.split()))


KINDS = {
    "text": kind(
        Text,
        lambda: (torch.randint(0, 11, (2, 4)),),
        "square up down embed head",
        "norm.weight twin.bias square.bias up.weight head.weight down.bias",
    ),
    "image": kind(
        image,
        lambda: (torch.randn(2, 4, 3, 3),),
        "patches wider head.3",
        "patches.bias wider.weight head.3.weight head.3.bias",
    ),
    "attention": kind(
        Attention,
        lambda: (torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 10)),
        "layer.self_attn.in_proj_weight layer.self_attn.out_proj layer.linear1 "
        "cross.q_proj_weight cross.k_proj_weight cross.v_proj_weight cross.out_proj",
        "layer.self_attn.in_proj_bias layer.norm1.weight layer.linear1.weight cross.in_proj_bias head.weight",
    ),
    "experts": kind(
        Experts,
        lambda: (torch.randn(5, 8), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), torch.rand(5, 2)),
        "mixtral.gate_up_proj mixtral.down_proj between oss.gate_up_proj oss.down_proj",
        "between.weight between.bias oss.down_proj_bias",
    ),
}

"""Every kind of layer compiles to one graph, checkpointed and under autocast, and block by block as plain ones do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import randlora
from tests.further import further
from tests.kit import fill
from tests.laws import assert_close

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at it
]
WIDTH = 8


def experts() -> nn.Module:
    config = transformers.MixtralConfig(hidden_size=WIDTH, intermediate_size=12, num_local_experts=3)
    config._experts_implementation = "batched_mm"  # the one of a fixed number of products
    made: nn.Module = MixtralExperts(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = layer(x, x, x, need_weights=False)[0]
    return output


def route(layer: nn.Module, x: Tensor) -> Tensor:
    chosen = torch.arange(2, device=x.device).expand(len(x), 2)
    output: Tensor = layer(x, chosen, torch.full((len(x), 2), 0.5))
    return output


Call = Callable[[nn.Module, Tensor], Tensor]
KINDS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), lambda layer, x: layer(x)),
    "Conv1D": (lambda: Conv1D(WIDTH, WIDTH), lambda layer, x: layer(x)),
    "attention": (lambda: nn.MultiheadAttention(WIDTH, 2), attend),
    "experts": (experts, route),
    "convolution": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), lambda layer, x: layer(x.T.unsqueeze(0))[0].T),
    "embedding": (lambda: nn.Embedding(2 * WIDTH, WIDTH), lambda layer, x: x + layer(x.argmax(-1))),
}


class Block(nn.Module):
    """A layer of a kind, a norm, and a residual connection."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        build, self.call = KINDS[kind]
        self.layer, self.norm = build(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(tokens, 8)`` to the same."""
        return x + F.gelu(self.call(self.layer, self.norm(x)))


class Blocks(nn.Module):
    """Two blocks of a kind, which may be checkpointed."""

    def __init__(self, kind: str, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(tokens, 8)`` to the same."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def adapted(model: Blocks, kind: str) -> Blocks:
    """Adapt and fill every layer of the kind."""
    targets = ["layer"] if kind != "attention" else "all-linear"
    randlora.inject(model, r=2, targets=targets)
    return fill(model, spread=0.3)


def compare(compiled: Any, model: nn.Module, x: Tensor, **autocast: Any) -> None:
    """Hold outputs in inference, and in training with gradients, against the model itself."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [parameter for parameter in compiled.parameters() if parameter.requires_grad]
    dtype = autocast.get("dtype", torch.float32)
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        with torch.no_grad():
            assert_close(compiled(x), model(x), dtype)
        found, expected = compiled(x), model(x)
    assert_close(found.detach(), expected.detach(), dtype)
    both = (torch.autograd.grad(out.float().square().mean(), of) for out, of in ((found, own), (expected, trained)))
    for ours, theirs in zip(*both, strict=True):
        assert_close(ours, theirs, dtype)


REGIONAL = [
    ("linear", None, False),
    further("linear", True, False),
    further("linear", None, True),
    *(further(kind, None, False) for kind in KINDS if kind != "linear"),
]


@pytest.mark.parametrize(("kind", "dynamic", "checkpointed"), REGIONAL)
def test_blocks_compiled_one_by_one_take_as_many_graphs_as_plain_ones(
    kind: str, dynamic: bool | None, checkpointed: bool
) -> None:
    graphs = []
    for model in (Blocks(kind, checkpointed=checkpointed), adapted(Blocks(kind, checkpointed=checkpointed), kind)):
        torch._dynamo.reset()
        twin, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
        for block in model.blocks:
            block.compile(fullgraph=True, backend=counter, dynamic=dynamic)
        for tokens in (3, 7, 12):
            compare(model, twin, torch.randn(tokens, WIDTH))
        graphs.append(counter.frame_count)
    assert graphs[1] <= graphs[0] + 1


@pytest.mark.parametrize("kind", ["linear", *(further(kind) for kind in KINDS if kind != "linear")])
def test_checkpointed_blocks_compile_to_one_graph_under_autocast(kind: str) -> None:
    model = adapted(Blocks(kind, checkpointed=True), kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compare(compiled, model, torch.randn(5, WIDTH), dtype=torch.bfloat16)

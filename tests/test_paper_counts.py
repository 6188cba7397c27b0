"""The trainable counts of the paper and of PEFT's benchmark, from the models' own shapes; no weight is allocated."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import randlora
from randlora.config import BasisKind
from tests.kit import untouched
from tests.models import clip_vit_b_32, torchvision_vit_b_16

QKV_UP_DOWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ENCODER_DENSE = r".*\.encoder\.layer\..*\.(query|key|value|dense)"


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def sized(width: int, inner: int, layers: int, heads: int, **options: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (width, inner, layers, heads), strict=True)), **options}


def llama(*sizes: int) -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=128256, **sized(*sizes, num_key_value_heads=8))
    return on_meta(lambda: transformers.LlamaForCausalLM(config))


@cache
def llama_3_8b() -> nn.Module:
    return llama(4096, 14336, 32, 32)


@cache
def llama_3_2_3b() -> nn.Module:
    return llama(3072, 8192, 28, 24)


@cache
def qwen2_half_b() -> nn.Module:
    config = transformers.Qwen2Config(vocab_size=151936, **sized(896, 4864, 24, 14, num_key_value_heads=2))
    return on_meta(lambda: transformers.Qwen2ForCausalLM(config))


def roberta(*sizes: int) -> nn.Module:
    config = transformers.RobertaConfig(**sized(*sizes))
    return on_meta(lambda: transformers.RobertaForSequenceClassification(config))


def roberta_base() -> nn.Module:
    return roberta(768, 3072, 12, 12)


def roberta_large() -> nn.Module:
    return roberta(1024, 4096, 24, 16)


COUNTS: tuple[tuple[Callable[[], nn.Module], Any, int, int], ...] = (
    (llama_3_8b, QKV_UP_DOWN, 60, 28_778_112),
    (llama_3_8b, QKV_UP_DOWN, 30, 56_626_112),
    (llama_3_8b, QKV_UP_DOWN, 15, 112_723_968),
    (qwen2_half_b, QKV_UP_DOWN, 10, 5_956_992),
    (qwen2_half_b, QKV_UP_DOWN, 5, 11_842_944),
    (llama_3_2_3b, ("q_proj", "v_proj"), 32, 9_289_728),
    (llama_3_2_3b, None, 32, 9_289_728),
    (roberta_base, ENCODER_DENSE, 64, 718_848),
    (roberta_large, ENCODER_DENSE, 100, 1_780_416),
    (clip_vit_b_32, ("in_proj_weight", "c_fc", "c_proj"), 6, 5_170_320),
    # those of the first's image encoder, 12 layers of d = 768
    (torchvision_vit_b_16, ("in_proj_weight", "mlp.0", "mlp.3"), 6, 3_566_592),
)


@pytest.mark.parametrize(
    ("build", "targets", "r", "expected"),
    COUNTS,
    ids=[f"{build.__name__}-{'preset' if targets is None else 'named'}-r={r}" for build, targets, r, _ in COUNTS],
)
def test_trainable_counts_are_those_published(
    build: Callable[[], nn.Module], targets: Any, r: int, expected: int
) -> None:
    assert randlora.plan(on_meta(build), r, targets=targets).trainable_parameters == expected


class CountsAllocations(TorchFunctionMode):
    """Adds up the bytes of every tensor off the meta device that a torch function returns."""

    nbytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            self.nbytes += result.nbytes
        return result


@pytest.mark.parametrize("basis", ["very_sparse", "block"])
def test_a_plan_for_llama_3_8b_and_an_adapter_on_meta_take_no_memory(basis: BasisKind) -> None:
    model = llama_3_8b()
    small = on_meta(lambda: nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 14336)))
    with untouched(model), CountsAllocations() as allocations:
        report = randlora.plan(model, 32, targets="all-linear", basis=basis)
        randlora.inject(small, 32, basis=basis)
        output = small(torch.empty(2, 4096, device="meta"))
    assert allocations.nbytes == 0
    assert len(report.targets) == 7 * 32
    assert report.checkpoint_bytes == 4 * report.trainable_parameters <= 0.35e9
    assert report.skipped == {"lm_head": "the output head"}
    assert output.shape == (2, 14336)
    assert all(parameter.is_meta for parameter in small.parameters())

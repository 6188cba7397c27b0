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
from tests.kit import untouched
from tests.models import library

QKV_UP_DOWN = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ENCODER_DENSE = r".*\.encoder\.layer\..*\.(query|key|value|dense)"
NAMES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"


def of_transformers(kind: str, config: str, *sizes: int, **options: int) -> Callable[[], nn.Module]:
    made = getattr(transformers, config)(**dict(zip(NAMES, sizes, strict=False)), **options)
    return lambda: getattr(transformers, kind)(made)


LLAMA, ROBERTA = ("LlamaForCausalLM", "LlamaConfig"), ("RobertaForSequenceClassification", "RobertaConfig")
QWEN = "Qwen2ForCausalLM", "Qwen2Config"
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama 3 8B": of_transformers(*LLAMA, 4096, 14336, 32, 32, 128256, num_key_value_heads=8),
    "llama 3.2 3B": of_transformers(*LLAMA, 3072, 8192, 28, 24, 128256, num_key_value_heads=8),
    "qwen 2 0.5B": of_transformers(*QWEN, 896, 4864, 24, 14, 151936, num_key_value_heads=2),
    "roberta base": of_transformers(*ROBERTA, 768, 3072, 12, 12),
    "roberta large": of_transformers(*ROBERTA, 1024, 4096, 24, 16),
    "clip": lambda: library("open_clip").CLIP(**library("open_clip").get_model_config("ViT-B-32")),
    "clip's image encoder": lambda: library("torchvision").models.vit_b_16(weights=None),  # 12 layers of d = 768
}
COUNTS: tuple[tuple[str, Any, int, int], ...] = (
    ("llama 3 8B", QKV_UP_DOWN, 60, 28_778_112),
    ("llama 3 8B", QKV_UP_DOWN, 15, 112_723_968),
    ("qwen 2 0.5B", QKV_UP_DOWN, 10, 5_956_992),
    ("qwen 2 0.5B", QKV_UP_DOWN, 5, 11_842_944),
    ("llama 3.2 3B", ("q_proj", "v_proj"), 32, 9_289_728),
    ("llama 3.2 3B", None, 32, 9_289_728),
    ("roberta base", ENCODER_DENSE, 64, 718_848),
    ("roberta large", ENCODER_DENSE, 100, 1_780_416),
    ("clip", ("in_proj_weight", "c_fc", "c_proj"), 6, 5_170_320),
    ("clip's image encoder", ("in_proj_weight", "mlp.0", "mlp.3"), 6, 3_566_592),
)


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


@pytest.mark.parametrize(("name", "targets", "r", "expected"), COUNTS)
def test_trainable_counts_are_those_published(name: str, targets: Any, r: int, expected: int) -> None:
    assert randlora.plan(on_meta(name), r, targets=targets).trainable_parameters == expected


class OnMeta(TorchFunctionMode):
    """Fails where a torch function returns a tensor off the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.is_meta or not result.nbytes
        return result


@pytest.mark.parametrize("basis", ["very_sparse", "block"])
def test_a_plan_for_llama_3_8b_and_an_adapter_on_meta_take_no_memory(basis: Any) -> None:
    model = on_meta("llama 3 8B")
    with torch.device("meta"):
        small = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 14336))
    with untouched(model), OnMeta():
        report = randlora.plan(model, 32, targets="all-linear", basis=basis)
        randlora.inject(small, 32, basis=basis)
        output = small(torch.empty(2, 4096, device="meta"))
    assert len(report.targets) == 7 * 32
    assert report.checkpoint_bytes == 4 * report.trainable_parameters <= 0.35e9
    assert report.skipped == {"lm_head": "the output head"}
    assert output.shape == (2, 14336)
    assert all(parameter.is_meta for parameter in small.parameters())

"""Real models, a few thousand random weights each, and inputs for them: what users adapt, in milliseconds."""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64
LABELS = 3
SIDES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class RealModel:
    """How to make a model in evaluation mode and inputs, always the same, and names of layers of several shapes."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]


def llama(**sides: Any) -> nn.Module:
    """Build a Llama with grouped-query attention: q and o are square, k and v tall, the rest wide or tall."""
    sides = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64, **SIDES, **sides}
    return reproducible(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sides)))


def gpt2(n_embd: int = 32) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_embd": n_embd, "n_layer": 2, "n_head": 4, "n_positions": 64}
    zeros = dict.fromkeys(("bos_token_id", "eos_token_id", "embd_pdrop", "attn_pdrop", "resid_pdrop"), 0)
    return reproducible(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **zeros)))


def bert(**sides: int) -> nn.Module:
    sides = {**SIDES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_labels": LABELS, **sides}
    return reproducible(lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**sides)))


def vit(**sides: int) -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=8, **{"num_labels": LABELS, **SIDES, **sides})
    return reproducible(lambda: transformers.ViTForImageClassification(config))


def library(name: str) -> Any:
    with warnings.catch_warnings():
        # what they warn of is their own affair
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
        return importlib.import_module(name)


def torchvision_vit() -> nn.Module:
    def build() -> Any:
        sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48, "num_classes": LABELS}
        model = library("torchvision").models.VisionTransformer(image_size=16, patch_size=8, **sizes)
        nn.init.normal_(model.heads.head.weight)  # which comes as zeros, so that every output would be zero
        return model

    return reproducible(build)


def clip() -> nn.Module:
    text = {"context_length": 8, "vocab_size": 40, "width": 24, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    return reproducible(lambda: library("open_clip").CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))


def unet() -> nn.Module:
    sizes = {"sample_size": 8, "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 8}
    blocks: dict[str, Any] = {"block_out_channels": (16, 32), "cross_attention_dim": 16}
    for way, order in (("down", ("CrossAttnDownBlock2D", "DownBlock2D")), ("up", ("UpBlock2D", "CrossAttnUpBlock2D"))):
        blocks[f"{way}_block_types"] = order
    return reproducible(lambda: library("diffusers").UNet2DConditionModel(**blocks, **sizes))


def flux() -> nn.Module:
    """Build a transformer of diffusers in which a name is the end of another."""
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    sizes |= {"attention_head_dim": 16, "joint_attention_dim": 24, "pooled_projection_dim": 12}
    return reproducible(lambda: library("diffusers").FluxTransformer2DModel(**sizes, axes_dims_rope=[4, 4, 8]))


def noise() -> dict[str, Any]:
    steps, context = torch.tensor([3, 500]), torch.randn(2, 5, 16)
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": steps, "encoder_hidden_states": context}


def patches() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def tokens() -> dict[str, Tensor]:
    return {"input_ids": _drawn(lambda: torch.randint(0, VOCABULARY, (2, 6)))}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": _drawn(lambda: torch.randn(2, 3, 16, 16))}


LLAMA = RealModel("llama", llama, tokens, ("q_proj", "v_proj", "up_proj", "down_proj"))
GPT2 = RealModel("gpt2", gpt2, tokens, ("c_attn", "c_fc", "c_proj"))
BERT = RealModel("bert", bert, tokens, ("query", "value", "dense"))
VIT = RealModel("vit", vit, pixels, ("q_proj", "v_proj", "fc1", "fc2"))

every_transformers_model = pytest.mark.parametrize(
    "kind",
    # the layers of the first two are of every shape and form
    [LLAMA, GPT2, *(pytest.param(kind, marks=pytest.mark.medium) for kind in (BERT, VIT))],
    ids=lambda kind: kind.name,
)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return logits(model(**inputs))


def logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output.logits
    assert isinstance(found, Tensor)
    return found


def reproducible(build: Callable[[], Any]) -> nn.Module:
    model = _drawn(build)
    assert isinstance(model, nn.Module)
    return model.eval()


def _drawn(draw: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return draw()

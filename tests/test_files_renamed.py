"""Models whose layers have other names in memory than in their files, as transformers 5 writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import randlora
from tests.kit import fill

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava() -> nn.Module:
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=VISION)
    return transformers.Gemma3ForConditionalGeneration(config)  # type: ignore[no-any-return]


def qwen2_vl() -> nn.Module:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)  # type: ignore[no-any-return]


def swin() -> nn.Module:
    sizes: dict[str, Any] = {"depths": [1, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2}
    config = transformers.SwinConfig(embed_dim=16, window_size=2, **sizes)
    return transformers.SwinForImageClassification(config)  # type: ignore[no-any-return]


def segformer() -> nn.Module:
    sizes: dict[str, Any] = {"num_attention_heads": [1, 1, 2, 2], "depths": [1] * 4, "decoder_hidden_size": 16}
    config = transformers.SegformerConfig(hidden_sizes=[8, 16, 16, 32], **sizes)
    return transformers.SegformerForSemanticSegmentation(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [llava, gemma3, qwen2_vl, swin, segformer])
def test_an_adapter_under_the_names_in_memory_is_merged_into_files_of_other_names(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    model = build()
    model.save_pretrained(tmp_path / "base")
    report = randlora.inject(model, r=4, targets="all-linear")
    fill(model, seed=0)
    randlora.save(model, tmp_path / "adapter")
    assert set(randlora.files.plan(tmp_path / "base", 4, targets="all-linear").targets) == set(report.targets)
    merged = randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base").merged
    randlora.merge(model)
    model.save_pretrained(tmp_path / "expected")
    ours, expected = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "expected"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert len(merged) == len(report.targets)
    assert not {name.removesuffix(".weight") for name in merged} <= set(report.targets)

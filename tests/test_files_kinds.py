"""Files of adapters of every kind of layer, and of models that have other names in files: merged, inspected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora.errors import CheckpointError, ConfigError
from tests.checkpoint_files import read_tensors
from tests.kit import all_bits, fill, same_bits
from tests.model_directories import contents, write
from tests.models import BERT, VIT, outputs
from tests.read_kinds import READ_KINDS, ReadKind, every_read_kind

WORDS = ["word_embeddings", "position_embeddings", "query"]


def saved(kind: ReadKind, root: Path) -> nn.Module:
    """Write the base model of a kind and an adapter of it, and return the adapted model."""
    (root / "base").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in kind.model().state_dict().items()}
    save_file(tensors, root / "base" / "model.safetensors", {"format": "pt"})
    model = kind.adapted()
    randlora.save(model, root / "adapter")
    return model


@every_read_kind
def test_merging_files_gives_the_bits_of_merging_in_memory(kind: ReadKind, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    assert randlora.files.verify(tmp_path / "adapter", tmp_path / "base").passed
    randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    randlora.merge(model)
    assert all_bits(load_file(tmp_path / "out" / "model.safetensors")) == all_bits(model.state_dict())


@pytest.mark.parametrize(
    ("kind", "targets"), [(BERT, WORDS), (VIT, ["projection", "q_proj"])], ids=["words", "patches"]
)
def test_a_model_that_transformers_wrote_is_merged_as_in_memory(kind: Any, targets: list[str], tmp_path: Path) -> None:
    model = kind.build()
    write(model, tmp_path / "base")
    randlora.inject(model, r=4, targets=targets)
    fill(model)
    expected = outputs(model, kind.inputs())
    randlora.save(model, tmp_path / "adapter")
    randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    randlora.merge(model)
    for name, tensor in model.state_dict().items():
        assert same_bits(merged.state_dict()[name], tensor), name
    torch.testing.assert_close(outputs(merged, kind.inputs()), expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_of_another_size_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    randlora.inject(model, r=2, targets=["0"])
    randlora.save(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(nn.Sequential(nn.Conv2d(3, 8, 5)).state_dict(), tmp_path / "base" / "model.safetensors")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="0 is 8 x 75 here, the adapter was trained on out x in = 8 x 27"):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert not randlora.files.verify(tmp_path / "adapter", tmp_path / "base").passed
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match="0 is 8 x 75 here"):
        randlora.load(nn.Sequential(nn.Conv2d(3, 8, 5)), tmp_path / "adapter")


def test_a_kernel_that_is_not_that_of_the_models_class_is_refused(tmp_path: Path) -> None:
    model = VIT.build()
    write(model, tmp_path / "base")
    randlora.inject(model, r=4, targets=["projection"])
    randlora.save(model, tmp_path / "adapter")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("projection.weight"))
    tensors[name] = tensors[name][:, :, :4].contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="projection is 32 x 96 here, the adapter was trained on out x in = 32 x"):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize("kind", [kind for kind in READ_KINDS if kind.kind != "linear"], ids=lambda kind: kind.name)
def test_what_peft_has_no_place_for_is_not_converted_for_it(kind: ReadKind, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"cannot convert for PEFT: .* not {kind.target} \({kind.kind}\)"):
        randlora.files.convert(tmp_path / "adapter", tmp_path / "out", "peft")
    what = rf"(of kind {kind.kind}|a stack of \d matrices)"
    with pytest.raises(ConfigError, match=rf"{kind.target} is {what}, and only linear layers"):
        randlora.files.convert(tmp_path / "adapter", tmp_path / "out", "lora", tolerance=1.0)
    assert contents(tmp_path) == before
    randlora.files.convert(tmp_path / "adapter", tmp_path / "native", "native")
    again, own = read_tensors(tmp_path / "native"), read_tensors(tmp_path / "adapter")
    assert all_bits(again[0]) == all_bits(own[0])
    assert again[1] == own[1]


@every_read_kind
def test_the_shape_and_the_norm_of_the_update_are_inspected(kind: ReadKind, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    (found,) = randlora.files.inspect(tmp_path / "adapter", norms=True).layers
    *_, out_features, in_features = kind.layer(model).adapters["default"].shape
    assert (found.fqn, found.out_features, found.in_features) == (kind.target, out_features, in_features)
    expected = torch.linalg.vector_norm(randlora.delta_weight(model, kind.target)).item()
    assert found.frobenius == pytest.approx(expected, rel=1e-5)


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

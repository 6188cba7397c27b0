"""Merging on disk equals loading, merging and saving: every file that comes out, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora.errors import CheckpointError, ConfigError, MergeError
from tests.checkpoint_files import read_tensors
from tests.kit import all_bits, fill, same_bits
from tests.model_directories import (
    HEADS,
    assert_same_tensors,
    contents,
    merge_in_memory,
    save_adapter,
    save_model,
    stored,
    write,
)
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel
from tests.peer import THEIR_WARNINGS, peft_model
from tests.read_kinds import ReadKind, every_read_kind
from tests.transformers_zoo import tiny

pytestmark = THEIR_WARNINGS


@pytest.mark.parametrize(
    ("kind", "is_sharded", "dtype"),
    [(LLAMA, False, torch.float32), (GPT2, True, torch.bfloat16), (VIT, True, torch.float16)],
    ids=["llama", "gpt2", "vit"],
)
def test_several_adapters_and_what_was_trained_beside_them_are_merged_as_in_memory(
    kind: RealModel, is_sharded: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_model(kind, tmp_path / "base", dtype=dtype, is_sharded=is_sharded)
    assert (len(list(base.glob("*.safetensors"))) > 1) == is_sharded
    options: tuple[dict[str, Any], ...] = (
        {"train_also": [HEADS[kind.name]], "targets": list(kind.targets[:1]), "stream": "portable"},
        {"stream": "portable"},  # whose bases are those of the one before, which grow
        {"r": 5, "seed": 1, "basis": "sparse"},
        {"basis": "block", "r": 8},
        {"basis": "very_sparse"},
    )
    adapters = {
        save_adapter(kind, tmp_path / f"adapter {number}", dtype=dtype, values=number, **given): weight
        for number, (given, weight) in enumerate(zip(options, (0.7, 1.0, -0.3, 2.0, 1.5), strict=True))
    }
    report = randlora.files.merge(adapters, tmp_path / "out", base=base)
    expected = write(merge_in_memory(kind, adapters, dtype=dtype), tmp_path / "expected", is_sharded=is_sharded)
    assert contents(report.out) == contents(expected) != contents(base)
    assert report.adapters == {str(path): weight for path, weight in adapters.items()}
    assert report.replaced
    assert not set(report.replaced) & set(report.merged)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_weight_that_one_adapter_trained_whole_and_another_adapts_is_merged_as_in_memory(
    is_first: bool, tmp_path: Path
) -> None:
    base, layer = save_model(LLAMA, tmp_path / "base", dtype=torch.bfloat16), "model.layers.0.self_attn.q_proj"
    whole = {"targets": ["v_proj"], "train_also": [layer]}
    adapters = {
        save_adapter(LLAMA, tmp_path / "whole", dtype=torch.bfloat16, values=1, **whole): 1.0,
        save_adapter(LLAMA, tmp_path / "adapted", dtype=torch.bfloat16, values=2, targets=["q_proj"]): 0.5,
    }
    if not is_first:
        adapters = dict(reversed(adapters.items()))
    report = randlora.files.merge(adapters, tmp_path / "out", base=base)
    merged = merge_in_memory(LLAMA, adapters, dtype=torch.bfloat16)
    assert contents(report.out) == contents(write(merged, tmp_path / "expected"))
    assert f"{layer}.weight" in {*report.merged} & {*report.replaced}


def test_an_adapter_that_peft_wrote_is_merged_as_in_memory(tmp_path: Path) -> None:
    base = save_model(BERT, tmp_path / "base")
    peft_model(BERT, modules_to_save=["classifier"]).save_pretrained(tmp_path / "adapter")
    report = randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=base)
    merged = merge_in_memory(BERT, {tmp_path / "adapter": 1.0})
    assert contents(report.out) == contents(write(merged, tmp_path / "expected"))
    assert report.replaced


def test_a_wider_dtype_is_that_of_the_model_while_merging_and_a_narrower_is_rounded_to_once(tmp_path: Path) -> None:
    base = save_model(BERT, tmp_path / "base", dtype=torch.bfloat16, is_sharded=True)
    adapter = save_adapter(BERT, tmp_path / "adapter", dtype=torch.float32, train_also=["classifier"])
    for dtype in (torch.float32, torch.float16):
        wide = torch.promote_types(torch.bfloat16, dtype)
        report = randlora.files.merge(adapter, tmp_path / f"to {dtype}", base=base, dtype=dtype)
        model = BERT.build().to(torch.bfloat16).to(wide)
        randlora.load(model, adapter)
        randlora.merge(model)
        expected = write(model.to(dtype), tmp_path / f"expected {dtype}")
        assert_same_tensors(report.out, expected)
        assert (report.out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
        index = json.loads((report.out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert (
            index["metadata"]["total_size"] == report.nbytes == sum(each.nbytes for each in stored(expected).values())
        )
        assert set(index["weight_map"]) == set(stored(base))


def test_a_tensor_that_is_no_number_with_a_point_keeps_its_dtype(tmp_path: Path) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    held = load_file(base / "model.safetensors")
    held["position_ids"], held["empty"], held["scalar"] = torch.arange(5), torch.empty(0, 3), torch.tensor(1.5)
    save_file(held, base / "model.safetensors", {"format": "pt", "of": "ours"})
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    out = randlora.files.merge(adapter, tmp_path / "out", base=base, dtype=torch.bfloat16).out
    merged = load_file(out / "model.safetensors")
    assert same_bits(merged["position_ids"], torch.arange(5))
    assert merged["empty"].shape == (0, 3)
    assert {tensor.dtype for name, tensor in merged.items() if name != "position_ids"} == {torch.bfloat16}


def test_floats_of_8_bits_are_merged_into_in_a_wider_dtype_and_not_with_scales(tmp_path: Path) -> None:
    base, adapter = (
        save_model(LLAMA, tmp_path / "base", dtype=torch.bfloat16),
        save_adapter(LLAMA, tmp_path / "adapter"),
    )
    plain, file = save_model(LLAMA, tmp_path / "plain"), "model.safetensors"
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(base / file).items()}
    save_file(narrow, base / file, {"format": "pt"})
    save_file({name: tensor.float() for name, tensor in narrow.items()}, plain / file, {"format": "pt"})
    with pytest.raises(MergeError, match=r"is torch\.float8_e4m3fn, which would lose most of an update: give a dtype"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = (
            randlora.files.merge(adapter, tmp_path / f"{of.name} {dtype}", base=of, dtype=dtype).out
            for of in (base, plain)
        )
        assert_same_tensors(found, expected)
    scale = {"model.layers.0.self_attn.q_proj.scale_weight": torch.ones(())}
    save_file(narrow | scale, base / file, {"format": "pt"})
    with pytest.raises(MergeError, match=r"q_proj\.weight is torch\.float8_e4m3fn and has a scale, .*scale_weight"):
        randlora.files.merge(adapter, tmp_path / "out", base=base, dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


# Weights that are read, and models that have other names in files


@every_read_kind
def test_files_of_every_kind_are_inspected_merged_as_in_memory_and_not_converted_for_peft(
    kind: ReadKind, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in kind.model().state_dict().items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    model, adapter = kind.adapted(), tmp_path / "adapter"
    randlora.save(model, adapter)
    (found,) = randlora.files.inspect(adapter, norms=True).layers
    *_, out_features, in_features = kind.layer(model).adapters["default"].shape
    assert (found.fqn, found.out_features, found.in_features) == (kind.target, out_features, in_features)
    norm = torch.linalg.vector_norm(randlora.delta_weight(model, kind.target)).item()
    assert found.frobenius == pytest.approx(norm, rel=1e-5)
    assert randlora.files.verify(adapter, tmp_path / "base").passed
    if kind.kind != "linear":
        with pytest.raises(CheckpointError, match=rf"cannot convert for PEFT: .* not {kind.target} \({kind.kind}\)"):
            randlora.files.convert(adapter, tmp_path / "out", "peft")
        what = rf"(of kind {kind.kind}|a stack of \d matrices)"
        with pytest.raises(ConfigError, match=rf"{kind.target} is {what}, and only linear layers"):
            randlora.files.convert(adapter, tmp_path / "out", "lora", tolerance=1.0)
        randlora.files.convert(adapter, tmp_path / "native", "native")
        (again, header), (own, expected) = read_tensors(tmp_path / "native"), read_tensors(adapter)
        assert (all_bits(again), header) == (all_bits(own), expected)
    randlora.files.merge(adapter, tmp_path / "out", base=tmp_path / "base")
    randlora.merge(model)
    assert all_bits(load_file(tmp_path / "out" / "model.safetensors")) == all_bits(model.state_dict())


def test_a_kernel_of_another_size_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model, other = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.Conv2d(3, 8, 5))
    randlora.inject(model, r=2, targets=["0"])
    randlora.save(model, tmp_path / "adapter")
    patches = VIT.build()
    write(patches, tmp_path / "patches")  # which a class reads, unlike the other
    randlora.inject(patches, r=4, targets=["projection"])
    randlora.save(patches, tmp_path / "of patches")
    (tmp_path / "base").mkdir()
    save_file(other.state_dict(), tmp_path / "base" / "model.safetensors")
    tensors = load_file(tmp_path / "patches" / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("projection.weight"))
    save_file(tensors | {name: tensors[name][:, :, :4].contiguous()}, tmp_path / "patches" / "model.safetensors")
    before = contents(tmp_path)
    for adapter, base, said in (
        ("adapter", "base", "0 is 8 x 75 here, the adapter was trained on out x in = 8 x 27"),
        ("of patches", "patches", "projection is 32 x 96 here, the adapter was trained on out x in = 32 x"),
    ):
        with pytest.raises(CheckpointError, match=said):
            randlora.files.merge(tmp_path / adapter, tmp_path / "out", base=tmp_path / base)
        assert not randlora.files.verify(tmp_path / adapter, tmp_path / base).passed
    assert contents(tmp_path) == before
    with pytest.raises(CheckpointError, match="0 is 8 x 75 here"):
        randlora.load(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llava", "LlavaForConditionalGeneration"),
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("segformer", "SegformerForSemanticSegmentation"),
    ],
)
def test_an_adapter_under_the_names_in_memory_is_merged_into_files_of_other_names(
    model_type: str, name: str, tmp_path: Path
) -> None:
    model = tiny(model_type, name)
    assert model is not None
    write(model, tmp_path / "base")
    report = randlora.inject(model, r=4, targets="all-linear")
    randlora.save(fill(model, seed=0), tmp_path / "adapter")
    assert set(randlora.files.plan(tmp_path / "base", 4, targets="all-linear").targets) == set(report.targets)
    merged = randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base").merged
    randlora.merge(model)
    assert_same_tensors(tmp_path / "out", write(model, tmp_path / "expected"))
    assert len(merged) == len(report.targets)
    assert not {name.removesuffix(".weight") for name in merged} <= set(report.targets)

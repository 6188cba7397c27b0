"""Merging on disk equals loading, merging and saving: every file that comes out, byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import randlora
from randlora.bases.basis import Basis
from randlora.checkpoint.read import read_adapter
from randlora.config import BasisKind
from randlora.errors import MergeError
from randlora.files.base_fit import open_base
from randlora.files.changes import Changes, Merging, find_changes
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
from tests.models import BERT, GPT2, LLAMA, RealModel, every_transformers_model
from tests.peer import THEIR_WARNINGS, peft_model

pytestmark = THEIR_WARNINGS

both_layouts = pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])
every_basis = pytest.mark.parametrize("basis", ["dense", "sparse", "very_sparse", "block"])


@every_transformers_model
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_files_writes_what_loading_merging_and_saving_writes(
    kind: RealModel, is_sharded: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_model(kind, tmp_path / "base", dtype=dtype, is_sharded=is_sharded)
    adapter = save_adapter(kind, tmp_path / "adapter", dtype=dtype)
    report = randlora.files.merge(adapter, tmp_path / "out", base=base)
    expected = write(merge_in_memory(kind, {adapter: 1.0}, dtype=dtype), tmp_path / "expected", is_sharded=is_sharded)
    assert contents(report.out) == contents(expected) != contents(base)
    assert (len(list(base.glob("*.safetensors"))) > 1) == is_sharded


@every_transformers_model
def test_several_adapters_are_summed_as_in_memory_and_what_was_trained_beside_them_is_taken_over(
    kind: RealModel, tmp_path: Path
) -> None:
    base = save_model(kind, tmp_path / "base", dtype=torch.bfloat16, is_sharded=True)
    options: tuple[dict[str, Any], ...] = (
        {"train_also": [HEADS[kind.name]], "targets": list(kind.targets[:1]), "stream": "portable"},
        {"stream": "portable"},  # whose bases are those of the one before, which grow
        {"r": 5, "seed": 1},
        {"basis": "block", "r": 8},
    )
    adapters = {
        save_adapter(kind, tmp_path / f"adapter {number}", dtype=torch.bfloat16, values=number, **given): weight
        for number, (given, weight) in enumerate(zip(options, (0.7, 1.0, -0.3, 2.0), strict=True))
    }
    report = randlora.files.merge(adapters, tmp_path / "out", base=base)
    merged = merge_in_memory(kind, adapters, dtype=torch.bfloat16)
    assert contents(report.out) == contents(write(merged, tmp_path / "expected", is_sharded=True))
    assert report.adapters == {str(path): weight for path, weight in adapters.items()}
    assert report.replaced
    assert not set(report.replaced) & set(report.merged)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_weight_that_one_adapter_trained_whole_and_another_adapts_is_merged_as_in_memory(
    is_first: bool, tmp_path: Path
) -> None:
    base = save_model(LLAMA, tmp_path / "base", dtype=torch.bfloat16)
    layer = "model.layers.0.self_attn.q_proj"
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


@every_basis
def test_every_kind_of_bases_is_merged_as_in_memory(basis: BasisKind, tmp_path: Path) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    adapter = save_adapter(LLAMA, tmp_path / "adapter", basis=basis)
    report = randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert contents(report.out) == contents(write(merge_in_memory(LLAMA, {adapter: 1.0}), tmp_path / "expected"))


@every_transformers_model
def test_an_adapter_that_peft_wrote_is_merged_as_in_memory(kind: RealModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"modules_to_save": ["classifier"]} if kind is BERT else {}
    base = save_model(kind, tmp_path / "base")
    peft_model(kind, **options).save_pretrained(tmp_path / "adapter")
    report = randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=base)
    merged = merge_in_memory(kind, {tmp_path / "adapter": 1.0})
    assert contents(report.out) == contents(write(merged, tmp_path / "expected"))
    assert bool(report.replaced) == (kind is BERT)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@both_layouts
def test_a_wider_dtype_is_that_of_the_model_while_merging(
    narrow: torch.dtype, is_sharded: bool, tmp_path: Path
) -> None:
    base = save_model(BERT, tmp_path / "base", dtype=narrow, is_sharded=is_sharded)
    adapter = save_adapter(BERT, tmp_path / "adapter", dtype=torch.float32, train_also=["classifier"])
    report = randlora.files.merge(adapter, tmp_path / "out", base=base, dtype=torch.float32)
    model = BERT.build().to(narrow).to(torch.float32)
    randlora.load(model, adapter)
    randlora.merge(model)
    expected = write(model, tmp_path / "expected")
    assert_same_tensors(report.out, expected)
    assert (report.out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    assert report.nbytes == 2 * sum(tensor.nbytes for tensor in stored(base).values())


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrower_dtype_is_rounded_to_once_after_merging(narrow: torch.dtype, tmp_path: Path) -> None:
    base = save_model(GPT2, tmp_path / "base", is_sharded=True)
    adapter = save_adapter(GPT2, tmp_path / "adapter", train_also=["ln_f"])
    report = randlora.files.merge(adapter, tmp_path / "out", base=base, dtype=narrow)
    expected = write(merge_in_memory(GPT2, {adapter: 1.0}).to(narrow), tmp_path / "expected")
    assert_same_tensors(report.out, expected)
    assert (report.out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    index = json.loads((report.out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == report.nbytes
    assert set(index["weight_map"]) == set(stored(base))


def test_a_tensor_that_is_no_number_with_a_point_keeps_its_dtype(tmp_path: Path) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    held = load_file(base / "model.safetensors")
    held["position_ids"], held["empty"], held["scalar"] = torch.arange(5), torch.empty(0, 3), torch.tensor(1.5)
    save_file(held, base / "model.safetensors", {"format": "pt", "of": "ours"})
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    out = randlora.files.merge(adapter, tmp_path / "out", base=base, dtype=torch.bfloat16).out
    merged = load_file(out / "model.safetensors")
    assert torch.equal(merged["position_ids"], torch.arange(5))
    assert merged["empty"].shape == (0, 3)
    assert {tensor.dtype for name, tensor in merged.items() if name != "position_ids"} == {torch.bfloat16}


def float8_base(directory: Path, **beside: torch.Tensor) -> Path:
    """Save a model whose floating tensors are of 8 bits, and tensors beside them."""
    base = save_model(LLAMA, directory, dtype=torch.bfloat16)
    file = base / "model.safetensors"
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}
    save_file({**narrow, **beside}, file, {"format": "pt"})
    return base


def test_floats_of_8_bits_are_merged_into_in_a_wider_dtype(tmp_path: Path) -> None:
    base, adapter = float8_base(tmp_path / "base"), save_adapter(LLAMA, tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"is torch\.float8_e4m3fn, which would lose most of an update: give a dtype"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    wide = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    plain = save_model(LLAMA, tmp_path / "plain")
    save_file(wide, plain / "model.safetensors", {"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        randlora.files.merge(adapter, tmp_path / f"out {dtype}", base=base, dtype=dtype)
        randlora.files.merge(adapter, tmp_path / f"expected {dtype}", base=plain, dtype=dtype)
        found, expected = (
            load_file(tmp_path / f"{name} {dtype}" / "model.safetensors") for name in ("out", "expected")
        )
        assert found.keys() == expected.keys()
        assert all(found[name].dtype == dtype and torch.equal(found[name], expected[name]) for name in found)


def test_floats_of_8_bits_with_scales_are_refused(tmp_path: Path) -> None:
    scale = "model.layers.0.self_attn.q_proj.scale_weight"
    base, adapter = float8_base(tmp_path / "base", **{scale: torch.ones(())}), save_adapter(LLAMA, tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"q_proj\.weight is torch\.float8_e4m3fn and has a scale, .*scale_weight"):
        randlora.files.merge(adapter, tmp_path / "out", base=base, dtype=torch.bfloat16)
    assert not (tmp_path / "out").exists()


def bases(changes: Changes) -> list[Basis]:
    """List the bases of all updates, each once."""
    whole = [merging for merging in changes.computed.values() if isinstance(merging, Merging)]
    found = {id(update.basis): update.basis for merging in whole for update in merging.updates}
    return list(found.values())


def test_adapters_of_equal_bases_share_them(tmp_path: Path) -> None:
    base = open_base(save_model(LLAMA, tmp_path / "base"))
    adapters = {}
    for seed, name in enumerate("ab"):
        directory = save_adapter(LLAMA, tmp_path / name, values=seed)
        adapters[name] = directory, read_adapter(directory), 1.0
    assert len(bases(find_changes(base, adapters))) == 1

"""Quantized checkpoints: those of bitsandbytes are seen as dense ones, others are refused with the reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import randlora
from randlora.errors import CheckpointError
from randlora.files.model_directory import ModelDirectory, read_model_directory
from randlora.files.quantized import DenseView, as_dense
from randlora.files.transformers_model import build_model
from tests.model_directories import contents, save_adapter, save_model
from tests.models import GPT2, LLAMA, RealModel
from tests.quantized_checkpoints import QUANTIZATIONS, quantize

LAYER = "model.layers.0.self_attn.q_proj"
MARKED = {
    f"{LAYER}.qweight": "GPTQ or AWQ",
    f"{LAYER}.weight_scale_inv": "blocks of 8-bit floats",
    f"{LAYER}.weight_packed": "compressed-tensors",
}

verbs = pytest.mark.parametrize(
    "verb",
    [
        lambda root: randlora.files.plan(root / "base"),
        lambda root: randlora.files.merge(root / "base", root / "adapter", root / "out"),
    ],
    ids=["plan", "merge"],
)


def settings(base: Path, change: dict[str, Any]) -> None:
    """Change fields of ``config.json``; ``None`` takes one out."""
    config = {**json.loads((base / "config.json").read_text(encoding="utf-8")), **change}
    config = {name: value for name, value in config.items() if value is not None}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")


def dense_view(directory: ModelDirectory) -> DenseView:
    """Return a checkpoint as if it were not quantized."""
    return as_dense(directory, build_model(directory))


@verbs
@pytest.mark.parametrize("name", MARKED)
def test_a_tensor_that_only_other_quantized_checkpoints_have_is_named(
    name: str, verb: Callable[[Path], object], tmp_path: Path
) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    save_adapter(LLAMA, tmp_path / "adapter")
    held = load_file(base / "model.safetensors")
    save_file({**held, name: torch.zeros(4, dtype=torch.uint8)}, base / "model.safetensors")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"is quantized .*{name} is of {MARKED[name]}.*floating dtype"):
        verb(tmp_path)
    assert contents(tmp_path) == before


@verbs
@pytest.mark.parametrize("said", [{"quant_method": "fp8"}, {"quant_method": "gptq", "load_in_4bit": True}, {"bits": 4}])
def test_what_config_json_says_of_other_quantization_is_believed(
    said: dict[str, Any], verb: Callable[[Path], object], tmp_path: Path
) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    save_adapter(LLAMA, tmp_path / "adapter")
    settings(base, {"quantization_config": said})
    method = said.get("quant_method", "an unnamed method")
    with pytest.raises(CheckpointError, match=f"config.json says with {method}"):
        verb(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_what_bitsandbytes_quantized_has_the_headers_of_the_dense_checkpoint(
    quantization: str, kind: RealModel, tmp_path: Path
) -> None:
    base = read_model_directory(quantize(kind, quantization, tmp_path / "base"))
    dense = read_model_directory(tmp_path / "base dense")
    view = dense_view(base)
    headers = {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in view.directory.entries.items()}
    assert headers == {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in dense.entries.items()}
    assert view.directory.config == dense.config != base.config
    assert view.directory.nbytes == dense.nbytes > base.nbytes or quantization != "8 bits"
    again = dense_view(view.directory)
    assert again.directory is view.directory
    assert not again.codes


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "float32"}, torch.float32),
        ({"dtype": None}, torch.float16),
    ],
)
def test_codes_of_8_bits_stand_for_numbers_of_the_configs_dtype(
    said: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base = quantize(LLAMA, "8 bits", tmp_path / "base")
    settings(base, said)
    view = dense_view(read_model_directory(base))
    assert {view.directory.entries[name].dtype for name in view.codes} == {dtype}


def test_a_config_of_the_first_versions_which_names_no_method_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    base = quantize(LLAMA, "nf4", tmp_path / "base")
    expected = dense_view(read_model_directory(base))
    settings(base, {"quantization_config": {"load_in_4bit": True}})
    found = dense_view(read_model_directory(base))
    assert (found.directory.entries, found.kinds) == (expected.directory.entries, ("nf4",))
    settings(base, {"quantization_config": None})
    assert dense_view(read_model_directory(base)).directory.entries == expected.directory.entries


def test_a_checkpoint_that_is_not_quantized_stays_as_it_is(tmp_path: Path) -> None:
    directory = read_model_directory(save_model(LLAMA, tmp_path))
    unsaid = replace(directory, config={**directory.config, "quantization_config": None})
    assert dense_view(directory).directory is directory
    assert dense_view(unsaid).directory is unsaid

"""Quantised checkpoints are refused, with the reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import randlora
from tests.model_directories import contents, save_adapter, save_model
from tests.models import LLAMA

LAYER = "model.layers.0.self_attn.q_proj"
MARKED = {
    f"{LAYER}.weight.quant_state.bitsandbytes__nf4": "bitsandbytes, 4 bits",
    f"{LAYER}.weight.absmax": "bitsandbytes, 4 bits",
    f"{LAYER}.SCB": "bitsandbytes, 8 bits",
    f"{LAYER}.qweight": "GPTQ or AWQ",
    f"{LAYER}.weight_scale_inv": "blocks of 8-bit floats",
}

verbs = pytest.mark.parametrize(
    "verb",
    [
        lambda root: randlora.plan_directory(root / "base"),
        lambda root: randlora.merge_files(root / "base", root / "adapter", root / "out"),
    ],
    ids=["plan", "merge"],
)


@verbs
@pytest.mark.parametrize("name", MARKED)
def test_a_tensor_that_only_quantised_checkpoints_have_is_named(
    name: str, verb: Callable[[Path], object], tmp_path: Path
) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    save_adapter(LLAMA, tmp_path / "adapter")
    held = load_file(base / "model.safetensors")
    save_file({**held, name: torch.zeros(4, dtype=torch.uint8)}, base / "model.safetensors")
    before = contents(tmp_path)
    with pytest.raises(randlora.CheckpointError, match=f"is quantised .*{name} is of {MARKED[name]}.*floating dtype"):
        verb(tmp_path)
    assert contents(tmp_path) == before


@verbs
def test_what_config_json_says_of_quantisation_is_believed(verb: Callable[[Path], object], tmp_path: Path) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    save_adapter(LLAMA, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(randlora.CheckpointError, match=r"config.json says with fp8"):
        verb(tmp_path)
    assert not (tmp_path / "out").exists()

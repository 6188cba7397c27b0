"""Quantized checkpoints: those of bitsandbytes are planned, fitted and not merged into; others are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora.errors import CheckpointError
from randlora.files.model_directory import find_codes, read_model_directory
from tests.directories import their_directory
from tests.kit import fill
from tests.model_directories import contents, save_adapter, save_model, stored
from tests.models import GPT2, LLAMA, RealModel
from tests.peer import THEIR_WARNINGS, told_stream
from tests.quantized_checkpoints import KINDS, every_quantization, load_quantized, quantize

pytestmark = THEIR_WARNINGS

LAYER = "model.layers.0.self_attn.q_proj"
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "GPTQ": ({f"{LAYER}.qweight": 4}, {}, rf"{LAYER}\.qweight is of GPTQ or AWQ"),
    "blocks": ({f"{LAYER}.weight_scale_inv": 4}, {}, r"weight_scale_inv is of blocks of 8-bit floats"),
    "compressed": ({f"{LAYER}.weight_packed": 4}, {}, r"weight_packed is of compressed-tensors"),
    "fp8 by config": ({}, {"quant_method": "fp8"}, "config.json says with fp8"),
    "GPTQ by config": ({}, {"quant_method": "gptq", "load_in_4bit": True}, "config.json says with gptq"),
    "unnamed": ({}, {"bits": 4}, "config.json says with an unnamed method"),
    "without codes": ({"model.lost.weight.quant_state.bitsandbytes__nf4": 4}, {}, r"has no model\.lost\.weight, only"),
}
both_kinds = pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)


def settings(base: Path, said: dict[str, Any] | None) -> None:
    """Change what ``config.json`` says of a quantization; ``None`` takes it out."""
    config = {**json.loads((base / "config.json").read_text(encoding="utf-8")), "quantization_config": said}
    config = {name: value for name, value in config.items() if value is not None}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")


def refused(message: str, root: Path, *verbs: str) -> None:
    """Assert that verbs refuse the base and the adapter below a directory, and that nothing changes there."""
    before, base, adapter = contents(root), root / "base", root / "adapter"
    calls: dict[str, Callable[[], object]] = {
        "plan": lambda: randlora.files.plan(base),
        "inspect": lambda: randlora.files.inspect(adapter, base),
        "merge": lambda: randlora.files.merge(adapter, root / "out", base=base),
    }
    for verb in verbs or calls:
        with pytest.raises(CheckpointError, match=message):
            calls[verb]()
    assert contents(root) == before


@pytest.mark.parametrize(("tensors", "said", "message"), OTHERS.values(), ids=OTHERS)
def test_another_quantization_is_refused_by_name(
    tensors: dict[str, int], said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    save_adapter(LLAMA, tmp_path / "adapter")
    file, more = base / "model.safetensors", {name: torch.zeros(size) for name, size in tensors.items()}
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    settings(base, said or None)
    refused(message, tmp_path)


@every_quantization
def test_codes_of_bitsandbytes_are_found_and_not_merged_into(
    quantization: str, kind: RealModel, tmp_path: Path
) -> None:
    base = quantize(kind, quantization, tmp_path / "base", is_sharded=True)
    save_adapter(kind, tmp_path / "adapter")
    codes, held, dense = find_codes(read_model_directory(base)), stored(base), stored(tmp_path / "base dense")
    coded = [name for name, own in dense.items() if (held[name].dtype, held[name].shape) != (own.dtype, own.shape)]
    assert sorted(codes) == sorted(coded)
    assert {found.kind for found in codes.values()} == {KINDS[quantization]}
    plain = sum(tensor.nbytes for name, tensor in dense.items() if name not in codes)
    assert plain + sum(found.nbytes for found in codes.values()) == read_model_directory(base).nbytes
    message = rf"base', which is quantized \({KINDS[quantization]}\): load the model and merge in memory, or merge into"
    refused(message, tmp_path, "merge")
    for place in ("base", "base dense"):
        assert randlora.files.verify(tmp_path / "adapter", tmp_path / place).passed
    assert find_codes(read_model_directory(tmp_path / "base dense")) == {}


@pytest.mark.parametrize("said", [{"load_in_4bit": True}, None], ids=["no method", "nothing"])
def test_what_the_first_versions_said_of_codes_or_did_not_suffices(said: dict[str, Any] | None, tmp_path: Path) -> None:
    base = quantize(LLAMA, "nf4", tmp_path / "base")
    expected = randlora.files.plan(base, 4)
    settings(base, said)
    assert randlora.files.plan(base, 4) == expected


@both_kinds
def test_an_adapter_trained_on_the_quantized_model_fits_it(kind: RealModel, tmp_path: Path) -> None:
    base = quantize(kind, "8 bits", tmp_path / "base")
    model = load_quantized(tmp_path / "base dense", "8 bits")
    report = randlora.inject(model, r=4, targets=list(kind.targets))
    randlora.save(fill(model), tmp_path / "adapter")
    assert randlora.files.verify(tmp_path / "adapter", base).passed
    found = randlora.files.inspect(tmp_path / "adapter", base)
    assert tuple(layer.fqn for layer in found.layers) == report.targets
    dense = randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base dense")
    assert len(dense.merged) == len(report.targets)


@both_kinds
def test_a_quantized_base_gives_a_file_of_peft_its_shapes(kind: RealModel, tmp_path: Path) -> None:
    base, (source, _) = quantize(kind, "nf4", tmp_path / "base"), their_directory(kind, tmp_path)
    written = [
        randlora.files.convert(source, tmp_path / out, "native", base=of, stream=told_stream(source)).out
        for out, of in (("of quantized", base), ("of dense", tmp_path / "base dense"))
    ]
    assert contents(written[0]) == contents(written[1])


def test_codes_cannot_be_what_was_trained_with_an_adapter(tmp_path: Path) -> None:
    quantize(LLAMA, "nf4", tmp_path / "base")
    model: nn.Module = LLAMA.build()
    randlora.inject(model, r=4, targets=["q_proj"], train_also=["up_proj"])
    randlora.save(fill(model), tmp_path / "adapter")
    refused(r"up_proj\.weight is quantized here, and was trained as", tmp_path, "inspect")

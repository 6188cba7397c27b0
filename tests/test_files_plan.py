"""What is planned from headers is what is planned from the model, to the last field, and of a quantized one as well."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import randlora
from randlora.__main__ import main
from randlora.errors import CheckpointError, ConfigError, TargetError
from randlora.files.model_directory import find_codes, read_model_directory
from tests.directories import their_directory
from tests.kit import fill
from tests.model_directories import HEADS, contents, save_adapter, save_model, stored, write
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel
from tests.peer import THEIR_WARNINGS, told_stream
from tests.quantized_checkpoints import KINDS, every_quantization, load_quantized, quantize

pytestmark = THEIR_WARNINGS

REGEX = {
    "targets": r".*\.(1|0)\..*",
    "exclude": r".*\.(up_proj|c_fc|intermediate\.dense|fc1)",
    "basis": "very_sparse",
    "alpha": 3.0,
}


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LLAMA, {}),
        (BERT, {"targets": "all-linear"}),
        (VIT, {"targets": "all-linear", "basis": "block", "r": 8, "seed": 5}),
        (GPT2, REGEX),
    ],
    ids=["preset", "all-linear", "block", "regex"],
)
def test_plan_and_memory_from_headers_equal_those_of_the_model(
    kind: RealModel, is_sharded: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    model = kind.build().to(torch.bfloat16)
    write(model, tmp_path, is_sharded=is_sharded)
    before = contents(tmp_path)
    asked: dict[str, Any] = {"r": 4, "train_also": [HEADS[kind.name]] if is_sharded else None, **options}
    assert randlora.files.plan(tmp_path, **asked) == randlora.plan(model, **asked)
    asked |= {"devices": 3, "strategy": "fsdp2" if is_sharded else "ddp", "tokens": 10}
    assert randlora.files.training_memory(tmp_path, **asked) == randlora.training_memory(model, **asked)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("labels", [{}, {"num_labels": 5}], ids=str)
def test_a_plan_may_be_of_another_class_with_other_labels(labels: dict[str, Any], tmp_path: Path) -> None:
    save_model(BERT, tmp_path)
    name = "AutoModelForTokenClassification"
    model = getattr(transformers, name).from_pretrained(tmp_path, **labels, ignore_mismatched_sizes=True)
    options: dict[str, Any] = {"r": 4, "targets": "all-linear", "train_also": ["classifier"]}
    asked: dict[str, Any] = {**options, "model_class": name, **labels}
    assert randlora.files.plan(tmp_path, **asked) == randlora.plan(model, **options)
    assert randlora.files.training_memory(tmp_path, **asked) == randlora.training_memory(model, **options)


def test_what_is_none_for_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(BERT, tmp_path)
    unknown: dict[str, dict[str, Any]] = {
        "has no AutoModelForLanguages for model_type 'bert'": {"model_class": "AutoModelForLanguages"},
        "its config.json describes no LlamaForCausalLM": {"model_class": "LlamaForCausalLM"},
        "has no BertTokenizer for model_type 'bert'": {"model_class": "BertTokenizer"},
        "model_class must be a string or None, got": {"model_class": BERT},
        "num_labels must be a positive integer of at most 1048576, got 0": {"num_labels": 0},
    }
    for message, options in unknown.items():
        with pytest.raises(ConfigError, match=message):
            randlora.files.plan(tmp_path, **options)
    assert main(["plan", str(tmp_path), "--class", "BertTokenizer"]) == 2
    assert capsys.readouterr().out == ""
    by_both: dict[str, dict[str, Any]] = {
        "'quarry' matches no layer or weight that can be adapted; the nearest names are": {"targets": ["quarry"]},
        "matches no .*, only bert.embeddings.LayerNorm": {"targets": r".*embeddings\.LayerNorm"},
        "r must be a positive integer": {"r": 0},
    }
    for message, options in by_both.items():
        with pytest.raises(randlora.errors.RandLoRAError, match=message) as of_files:
            randlora.files.plan(tmp_path, **options)
        with pytest.raises(randlora.errors.RandLoRAError) as of_model:
            randlora.plan(BERT.build(), **options)
        assert str(of_files.value) == str(of_model.value)


def test_the_first_files_of_gpt2_are_read_under_the_names_of_the_model(tmp_path: Path) -> None:
    model = GPT2.build()
    write(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    first = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    for block in range(2):  # masks, which those files hold and no model has
        first[f"h.{block}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        first[f"h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(first, tmp_path / "model.safetensors", {"format": "pt"})
    for targets in (None, "all-linear"):
        assert randlora.files.plan(tmp_path, 4, targets=targets) == randlora.plan(model, 4, targets=targets)


def change_config(directory: Path, **fields: Any) -> None:
    """Change fields of ``config.json``; ``None`` takes one out."""
    config = {**json.loads((directory / "config.json").read_text(encoding="utf-8")), **fields}
    config = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_where_there_is_no_model_to_plan_the_error_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, dict[str, Any]] = {
        "names OwnForCausalLM, which transformers .* lacks; or build": {"architectures": ["OwnForCausalLM"]},
        "names AutoModel, which transformers .* lacks; or build": {"architectures": ["AutoModel"]},
        "its config.json names no class; or build the model": {"architectures": None},
        "cannot build LlamaForCausalLM from its config.json": {"num_attention_heads": "many"},
        r"up_proj.weight has shape \(48, 32\) in the files, \(40, 32\) by its config": {"intermediate_size": 40},
    }
    for message, fields in reasons.items():
        change_config(save_model(LLAMA, tmp_path), **fields)
        with pytest.raises(CheckpointError, match=f"(?s)cannot plan for .*{message}"):
            randlora.files.plan(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        CheckpointError, match=r"(?s)cannot plan for .*transformers, .* is not installed: python -m pip"
    ):
        randlora.files.plan(tmp_path)


# Quantized checkpoints: those of bitsandbytes are planned, fitted and not merged into; others are refused by name


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


@every_quantization
def test_a_quantized_model_is_planned_as_the_dense_one_and_not_merged_into(
    kind: RealModel, quantization: str, tmp_path: Path
) -> None:
    base, dense = quantize(kind, quantization, tmp_path / "base", is_sharded=True), tmp_path / "base dense"
    options: dict[str, Any] = {"r": 4, "targets": "all-linear", "train_also": [HEADS[kind.name]]}
    expected = randlora.files.plan(dense, **options)
    note = f"the model is quantized ({KINDS[quantization]}): parameters are counted as if it were not quantized"
    assert randlora.files.plan(base, **options) == replace(expected, notes=(*expected.notes, note))
    codes, held, own = find_codes(read_model_directory(base)), stored(base), stored(dense)
    buffers = sum(buffer.nbytes for buffer in kind.build().to(torch.bfloat16).buffers())
    size = sum(tensor.nbytes for tensor in held.values())
    assert randlora.files.training_memory(base, **options).weights == size + buffers
    coded = [name for name, each in own.items() if (held[name].dtype, held[name].shape) != (each.dtype, each.shape)]
    assert sorted(codes) == sorted(coded)
    assert {found.kind for found in codes.values()} == {KINDS[quantization]}
    plain = sum(tensor.nbytes for name, tensor in own.items() if name not in codes)
    assert plain + sum(found.nbytes for found in codes.values()) == read_model_directory(base).nbytes
    assert find_codes(read_model_directory(dense)) == {}
    adapter = save_adapter(kind, tmp_path / "adapter")
    message = rf"base', which is quantized \({KINDS[quantization]}\): load the model and merge in memory, or merge into"
    refused(message, tmp_path, "merge")
    assert all(randlora.files.verify(adapter, place).passed for place in (base, dense))


OTHERS: dict[str, tuple[dict[str, int], dict[str, Any] | None]] = {
    r"q_proj\.qweight is of GPTQ or AWQ": ({"model.layers.0.self_attn.q_proj.qweight": 4}, None),
    r"weight_scale_inv is of blocks of 8-bit floats": ({"model.layers.0.self_attn.q_proj.weight_scale_inv": 4}, None),
    r"weight_packed is of compressed-tensors": ({"model.layers.0.self_attn.q_proj.weight_packed": 4}, None),
    r"has no model\.lost\.weight, only": ({"model.lost.weight.quant_state.bitsandbytes__nf4": 4}, None),
    "config.json says with fp8": ({}, {"quant_method": "fp8"}),
    "config.json says with gptq": ({}, {"quant_method": "gptq", "load_in_4bit": True}),
    "config.json says with an unnamed method": ({}, {"bits": 4}),
}


def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(LLAMA, tmp_path / "adapter")
    for message, (sizes, said) in OTHERS.items():
        file = save_model(LLAMA, tmp_path / "base") / "model.safetensors"
        save_file(load_file(file) | {name: torch.zeros(size) for name, size in sizes.items()}, file, {"format": "pt"})
        change_config(tmp_path / "base", quantization_config=said)
        refused(message, tmp_path)


def test_what_the_first_versions_said_of_codes_suffices_and_they_cannot_be_trained(tmp_path: Path) -> None:
    base = quantize(LLAMA, "nf4", tmp_path / "base")
    with pytest.raises(TargetError, match=r"train_also includes model.layers.0.mlp.up_proj.weight, which is"):
        randlora.files.plan(base, 4, targets=["q_proj"], train_also=["up_proj"])
    save_adapter(LLAMA, tmp_path / "adapter", targets=["q_proj"], train_also=["up_proj"])
    refused(r"up_proj\.weight is quantized here, and was trained as", tmp_path, "inspect")
    expected = randlora.files.plan(base, 4)
    for said in ({"load_in_4bit": True}, None):
        change_config(base, quantization_config=said)
        assert randlora.files.plan(base, 4) == expected


def test_an_adapter_trained_on_the_quantized_model_fits_it_and_the_dense_one(tmp_path: Path) -> None:
    base, dense = quantize(LLAMA, "8 bits", tmp_path / "base"), tmp_path / "base dense"
    model = load_quantized(dense, "8 bits")
    report = randlora.inject(model, r=4, targets=list(LLAMA.targets))
    randlora.save(fill(model), tmp_path / "adapter")
    assert randlora.files.verify(tmp_path / "adapter", base).passed
    found = randlora.files.inspect(tmp_path / "adapter", base)
    assert tuple(layer.fqn for layer in found.layers) == report.targets
    merged = randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=dense).merged
    assert len(merged) == len(report.targets)


def test_a_quantized_base_gives_a_file_of_peft_its_shapes(tmp_path: Path) -> None:
    base, (source, _) = quantize(GPT2, "nf4", tmp_path / "base"), their_directory(GPT2, tmp_path)
    written = [
        randlora.files.convert(source, tmp_path / out, "native", base=of, stream=told_stream(source)).out
        for out, of in (("of quantized", base), ("of dense", tmp_path / "base dense"))
    ]
    assert contents(written[0]) == contents(written[1])

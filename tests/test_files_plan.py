"""What is planned from headers is what is planned from the model, to the last field."""

import json
import sys
from collections.abc import Callable, Mapping
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
from tests.model_directories import HEADS, contents, save_model, stored, write
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, every_transformers_model
from tests.quantized_checkpoints import KINDS, every_quantization, quantize

both_layouts = pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])

OPTIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"targets": "all-linear"},
    {"targets": "all-linear", "basis": "block", "r": 8, "seed": 5},
    {
        "targets": r".*\.(1|0)\..*",
        "exclude": r".*\.(up_proj|c_fc|intermediate\.dense|fc1)",
        "basis": "very_sparse",
        "alpha": 3.0,
    },
)


@every_transformers_model
@both_layouts
@pytest.mark.parametrize("options", OPTIONS, ids=["preset", "all-linear", "block", "regex"])
def test_a_plan_from_headers_equals_that_of_the_model(
    kind: RealModel, is_sharded: bool, options: Mapping[str, Any], tmp_path: Path
) -> None:
    model = kind.build().to(torch.bfloat16)
    write(model, tmp_path, is_sharded=is_sharded)
    before = contents(tmp_path)
    assert randlora.files.plan(tmp_path, **{"r": 4, **options}) == randlora.plan(model, **{"r": 4, **options})
    assert contents(tmp_path) == before


@every_transformers_model
def test_what_is_trained_beside_is_counted_as_in_the_model(kind: RealModel, tmp_path: Path) -> None:
    model = kind.build()
    write(model, tmp_path)
    options: dict[str, Any] = {"r": 4, "targets": list(kind.targets), "train_also": [HEADS[kind.name]]}
    report = randlora.files.plan(tmp_path, **options)
    assert report == randlora.plan(model, **options)
    assert report.train_also


@pytest.mark.parametrize("num_labels", [None, 5])
def test_a_plan_may_be_of_another_class_with_other_labels(num_labels: int | None, tmp_path: Path) -> None:
    save_model(BERT, tmp_path)
    name = "AutoModelForTokenClassification"
    labels = {} if num_labels is None else {"num_labels": num_labels}
    model = getattr(transformers, name).from_pretrained(tmp_path, **labels, ignore_mismatched_sizes=True)
    options: dict[str, Any] = {"r": 4, "targets": "all-linear", "train_also": ["classifier"]}
    asked: dict[str, Any] = {**options, "model_class": name, **labels}
    assert randlora.files.plan(tmp_path, **asked) == randlora.plan(model, **options)
    assert randlora.files.training_memory(tmp_path, **asked) == randlora.training_memory(model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_class": "AutoModelForLanguages"}, "has no AutoModelForLanguages for model_type 'bert'"),
        ({"model_class": "LlamaForCausalLM"}, "its config.json describes no LlamaForCausalLM"),
        ({"model_class": "BertTokenizer"}, "has no BertTokenizer for model_type 'bert'"),
        ({"model_class": BERT}, "model_class must be a string or None, got"),
        ({"num_labels": 0}, "num_labels must be a positive integer of at most 1048576, got 0"),
    ],
)
def test_a_class_that_is_none_for_the_model_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(BERT, tmp_path)
    with pytest.raises(ConfigError, match=message):
        randlora.files.plan(tmp_path, **options)
    flags = {"model_class": "--class", "num_labels": "--num-labels"}
    words = [word for name, value in options.items() for word in (flags[name], str(value))]
    assert main(["plan", str(tmp_path), *words]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("'quarry' matches no layer or weight that can be adapted; the nearest names are", {"targets": ["quarry"]}),
        ("matches no .*, only bert.embeddings.LayerNorm", {"targets": r".*embeddings\.LayerNorm"}),
        ("r must be a positive integer", {"r": 0}),
    ],
)
def test_what_the_model_would_refuse_is_refused(message: str, options: dict[str, Any], tmp_path: Path) -> None:
    save_model(BERT, tmp_path)
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
    for options in OPTIONS[:3]:
        assert randlora.files.plan(tmp_path, **{"r": 4, **options}) == randlora.plan(model, **{"r": 4, **options})


def without_transformers(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


def edited(**fields: Any) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Return what changes fields of ``config.json``."""

    def edit(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_transformers, "transformers, .* is not installed: python -m pip install 'transformers>="),
        (edited(architectures=["OwnForCausalLM"]), "names OwnForCausalLM, which transformers .* lacks; or build"),
        (edited(architectures=["AutoModel"]), "names AutoModel, which transformers .* lacks; or build"),
        (edited(architectures=None), "its config.json names no class; or build the model"),
        (edited(num_attention_heads="many"), "cannot build LlamaForCausalLM from its config.json"),
        (edited(intermediate_size=40), r"up_proj.weight has shape \(48, 32\) in the files, \(40, 32\) by its config"),
    ],
    ids=["no-transformers", "own", "auto", "none", "nonsense", "shape"],
)
def test_where_there_is_no_model_to_plan_the_error_says_why(
    change: Callable[[pytest.MonkeyPatch, Path], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(LLAMA, tmp_path)
    change(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s)cannot plan for .*{message}"):
        randlora.files.plan(tmp_path)


@pytest.mark.parametrize("kind", [LLAMA, VIT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_memory_of_training_is_that_of_the_model(kind: RealModel, strategy: Any, tmp_path: Path) -> None:
    setup: dict[str, Any] = {"devices": 3, "strategy": strategy, "tokens": 10}
    options: dict[str, Any] = {"r": 4, "train_also": [HEADS[kind.name]], **setup}
    model = kind.build().to(torch.bfloat16)
    write(model, tmp_path)
    assert randlora.files.training_memory(tmp_path, **options) == randlora.training_memory(model, **options)


@every_quantization
def test_the_plan_of_a_quantized_model_is_that_of_the_dense_one(
    kind: RealModel, quantization: str, tmp_path: Path
) -> None:
    base = quantize(kind, quantization, tmp_path / "base")
    options: dict[str, Any] = {"r": 4, "targets": "all-linear", "train_also": [HEADS[kind.name]]}
    found = randlora.files.plan(base, **options)
    expected = randlora.files.plan(tmp_path / "base dense", **options)
    note = f"the model is quantized ({KINDS[quantization]}): parameters are counted as if it were not quantized"
    assert found == replace(expected, notes=(*expected.notes, note))
    size = sum(tensor.nbytes for tensor in stored(base).values())
    buffers = sum(buffer.nbytes for buffer in kind.build().to(torch.bfloat16).buffers())
    assert randlora.files.training_memory(base, **options).weights == size + buffers


def test_codes_cannot_be_trained_beside_an_adapter(tmp_path: Path) -> None:
    base = quantize(LLAMA, "nf4", tmp_path / "base")
    with pytest.raises(TargetError, match=r"train_also includes model.layers.0.mlp.up_proj.weight, which is"):
        randlora.files.plan(base, 4, targets=["q_proj"], train_also=["up_proj"])

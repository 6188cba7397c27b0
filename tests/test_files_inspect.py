"""What `files` say without loading a model: inspected, verified and planned for, as by the model that they are of."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import randlora
from randlora.errors import CheckpointError, TargetError
from randlora.files.inspect import Verification
from randlora.files.model_directory import find_codes, read_model_directory
from randlora.targets.select import find_targets
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE, basis_of, edit_fields, edit_tensors
from tests.directories import base_directory, our_directory, their_directory
from tests.kit import fill
from tests.model_directories import HEADS, contents, edit_json, edit_model, save_adapter, save_model, stored, write
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel
from tests.peer import ALPHA, THEIR_WARNINGS, R, in_ours, told_stream
from tests.quantized import KINDS, every_quantization, load_quantized, quantize

pytestmark = THEIR_WARNINGS


def outcomes(verification: Verification) -> dict[str, str]:
    return {check.name: check.outcome for check in verification.checks}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LLAMA, {}), (GPT2, {"basis": "block"}), (VIT, {"basis": "sparse", "stream": "portable", "seed": 5})],
    ids=["llama", "gpt2", "vit"],
)
def test_what_we_saved_passes_and_is_as_in_the_model(kind: RealModel, options: dict[str, Any], tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path, bases="stored" if kind is GPT2 else "seed", **options)
    told: list[tuple[int, int, str]] = []
    summary = randlora.files.inspect(source, progress=lambda *news: told.append(news))
    assert told == [(n, len(told) - 1, doing) for n, doing in enumerate([*(x.fqn for x in summary.layers), "done"])]
    report = randlora.load(kind.build(), source)
    assert summary.trainable_parameters == report.trainable_parameters
    sizes = {site.fqn: site.shape for site in find_targets(model, list(kind.targets))}
    assert {layer.fqn: (layer.out_features, layer.in_features) for layer in summary.layers} == sizes
    for layer in summary.layers:
        values = torch.linalg.svdvals(randlora.delta_weight(model, layer.fqn).detach().double())
        assert layer.frobenius == pytest.approx(float(values.square().sum().sqrt()), rel=1e-5)
        assert layer.spectral == pytest.approx(float(values[0]), rel=1e-5)
        assert layer.stable_rank == pytest.approx(float((values / values[0]).square().sum()), rel=1e-4)
        assert layer.num_bases == -(-layer.min_dim // R)
    basis, (bases,) = basis_of(model), summary.bases
    assert (bases.spec, bases.source, bases.digest) == (basis.spec, "seed", basis.digest(*basis.extent))
    assert (summary.config.r, summary.config.alpha) == (R, ALPHA)
    assert summary.writer == f"randlora {randlora.__version__}, format 1"
    assert summary.storage == ("stored once in the file" if kind is GPT2 else "drawn from the seed")
    assert summary.nbytes == sum(len(contents(source)[name]) for name in (CONFIG_FILE, TENSORS_FILE))
    source = source.rename(tmp_path / os.fsdecode(b"caf\xe9"))  # no UTF-8
    without = randlora.files.inspect(source, norms=False)
    assert {(layer.frobenius, layer.stable_rank) for layer in without.layers} == {(None, None)}
    assert [layer.fqn for layer in without.layers] == list(report.targets)
    found = randlora.files.verify(source, progress=lambda *news: told.append(news))
    assert outcomes(found) == {"files": "passed", "checksum": "passed", "bases": "passed"}
    assert str(found).endswith("is sound")
    assert told[-1][0] == told[-1][1]


def test_what_was_trained_beside_it_its_base_and_strange_fields_are_named(tmp_path: Path) -> None:
    source, _ = our_directory(BERT, tmp_path, train_also=["classifier"])
    edit_model(base := base_directory(BERT, tmp_path), {"classifier.weight": None, "classifier.bias": None})
    edit_fields(source, {"use_quantum": 3, "base_model_name_or_path": "some/model"})
    summary = randlora.files.inspect(source)
    assert summary.trained == {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    assert (summary.base_model, summary.unknown_fields) == ("some/model", ("use_quantum",))
    for part in ("some/model", "trained with it: classifier.weight 3x32", "not understood: use_quantum"):
        assert part in str(summary)
    found = randlora.files.verify(source, base)
    assert found.passed
    assert "classifier.weight, classifier.bias of its class are not in its files" in str(found)


@pytest.mark.parametrize("copies", ["per layer", "once", "none"])
def test_a_file_of_peft_says_all_but_the_shapes_and_with_its_base_all(copies: str, tmp_path: Path) -> None:
    source, _ = their_directory(LLAMA, tmp_path, save_projection=copies != "none")
    if copies == "once":
        top = {"base_model.randlora_A", "base_model.randlora_B"}
        tensors = load_file(source / TENSORS_FILE)
        edit_tensors(source, {}, drop=[key for key in tensors if key not in top and key[-2:] in ("_A", "_B")])
    summary, base, stream = randlora.files.inspect(source), base_directory(LLAMA, tmp_path), told_stream(source)
    expected = {"per layer": "stored 9 times in the file", "once": "stored once in the file"}
    assert summary.storage == expected.get(copies, "drawn from the seed")
    assert summary.writer == "PEFT 0.21.2"
    assert (summary.bases == ()) == (copies == "none")
    assert {(layer.out_features, layer.in_features, layer.frobenius) for layer in summary.layers} == {(None,) * 3}
    assert "give base=, the directory of its base model" in summary.notes[-1]
    assert "?" in str(summary)
    whole, model = randlora.files.inspect(source, base, stream=stream), in_ours(LLAMA, source)
    for layer in whole.layers:
        norm = torch.linalg.norm(randlora.delta_weight(model, layer.fqn).detach().double())
        assert layer.frobenius == pytest.approx(float(norm), rel=1e-5)
    basis = basis_of(model)
    assert whole.bases[0].digest == basis.digest(*basis.extent)
    assert len(whole.notes) == (copies == "none" and stream is None)  # of the stream assumed
    passed = {"files": "passed", "checksum": "not checked", "bases": "not checked" if copies == "none" else "passed"}
    alone, beside = (randlora.files.verify(source, of) for of in (None, base))
    assert (outcomes(alone), outcomes(beside)) == (passed, {**passed, "base": "passed"})
    assert alone.passed
    assert beside.passed


# Plans: from headers, as those of the model


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


def test_the_first_files_of_gpt2_are_read_under_the_names_of_the_model(tmp_path: Path) -> None:
    model = GPT2.build()
    write(model, tmp_path)
    first = {name.removeprefix("transformer."): tensor for name, tensor in stored(tmp_path).items()}
    for block in range(2):  # masks, which those files hold and no model has
        first |= {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64), f"h.{block}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(first, tmp_path / "model.safetensors", {"format": "pt"})
    for targets in (None, "all-linear"):
        assert randlora.files.plan(tmp_path, 4, targets=targets) == randlora.plan(model, 4, targets=targets)


def test_without_transformers_there_is_no_model_to_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(LLAMA, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"(?s)cannot plan for .*transformers, .* not installed: python -m pip"):
        randlora.files.plan(tmp_path)


# Quantized checkpoints: those of bitsandbytes are planned, fitted and not merged into


@every_quantization
def test_a_quantized_model_is_planned_and_not_merged_into(kind: RealModel, quantization: str, tmp_path: Path) -> None:
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

    # adapters of codes of 4 bits in rows as short as these are refused
    model = load_quantized(dense, quantization) if quantization == "8 bits" else kind.build()
    report = randlora.inject(model, r=4, targets=list(kind.targets))
    randlora.save(fill(model), adapter := tmp_path / "adapter")
    message = rf"base', which is quantized \({KINDS[quantization]}\): load the model and merge in memory, or merge into"
    with pytest.raises(CheckpointError, match=message):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert all(randlora.files.verify(adapter, place).passed for place in (base, dense))
    assert tuple(layer.fqn for layer in randlora.files.inspect(adapter, base).layers) == report.targets
    assert len(randlora.files.merge(adapter, tmp_path / "out", base=dense).merged) == len(report.targets)
    source, _ = their_directory(kind, tmp_path)  # whose shapes a base gives, quantized or not
    written = [
        contents(randlora.files.convert(source, out, "native", base=of, stream=told_stream(source)).out)
        for out, of in ((tmp_path / "of quantized", base), (tmp_path / "of dense", dense))
    ]
    assert written[0] == written[1]


def test_what_the_first_versions_said_of_codes_suffices_and_they_cannot_be_trained(tmp_path: Path) -> None:
    base = quantize(LLAMA, "nf4", tmp_path / "base")
    with pytest.raises(TargetError, match=r"train_also includes model.layers.0.mlp.up_proj.weight, which is"):
        randlora.files.plan(base, 4, targets=["q_proj"], train_also=["up_proj"])
    adapter = save_adapter(LLAMA, tmp_path / "adapter", targets=["q_proj"], train_also=["up_proj"])
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is quantized here, and was trained as"):
        randlora.files.inspect(adapter, base)
    expected = randlora.files.plan(base, 4)
    for said in ({"load_in_4bit": True}, None):
        edit_json(base / "config.json", quantization_config=said)
        assert randlora.files.plan(base, 4) == expected

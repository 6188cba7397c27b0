"""What `randlora.files.inspect` says of an adapter is what the model that carries it says."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import randlora
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.errors import CheckpointError, ConfigError
from randlora.files.adapter import OpenAdapter
from randlora.targets.select import find_targets
from tests.checkpoint_files import basis_of, read_fields
from tests.directories import base_directory, our_directory, their_directory
from tests.model_directories import contents, save_adapter
from tests.models import BERT, GPT2, LLAMA, RealModel, every_transformers_model
from tests.peer import ALPHA, THEIR_WARNINGS, R, in_ours, told_stream

pytestmark = THEIR_WARNINGS


@every_transformers_model
def test_layers_and_norms_are_those_of_the_model(kind: RealModel, tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path)
    summary = randlora.files.inspect(source)
    report = randlora.load(kind.build(), source)
    assert summary.trainable_parameters == report.trainable_parameters
    assert [layer.fqn for layer in summary.layers] == list(report.targets)
    sizes = {site.fqn: site.shape for site in find_targets(model, list(kind.targets))}
    for layer in summary.layers:
        assert (layer.out_features, layer.in_features) == sizes[layer.fqn]
        values = torch.linalg.svdvals(randlora.delta_weight(model, layer.fqn).detach().double())
        assert layer.frobenius == pytest.approx(float(values.square().sum().sqrt()), rel=1e-5)
        assert layer.spectral == pytest.approx(float(values[0]), rel=1e-5)
        assert layer.stable_rank == pytest.approx(float((values / values[0]).square().sum()), rel=1e-4)
        assert layer.num_bases == -(-layer.min_dim // R)


@pytest.mark.parametrize("options", [{}, {"basis": "block"}, {"basis": "sparse", "stream": "portable", "seed": 5}])
def test_options_and_bases_are_those_of_the_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    source, model = our_directory(LLAMA, tmp_path, **options)
    summary = randlora.files.inspect(source, norms=False)
    basis = basis_of(model)
    assert (summary.bases[0].spec, summary.bases[0].source) == (basis.spec, "seed")
    assert summary.bases[0].digest == basis.digest(*basis.extent)
    assert (summary.config.r, summary.config.alpha) == (R, ALPHA)
    assert summary.writer == f"randlora {randlora.__version__}, format 1"
    assert summary.storage == "drawn from the seed"
    assert summary.nbytes == sum(len(contents(source)[name]) for name in (CONFIG_FILE, TENSORS_FILE))


def test_what_was_trained_beside_it_its_base_and_strange_fields_are_named(tmp_path: Path) -> None:
    source, _ = our_directory(BERT, tmp_path, train_also=["classifier"])
    fields = {**read_fields(source), "use_quantum": 3, "base_model_name_or_path": "some/model"}
    (source / CONFIG_FILE).write_text(json.dumps(fields))
    summary = randlora.files.inspect(source)
    assert summary.trained == {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    assert summary.base_model == "some/model"
    assert summary.unknown_fields == ("use_quantum",)
    text = str(summary)
    for part in ("some/model", "trained with it: classifier.weight 3x32", "not understood: use_quantum"):
        assert part in text


@pytest.mark.parametrize("copies", ["per layer", "once", "none"])
def test_a_file_of_peft_says_all_but_the_shapes(copies: str, tmp_path: Path) -> None:
    source, _ = their_directory(LLAMA, tmp_path, save_projection=copies != "none")
    if copies == "once":
        path = source / TENSORS_FILE
        top = {"base_model.randlora_A", "base_model.randlora_B"}
        tensors = {key: value for key, value in load_file(path).items() if key in top or key[-2:] not in ("_A", "_B")}
        save_file(tensors, path, {"format": "pt"})
    summary = randlora.files.inspect(source)
    expected = {"per layer": "stored 9 times in the file", "once": "stored once in the file"}
    assert summary.storage == expected.get(copies, "drawn from the seed")
    assert summary.writer == "PEFT 0.21.2"
    assert (summary.bases == ()) == (copies == "none")
    assert {(layer.out_features, layer.in_features, layer.frobenius) for layer in summary.layers} == {(None,) * 3}
    assert "give base=, the directory of its base model" in summary.notes[-1]
    assert "?" in str(summary)


@pytest.mark.parametrize("save_projection", [True, False], ids=["bases in the file", "bases from the key"])
@every_transformers_model
def test_with_the_base_a_file_of_peft_says_all(kind: RealModel, save_projection: bool, tmp_path: Path) -> None:
    source, _ = their_directory(kind, tmp_path, save_projection=save_projection)
    summary = randlora.files.inspect(source, base_directory(kind, tmp_path), stream=told_stream(source))
    model = in_ours(kind, source)
    for layer in summary.layers:
        norm = torch.linalg.norm(randlora.delta_weight(model, layer.fqn).detach().double())
        assert layer.frobenius == pytest.approx(float(norm), rel=1e-5)
    basis = basis_of(model)
    assert summary.bases[0].digest == basis.digest(*basis.extent)
    assert len(summary.notes) == (not save_projection and told_stream(source) is None)  # of the stream assumed


def test_without_norms_no_update_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = our_directory(GPT2, tmp_path)
    monkeypatch.delattr(OpenAdapter, "delta_weights")
    summary = randlora.files.inspect(source, norms=False)
    assert {layer.stable_rank for layer in summary.layers} == {None}
    with pytest.raises(AttributeError):
        randlora.files.inspect(source)


def test_an_update_too_large_for_its_dtype_is_refused_by_name(tmp_path: Path) -> None:
    model = LLAMA.build()
    randlora.inject(model, r=6)
    for parameter in randlora.trainable_parameters(model):
        parameter.data.fill_(1e30)
    randlora.save(model, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"the update of model\.layers\.0.* is too large"):
        randlora.files.inspect(tmp_path / "ours")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    path = source / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        randlora.files.inspect(source)


def test_progress_is_told_of_every_layer(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    told: list[tuple[int, int, str]] = []
    summary = randlora.files.inspect(source, progress=lambda *news: told.append(news))
    assert [doing for _, _, doing in told] == [*(layer.fqn for layer in summary.layers), "done"]
    assert [done for done, total, _ in told] == list(range(len(summary.layers) + 1))


def test_a_directory_may_have_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    renamed = source.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    assert randlora.files.inspect(renamed).writer == f"randlora {randlora.__version__}, format 1"


@pytest.mark.parametrize("option", ["prefix", "base_revision"])
@pytest.mark.parametrize("function", ["inspect", "verify", "convert"])
def test_options_for_a_base_are_refused_without_one(function: str, option: str, tmp_path: Path) -> None:
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    further = (tmp_path / "out", "native") if function == "convert" else ()
    with pytest.raises(ConfigError, match=rf"^{option}= is for a base model: give base= too$"):
        getattr(randlora.files, function)(adapter, *further, **{option: "model"})
    assert not (tmp_path / "out").exists()

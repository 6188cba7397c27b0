"""`files.inspect` says what the model that carries an adapter says; `files.verify` passes what is whole."""

import json
import os
from collections.abc import Callable
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
from randlora.files.inspect import Check, Verification
from randlora.targets.select import find_targets
from tests.checkpoint_files import basis_of, edit_fields, read_fields, reseal
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


def outcomes(verification: Verification) -> dict[str, str]:
    return {check.name: check.outcome for check in verification.checks}


def failure(verification: Verification) -> Check:
    (found,) = (check for check in verification.checks if check.outcome == "failed")
    assert not verification.passed
    assert f"failed: {found.name}: {found.words}" in str(verification)
    assert str(verification).endswith("is NOT sound")
    return found


@pytest.mark.parametrize("bases", ["seed", "stored"])
@pytest.mark.parametrize("options", [{}, {"basis": "block"}, {"basis": "very_sparse", "stream": "portable"}])
def test_what_we_saved_passes(options: dict[str, Any], bases: str, tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path, bases=bases, **options)
    found = randlora.files.verify(source)
    assert outcomes(found) == {"files": "passed", "checksum": "passed", "bases": "passed"}
    assert str(found).endswith("is sound")


@pytest.mark.parametrize("save_projection", [True, False], ids=["bases in the file", "bases from the key"])
@every_transformers_model
def test_a_file_of_peft_passes_as_far_as_it_says_anything(
    kind: RealModel, save_projection: bool, tmp_path: Path
) -> None:
    source, _ = their_directory(kind, tmp_path, save_projection=save_projection)
    bases = "passed" if save_projection else "not checked"
    expected = {"files": "passed", "checksum": "not checked", "bases": bases}
    alone, beside = (randlora.files.verify(source, base) for base in (None, base_directory(kind, tmp_path)))
    assert outcomes(alone) == expected
    assert outcomes(beside) == {**expected, "base": "passed"}
    assert alone.passed
    assert beside.passed


Q_PROJ = "model.layers.0.self_attn.q_proj"
GAMMA = f"base_model.model.{Q_PROJ}.randlora_gamma"


def flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (directory / TENSORS_FILE).write_bytes(content)


def truncate(directory: Path) -> None:
    content = (directory / TENSORS_FILE).read_bytes()
    (directory / TENSORS_FILE).write_bytes(content[: len(content) // 2])


def remove(directory: Path) -> None:
    (directory / CONFIG_FILE).unlink()


def garble(directory: Path) -> None:
    (directory / CONFIG_FILE).write_bytes(b"\xff{")


def contradict(directory: Path) -> None:
    edit_fields(directory, {"r": 7})


def put_nan(directory: Path) -> None:
    reseal(
        directory, {"base_model.model.model.layers.0.self_attn.q_proj.randlora_gamma": torch.full((6, 32), torch.nan)}
    )


def misshape(directory: Path) -> None:
    reseal(directory, {GAMMA: torch.ones(5, 32)})


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit": (flip_a_bit, "do not match its checksum"),
    "truncated": (truncate, "truncated or damaged"),
    "missing": (remove, "there is no adapter_config.json"),
    "garbled": (garble, "is damaged"),
    "contradiction": (contradict, "the files come from different saves"),
    "NaN": (put_nan, "holds NaN or infinite values"),
    "shape": (misshape, "expected (6, num_bases)"),
}


@pytest.mark.parametrize(("damage", "words"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_file_is_a_failed_check_with_the_reason(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    damage(source)
    found = failure(randlora.files.verify(source))
    assert found.name == "files"
    assert words in found.words


def test_no_directory_at_all_is_an_error(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    for places in ([tmp_path / "nothing"], [source, tmp_path / "nothing"]):
        with pytest.raises(CheckpointError, match=r"^no such directory: .*nothing$"):
            randlora.files.verify(*places)


def test_bases_that_come_out_otherwise_are_a_failed_check(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    reseal(source, digest="0" * 64)
    found = failure(randlora.files.verify(source))
    assert found.name == "bases"
    assert "save it there with bases='stored'" in found.words


def test_a_header_that_gives_a_layer_another_shape_is_a_failed_check(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    shapes = dict(randlora.files.adapter.open_adapter(source).shapes or {})
    reseal(source, shapes={**shapes, Q_PROJ: (32, 30)})
    assert f"its header says that {Q_PROJ} is 32 x 30" in failure(randlora.files.verify(source)).words


def test_stored_bases_that_no_key_draws_are_passed_and_said_to_be_so(tmp_path: Path) -> None:
    source, theirs = their_directory(LLAMA, tmp_path)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(1.5)
    theirs.save_pretrained(source)
    found = randlora.files.verify(source)
    assert found.passed
    assert "its key gives different ones here" in found.checks[-1].words


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Return what changes the tensors of a base."""

    def edit(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        change(tensors)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})

    return edit


BASES: dict[str, tuple[RealModel, Callable[[Path], object], str]] = {
    "a layer less": (
        LLAMA,
        edited(lambda tensors: tensors.pop(f"{Q_PROJ}.weight")),
        f"the model has no layer {Q_PROJ}",
    ),
    "another shape": (
        LLAMA,
        edited(lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.ones(34, 30)})),
        f"{Q_PROJ} is 34 x 30 here",
    ),
    "another model": (GPT2, lambda _: None, "the model has no layer"),
    "truncated": (
        LLAMA,
        lambda base: os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 9),
        "truncated",
    ),
}


@pytest.mark.parametrize(("kind", "damage", "words"), BASES.values(), ids=BASES)
@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "PEFT's"])
def test_a_base_that_does_not_fit_is_a_failed_check_and_the_bases_are_checked_all_the_same(
    theirs: bool, kind: RealModel, damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    source, _ = (their_directory if theirs else our_directory)(LLAMA, tmp_path)
    damage(base := base_directory(kind, tmp_path))
    verification = randlora.files.verify(source, base)
    assert failure(verification).name == "base"
    assert words in failure(verification).words
    assert outcomes(verification)["bases"] == "passed"


def test_a_head_that_the_base_lacks_is_named_and_one_of_another_shape_fails(tmp_path: Path) -> None:
    source, _ = our_directory(BERT, tmp_path, train_also=["classifier"])
    base = base_directory(BERT, tmp_path)
    tensors = load_file(base / "model.safetensors")
    wide = {**tensors, "classifier.weight": torch.ones(5, 32)}
    save_file(wide, base / "model.safetensors", {"format": "pt"})
    assert "classifier.weight has shape (5, 32) here" in failure(randlora.files.verify(source, base)).words
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(headless, base / "model.safetensors", {"format": "pt"})
    found = randlora.files.verify(source, base)
    assert found.passed
    assert "classifier.weight, classifier.bias of its class are not in its files" in str(found)


def test_progress_is_told_of_every_step(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    told: list[tuple[int, int, str]] = []
    randlora.files.verify(source, progress=lambda *news: told.append(news))
    assert [done for done, _, _ in told] == list(range(told[0][1] + 1))
    assert told[-1][2] == "done"

"""`files.inspect` says what the model that carries an adapter says; `files.verify` passes what is whole."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import randlora
from randlora.errors import CheckpointError, ConfigError
from randlora.files.inspect import Check, Verification
from randlora.targets.select import find_targets
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE, basis_of, edit_fields, reseal
from tests.directories import base_directory, our_directory, their_directory
from tests.model_directories import contents, save_adapter
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel
from tests.peer import ALPHA, THEIR_WARNINGS, R, in_ours, told_stream

pytestmark = THEIR_WARNINGS


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LLAMA, {}), (GPT2, {"basis": "block"}), (VIT, {"basis": "sparse", "stream": "portable", "seed": 5})],
    ids=["llama", "gpt2", "vit"],
)
def test_what_we_saved_passes_and_layers_norms_and_bases_are_those_of_the_model(
    kind: RealModel, options: dict[str, Any], tmp_path: Path
) -> None:
    source, model = our_directory(kind, tmp_path, bases="stored" if kind is GPT2 else "seed", **options)
    told: list[tuple[int, int, str]] = []
    summary = randlora.files.inspect(source, progress=lambda *news: told.append(news))
    assert [doing for _, _, doing in told] == [*(layer.fqn for layer in summary.layers), "done"]
    assert [done for done, _, _ in told] == list(range(len(summary.layers) + 1))
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
    basis, (bases,) = basis_of(model), summary.bases
    assert (bases.spec, bases.source, bases.digest) == (basis.spec, "seed", basis.digest(*basis.extent))
    assert (summary.config.r, summary.config.alpha) == (R, ALPHA)
    assert summary.writer == f"randlora {randlora.__version__}, format 1"
    assert summary.storage == ("stored once in the file" if kind is GPT2 else "drawn from the seed")
    assert summary.nbytes == sum(len(contents(source)[name]) for name in (CONFIG_FILE, TENSORS_FILE))
    without = randlora.files.inspect(source.rename(tmp_path / os.fsdecode(b"caf\xe9")), norms=False)  # no UTF-8
    assert {(layer.frobenius, layer.stable_rank) for layer in without.layers} == {(None, None)}
    assert [layer.fqn for layer in without.layers] == list(report.targets)
    found = randlora.files.verify(tmp_path / os.fsdecode(b"caf\xe9"), progress=lambda *news: told.append(news))
    assert outcomes(found) == {"files": "passed", "checksum": "passed", "bases": "passed"}
    assert str(found).endswith("is sound")
    assert told[-1][0] == told[-1][1]


def test_what_was_trained_beside_it_its_base_and_strange_fields_are_named(tmp_path: Path) -> None:
    source, _ = our_directory(BERT, tmp_path, train_also=["classifier"])
    edit_fields(source, {"use_quantum": 3, "base_model_name_or_path": "some/model"})
    summary = randlora.files.inspect(source)
    assert summary.trained == {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    assert summary.base_model == "some/model"
    assert summary.unknown_fields == ("use_quantum",)
    text = str(summary)
    for part in ("some/model", "trained with it: classifier.weight 3x32", "not understood: use_quantum"):
        assert part in text


@pytest.mark.parametrize("copies", ["per layer", "once", "none"])
def test_a_file_of_peft_says_all_but_the_shapes_and_with_its_base_all(copies: str, tmp_path: Path) -> None:
    source, _ = their_directory(LLAMA, tmp_path, save_projection=copies != "none")
    if copies == "once":
        path = source / TENSORS_FILE
        top = {"base_model.randlora_A", "base_model.randlora_B"}
        tensors = {key: value for key, value in load_file(path).items() if key in top or key[-2:] not in ("_A", "_B")}
        save_file(tensors, path, {"format": "pt"})
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


def test_what_cannot_be_inspected_or_verified_is_an_error(tmp_path: Path) -> None:
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    for function, further in (("inspect", ()), ("verify", ()), ("convert", (tmp_path / "out", "native"))):
        for option in ("prefix", "base_revision"):
            with pytest.raises(ConfigError, match=rf"^{option}= is for a base model: give base= too$"):
                getattr(randlora.files, function)(adapter, *further, **{option: "model"})
    for places in ([tmp_path / "nothing"], [adapter, tmp_path / "nothing"]):
        with pytest.raises(CheckpointError, match=r"^no such directory: .*nothing$"):
            randlora.files.verify(*places)
    model = LLAMA.build()
    randlora.inject(model, r=6)
    for parameter in randlora.trainable_parameters(model):
        parameter.data.fill_(1e30)
    randlora.save(model, adapter)
    with pytest.raises(CheckpointError, match=r"the update of model\.layers\.0.* is too large"):
        randlora.files.inspect(adapter)
    assert not (tmp_path / "out").exists()


def outcomes(verification: Verification) -> dict[str, str]:
    return {check.name: check.outcome for check in verification.checks}


def failure(verification: Verification) -> Check:
    (found,) = (check for check in verification.checks if check.outcome == "failed")
    assert not verification.passed
    assert f"failed: {found.name}: {found.words}" in str(verification)
    assert str(verification).endswith("is NOT sound")
    return found


Q_PROJ = "model.layers.0.self_attn.q_proj"
GAMMA = f"base_model.model.{Q_PROJ}.randlora_gamma"


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def misstate(directory: Path) -> None:
    shapes = dict(randlora.files.adapter.open_adapter(directory).shapes or {})
    reseal(directory, shapes={**shapes, Q_PROJ: (32, 30)})


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "do not match its checksum": ("files", rewrite(TENSORS_FILE, lambda held: held[:-1] + bytes([held[-1] ^ 1]))),
    "truncated or damaged": ("files", rewrite(TENSORS_FILE, lambda held: held[: len(held) // 2])),
    "there is no adapter_config.json": ("files", lambda directory: (directory / CONFIG_FILE).unlink()),
    "is damaged": ("files", rewrite(CONFIG_FILE, lambda _: b"\xff{")),
    "the files come from different saves": ("files", lambda directory: edit_fields(directory, {"r": 7})),
    "holds NaN or infinite values": (
        "files",
        lambda directory: reseal(directory, {GAMMA: torch.full((6, 32), torch.nan)}),
    ),
    "expected (6, num_bases)": ("files", lambda directory: reseal(directory, {GAMMA: torch.ones(5, 32)})),
    "save it there with bases='stored'": ("bases", lambda directory: reseal(directory, digest="0" * 64)),
    f"its header says that {Q_PROJ} is 32 x 30": ("files", misstate),
}


def test_a_damaged_file_is_a_failed_check_with_the_reason(tmp_path: Path) -> None:
    for words, (check, damage) in FAULTS.items():
        source, _ = our_directory(LLAMA, tmp_path)
        damage(source)
        found = failure(randlora.files.verify(source))
        assert words in found.words
        assert found.name == check


def pop_layer(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{Q_PROJ}.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def reshape_layer(base: Path) -> None:
    tensors = load_file(base / "model.safetensors") | {f"{Q_PROJ}.weight": torch.ones(34, 30)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


MISFITS: dict[str, tuple[RealModel, Callable[[Path], object]]] = {
    f"the model has no layer {Q_PROJ}": (LLAMA, pop_layer),
    f"{Q_PROJ} is 34 x 30 here": (LLAMA, reshape_layer),
    "the model has no layer": (GPT2, lambda _: None),
    "truncated": (LLAMA, rewrite("model.safetensors", lambda held: held[:-9])),
}


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "PEFT's"])
def test_a_base_that_does_not_fit_is_a_failed_check_and_the_bases_are_checked_all_the_same(
    theirs: bool, tmp_path: Path
) -> None:
    source, _ = (their_directory if theirs else our_directory)(LLAMA, tmp_path)
    for words, (kind, damage) in MISFITS.items():
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

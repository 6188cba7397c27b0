"""A LoRA made of an adapter: the nearest of its rank, which PEFT and converters take, and what it loses is stated."""

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from randlora.errors import ConfigError
from randlora.files import layouts
from randlora.files.convert import ConversionReport
from randlora.files.layouts import frobenius_norm, of_rank, spectral_norm, within
from tests.checkpoint_files import TENSORS_FILE
from tests.directories import base_directory, our_directory, their_directory
from tests.kit import fill
from tests.models import BERT, GPT2, LLAMA, RealModel, outputs, reproducible
from tests.peer import PREFIX, THEIR_WARNINGS, assert_same_effect, in_peft

pytestmark = [*THEIR_WARNINGS, pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")]
both_kinds = pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)


def updates(model: nn.Module, report: ConversionReport) -> dict[str, Tensor]:
    """Compute every update in float64 with the library's verb for models."""
    return {layer.fqn: randlora.delta_weight(model, layer.fqn).detach().double() for layer in report.layers}


@both_kinds
def test_peft_computes_what_the_cut_updates_do_and_errors_are_those_of_the_dense_matrices(
    kind: RealModel, tmp_path: Path
) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=5, tolerance=1)
    cut, lost, whole = kind.build(), 0.0, 0.0
    for layer, (fqn, update) in zip(report.layers, updates(model, report).items(), strict=True):
        left, values, right = torch.linalg.svd(update)
        low = left[:, :5] * values[:5] @ right[:5]
        cut.get_parameter(f"{fqn}.weight").data += (low.T if kind is GPT2 else low).float()
        squares = values.square()
        assert layer.relative_error == pytest.approx(math.sqrt(float(squares[5:].sum() / squares.sum())), rel=1e-4)
        lost, whole = lost + float(squares[5:].sum()), whole + float(squares.sum())
    assert report.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert_same_effect(cut, in_peft(kind, tmp_path / "lora"), kind)
    full = randlora.files.convert(source, tmp_path / "full", "lora", tolerance=1e-5)
    assert full.relative_error < 1e-5
    assert_same_effect(model, in_peft(kind, tmp_path / "full"), kind)


@pytest.mark.parametrize("tolerance", [0.3, None])
def test_a_tolerance_gives_every_layer_the_smallest_rank_that_is_within_it(
    tolerance: float | None, tmp_path: Path
) -> None:
    source, model = our_directory(LLAMA, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=tolerance)
    theirs = in_peft(LLAMA, tmp_path / "lora")
    assert len({layer.rank for layer in report.layers}) > 1
    assert "rank_pattern" in report.notes[0]
    for layer, update in zip(report.layers, updates(model, report).values(), strict=True):
        squares = torch.linalg.svdvals(update).square()
        assert layer.relative_error <= (tolerance or 0.05)
        assert math.sqrt(float(squares[layer.rank - 1 :].sum() / squares.sum())) > (tolerance or 0.05)
        module: Any = theirs.base_model.model.get_submodule(layer.fqn)
        assert (module.r["default"], module.scaling["default"]) == (layer.rank, 1.0)
        product = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        distance = torch.linalg.norm(update - product) / torch.linalg.norm(update)
        assert layer.relative_error == pytest.approx(float(distance), rel=1e-3)


def test_ranks_reach_the_right_layers_whatever_their_names(tmp_path: Path) -> None:
    """Names that are ends of one another, or that mean something as a regex."""

    def build() -> nn.Module:
        inner: dict[str, nn.Module] = {"up": nn.Linear(30, 14), "a+b": nn.Linear(14, 20), "a_b": nn.Linear(20, 9)}
        return nn.Sequential(OrderedDict(up=nn.Linear(12, 30), body=nn.Sequential(OrderedDict(inner))))

    model = reproducible(build)
    randlora.inject(model, r=4, alpha=8)
    randlora.save(fill(model), tmp_path / "ours")
    report = randlora.files.convert(tmp_path / "ours", tmp_path / "lora", "lora", tolerance=1e-5)
    assert len({layer.rank for layer in report.layers}) == 3
    theirs = PeftModel.from_pretrained(reproducible(build), tmp_path / "lora").eval()
    x = torch.randn(4, 12)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_loss_beyond_the_tolerance_is_refused_and_nothing_written(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    with pytest.raises(ConfigError) as refusal:
        randlora.files.convert(source, tmp_path / "lora", "lora", rank=2, tolerance=0.3)
    message = str(refusal.value)
    assert "with rank=2, 8 of 8 layers have a relative error above tolerance=0.3" in message
    for refused, said in (({"rank": 2}, r"above tolerance=0\.05"), ({"tolerance": 0}, "with the full rank")):
        with pytest.raises(ConfigError, match=said):
            randlora.files.convert(source, tmp_path / "lora", "lora", **refused)  # type: ignore[arg-type]
    assert not (tmp_path / "lora").exists()
    worst = float(message.split("the largest is ")[1].split(":", maxsplit=1)[0])
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=2, tolerance=worst + 1e-4)
    assert max(layer.relative_error for layer in report.layers) == pytest.approx(worst, abs=1e-4)


def test_the_head_and_the_biases_trained_beside_it_come_along(tmp_path: Path) -> None:
    source, theirs = their_directory(BERT, tmp_path, modules_to_save=["classifier"], bias="randlora_only")
    base = base_directory(BERT, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=1e-5, base=base)
    assert any("not every server reads them" in note for note in report.notes)
    lora = in_peft(BERT, tmp_path / "lora")
    difference = outputs(lora, BERT.inputs()) - outputs(theirs, BERT.inputs())
    assert difference.abs().max() < 1e-4 * outputs(theirs, BERT.inputs()).abs().max()
    kept = ("modules_to_save", "query.base_layer.bias")
    assert sum(any(part in name for part in kept) for name, _ in lora.named_parameters()) == 4


@pytest.mark.parametrize(
    "options",
    [{"layers_to_transform": [1]}, {"target_modules": r".*layer\.1.*(query|value)"}],
    ids=["numbers", "regex"],
)
def test_a_choice_of_layers_made_in_peft_is_kept(options: dict[str, Any], tmp_path: Path) -> None:
    source, theirs = their_directory(BERT, tmp_path, **options)
    base = base_directory(BERT, tmp_path)
    randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=1e-5, base=base)
    lora = in_peft(BERT, tmp_path / "lora")
    adapted = {name.split(".lora_A")[0] for name, _ in lora.named_parameters() if ".lora_A" in name}
    assert adapted == {name.split(".randlora_gamma")[0] for name, _ in theirs.named_parameters() if "_gamma" in name}
    torch.testing.assert_close(outputs(lora, BERT.inputs()), outputs(theirs, BERT.inputs()), rtol=1e-3, atol=1e-3)


def test_an_adapter_that_changes_nothing_becomes_a_lora_that_changes_nothing(tmp_path: Path) -> None:
    model = LLAMA.build()
    randlora.inject(model, r=4)
    randlora.save(model, tmp_path / "ours")
    report = randlora.files.convert(tmp_path / "ours", tmp_path / "lora", "lora")
    assert {(layer.rank, layer.relative_error) for layer in report.layers} == {(1, 0.0)}
    assert report.relative_error == 0
    expected = outputs(LLAMA.build(), LLAMA.inputs())
    assert torch.equal(outputs(in_peft(LLAMA, tmp_path / "lora"), LLAMA.inputs()), expected)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=["tall", "wide"])
@pytest.mark.parametrize("decay", [0.0, 0.05], ids=["flat spectrum", "falling spectrum"])
def test_a_large_matrix_is_approximated_nearly_as_well_as_can_be(
    decay: float, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(shape) * torch.exp(-decay * torch.arange(shape[1]))
    values = torch.linalg.svdvals(matrix.double())
    tails = [float(values[rank:].norm() / values.norm()) for rank in range(len(values))]
    assert spectral_norm(matrix) == pytest.approx(float(values[0]), rel=1e-5)
    assert frobenius_norm(matrix) == pytest.approx(float(values.norm()), rel=1e-6)
    monkeypatch.setattr(layouts, "EXACT_UP_TO", 8)
    assert 0.95 * float(values[0]) <= spectral_norm(matrix) <= float(values[0]) * (1 + 1e-5)
    before = torch.get_rng_state()
    found = of_rank(matrix, 20)
    assert torch.equal(torch.get_rng_state(), before)
    distance = torch.linalg.norm(matrix.double() - found.left.double() @ found.right.double()) / values.norm()
    assert found.relative_error == pytest.approx(float(distance), rel=1e-3)
    assert tails[20] * (1 - 1e-4) <= found.relative_error <= tails[20] * 1.02
    assert decay or found.relative_error > tails[20] * (1 + 1e-6), "it was the exact one"
    near, smallest = within(matrix, 0.1), next(rank for rank, error in enumerate([*tails, 0.0]) if error <= 0.1)
    assert near.relative_error <= 0.1
    assert smallest <= near.rank <= smallest + 2


@both_kinds
def test_converters_find_in_a_merged_model_the_names_of_its_base_and_of_the_factors(
    kind: RealModel, tmp_path: Path
) -> None:
    """As llama.cpp's names in GGUF say."""
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}[kind.name]

    def in_gguf(names: set[str]) -> set[str]:
        places = gguf.get_tensor_name_map(architecture, n_blocks=2)
        found = {places.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
        assert None not in found
        assert len(found) == len(names)
        return {str(name) for name in found}

    base, (source, model) = base_directory(kind, tmp_path), our_directory(kind, tmp_path)
    merged = randlora.files.merge(source, tmp_path / "merged", base=base).out
    assert {path.name for path in merged.iterdir()} == {path.name for path in base.iterdir()}
    names = set(load_file(merged / "model.safetensors"))
    assert names == set(load_file(base / "model.safetensors"))
    assert json.loads((merged / "config.json").read_text())["model_type"] == kind.name
    targets = set(randlora.adapters(model)[0].targets)
    assert in_gguf(names) > in_gguf({f"{fqn}.weight" for fqn in targets})
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=32)
    keys = set(load_file(tmp_path / "lora" / TENSORS_FILE))
    assert keys == {f"{PREFIX}{fqn}.lora_{part}.weight" for fqn in targets for part in "AB"}
    # its converter transposes the weights of GPT-2's layers, and their factors with them, which are not transposed
    assert any("llama.cpp" in note for note in report.notes) == (kind is GPT2)

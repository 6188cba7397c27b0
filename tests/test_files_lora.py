"""A LoRA made of an adapter: the nearest of its rank, which PEFT and converters take, and what it loses is stated."""

import json
import math
import os
import weakref
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.errors import ConfigError
from randlora.files import adapter as adapter_module
from randlora.files import layouts
from randlora.files.convert import ConversionReport
from randlora.files.layouts import frobenius_norm, of_rank, spectral_norm, within
from randlora.layers.update import Update
from tests.directories import base_directory, our_directory, their_directory
from tests.kit import fill
from tests.model_directories import contents
from tests.models import BERT, GPT2, LLAMA, RealModel, every_transformers_model, outputs
from tests.peer import PREFIX, THEIR_WARNINGS, assert_same_effect, in_peft

pytestmark = [*THEIR_WARNINGS, pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")]


def updates(model: nn.Module, report: ConversionReport) -> dict[str, Tensor]:
    """Compute every update in float64 with the library's verb for models."""
    return {layer.fqn: randlora.delta_weight(model, layer.fqn).detach().double() for layer in report.layers}


def factors(directory: Path, fqn: str) -> tuple[Tensor, Tensor]:
    tensors = load_file(directory / TENSORS_FILE)
    return tuple(tensors[f"{PREFIX}{fqn}.lora_{part}.weight"].double() for part in "BA")  # type: ignore[return-value]


def with_cut_updates(kind: RealModel, model: nn.Module, report: ConversionReport, *, rank: int) -> nn.Module:
    """Build the base with every update cut to a rank and added, by means that share no code with the library's."""
    cut = kind.build()
    for fqn, update in updates(model, report).items():
        left, values, right = torch.linalg.svd(update)
        low = left[:, :rank] * values[:rank] @ right[:rank]
        weight = cut.get_parameter(f"{fqn}.weight")
        weight.data += (low.T if kind is GPT2 else low).float()
    return cut


@every_transformers_model
def test_peft_computes_what_the_cut_updates_do(kind: RealModel, tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=5, tolerance=1)
    theirs = in_peft(kind, tmp_path / "lora")
    assert type(theirs.base_model).__name__ == "LoraModel"
    assert_same_effect(with_cut_updates(kind, model, report, rank=5), theirs, kind)


@every_transformers_model
def test_errors_are_those_of_the_dense_matrices(kind: RealModel, tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=5, tolerance=1)
    lost = whole = 0.0
    assert len(report.layers) == len(randlora.adapters(model)[0].targets)
    for layer, (fqn, update) in zip(report.layers, updates(model, report).items(), strict=True):
        lora_B, lora_A = factors(tmp_path / "lora", fqn)
        assert (tuple(lora_B.shape), tuple(lora_A.shape)) == ((layer.out_features, 5), (5, layer.in_features))
        squares = torch.linalg.svdvals(update).square()
        best = math.sqrt(float(squares[5:].sum() / squares.sum()))
        distance = float(torch.linalg.norm(update - lora_B @ lora_A) / torch.linalg.norm(update))
        assert layer.relative_error == pytest.approx(distance, rel=1e-4) == pytest.approx(best, rel=1e-4)
        lost, whole = lost + float(squares[5:].sum()), whole + float(squares.sum())
    assert report.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)


@every_transformers_model
def test_at_full_rank_the_lora_is_the_adapter(kind: RealModel, tmp_path: Path) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=1e-5)
    assert report.relative_error < 1e-5
    assert_same_effect(model, in_peft(kind, tmp_path / "lora"), kind)


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.02])
def test_a_tolerance_gives_every_layer_the_smallest_rank_that_is_within_it(tolerance: float, tmp_path: Path) -> None:
    source, model = our_directory(LLAMA, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=tolerance)
    theirs = in_peft(LLAMA, tmp_path / "lora")
    assert len({layer.rank for layer in report.layers}) > 1
    assert "rank_pattern" in report.notes[0]
    for layer, update in zip(report.layers, updates(model, report).values(), strict=True):
        squares = torch.linalg.svdvals(update).square()
        assert layer.relative_error <= tolerance
        assert math.sqrt(float(squares[layer.rank - 1 :].sum() / squares.sum())) > tolerance
        module: Any = theirs.base_model.model.get_submodule(layer.fqn)
        assert (module.r["default"], module.scaling["default"]) == (layer.rank, 1.0)
        product = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
        distance = torch.linalg.norm(update - product) / torch.linalg.norm(update)
        assert layer.relative_error == pytest.approx(float(distance), rel=1e-3)


class Nested(nn.Module):
    """Names that are ends of one another, or that mean something as a regex."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 30)
        self.body = nn.ModuleDict({"up": nn.Linear(30, 14), "a+b": nn.Linear(14, 20)})
        self.body["a_b"] = nn.Linear(20, 9)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.up, self.body["up"], self.body["a+b"], self.body["a_b"]):
            x = torch.tanh(layer(x))
        return x


def test_ranks_reach_the_right_layers_whatever_their_names(tmp_path: Path) -> None:
    model = Nested().eval()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    randlora.inject(model, r=4, alpha=8)
    fill(model)
    randlora.save(model, tmp_path / "ours")
    report = randlora.files.convert(tmp_path / "ours", tmp_path / "lora", "lora", tolerance=1e-5)
    assert len({layer.rank for layer in report.layers}) == 3
    fresh = Nested().eval()
    fresh.load_state_dict(plain)
    x = torch.randn(4, 12)
    theirs = PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_loss_beyond_the_tolerance_is_refused_and_nothing_written(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    with pytest.raises(ConfigError) as refusal:
        randlora.files.convert(source, tmp_path / "lora", "lora", rank=2, tolerance=0.3)
    assert not (tmp_path / "lora").exists()
    message = str(refusal.value)
    assert "with rank=2, 8 of 8 layers have a relative error above tolerance=0.3" in message
    worst = float(message.split("the largest is ")[1].split(":", maxsplit=1)[0])
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=2, tolerance=worst + 1e-4)
    assert max(layer.relative_error for layer in report.layers) == pytest.approx(worst, abs=1e-4)


def test_without_a_tolerance_one_applies_all_the_same(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    with pytest.raises(ConfigError, match=r"above tolerance=0\.05"):
        randlora.files.convert(source, tmp_path / "lora", "lora", rank=2)
    report = randlora.files.convert(source, tmp_path / "lora", "lora")
    assert 0.02 < max(layer.relative_error for layer in report.layers) <= 0.05


def test_a_tolerance_that_rounding_does_not_allow_is_refused(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    with pytest.raises(ConfigError, match="with the full rank"):
        randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=0)
    assert not (tmp_path / "lora").exists()


def test_the_head_and_the_biases_trained_beside_it_come_along(tmp_path: Path) -> None:
    source, theirs = their_directory(BERT, tmp_path, modules_to_save=["classifier"], bias="randlora_only")
    base = base_directory(BERT, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=1e-5, base=base)
    assert any("not every server reads them" in note for note in report.notes)
    lora = in_peft(BERT, tmp_path / "lora")
    difference = outputs(lora, BERT.inputs()) - outputs(theirs, BERT.inputs())
    assert difference.abs().max() < 1e-4 * outputs(theirs, BERT.inputs()).abs().max()
    kept = {
        name
        for name, _ in lora.named_parameters()
        if "modules_to_save" in name or name.endswith("query.base_layer.bias")
    }
    assert len(kept) == 4


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
    expected = {name.split(".randlora_gamma")[0] for name, _ in theirs.named_parameters() if "_gamma" in name}
    assert adapted == expected
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


def test_one_update_is_held_at_a_time_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    held: list[weakref.ref[Tensor]] = []
    compute = adapter_module._formed

    def watched(fqn: str, update: Update) -> Tensor:
        assert [reference() for reference in held if reference() is not None] == []
        formed = compute(fqn, update)
        held.append(weakref.ref(formed))
        return formed

    monkeypatch.setattr(adapter_module, "_formed", watched)
    told: list[tuple[int, int, str]] = []
    report = randlora.files.convert(
        source, tmp_path / "lora", "lora", tolerance=0.3, progress=lambda *news: told.append(news)
    )
    names = [layer.fqn for layer in report.layers]
    assert told == [*((done, 8, fqn) for done, fqn in enumerate(names)), (8, 8, "done")]
    assert len(held) == 8


def test_both_directories_may_have_names_that_are_not_utf_8(tmp_path: Path) -> None:
    source, _ = our_directory(LLAMA, tmp_path)
    usual = randlora.files.convert(source, tmp_path / "lora", "lora", tolerance=1.0)
    renamed = source.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    unusual = randlora.files.convert(renamed, tmp_path / os.fsdecode(b"lor\xe0"), "lora", tolerance=1.0)
    assert contents(unusual.out) == contents(usual.out)


sizes = st.integers(1, 24)


def drawn(rows: int, columns: int, *, decay: float = 0.0, seed: int = 0) -> Tensor:
    """Draw a matrix whose columns shrink, so that some directions matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix * torch.exp(-decay * torch.arange(columns))


def tails(matrix: Tensor) -> list[float]:
    """Compute in float64 what the best approximation of each rank loses, as a share of the norm."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    return [math.sqrt(float(squares[rank:].sum() / squares.sum())) for rank in range(len(squares) + 1)]


def distance(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    lost = torch.linalg.norm(matrix.double() - left.double() @ right.double())
    return float(lost / torch.linalg.norm(matrix.double()))


@given(rows=sizes, columns=sizes, rank=st.integers(1, 30), decay=st.sampled_from([0.0, 0.5]))
def test_nothing_of_the_rank_is_nearer_and_the_error_is_the_true_one(
    rows: int, columns: int, rank: int, decay: float
) -> None:
    matrix = drawn(rows, columns, decay=decay)
    found = of_rank(matrix, rank)
    assert found.left.shape == (rows, rank)
    assert found.right.shape == (rank, columns)
    assert found.relative_error == pytest.approx(distance(matrix, found.left, found.right), rel=1e-3, abs=1e-6)
    assert found.relative_error == pytest.approx(tails(matrix)[min(rank, rows, columns)], rel=1e-3, abs=2e-6)


@given(rows=sizes, columns=sizes, tolerance=st.floats(1e-3, 1.0), decay=st.sampled_from([0.0, 0.5]))
def test_the_rank_within_a_tolerance_is_the_smallest(rows: int, columns: int, tolerance: float, decay: float) -> None:
    matrix = drawn(rows, columns, decay=decay)
    found = within(matrix, tolerance)
    assert found.relative_error <= tolerance
    assert found.rank == 1 or tails(matrix)[found.rank - 1] > tolerance * (1 - 1e-4)


def test_a_tolerance_of_zero_gives_the_full_rank_and_states_what_rounding_leaves() -> None:
    found = within(drawn(9, 6), 0.0)
    assert found.rank == 6
    assert 0 < found.relative_error < 1e-5


@pytest.fixture
def randomized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small matrices count as large."""
    monkeypatch.setattr(layouts, "EXACT_UP_TO", 8)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)], ids=["tall", "wide"])
@pytest.mark.parametrize("decay", [0.0, 0.05], ids=["flat spectrum", "falling spectrum"])
def test_a_randomized_approximation_is_nearly_the_best(decay: float, shape: tuple[int, int], randomized: None) -> None:
    matrix = drawn(*shape, decay=decay)
    best = tails(matrix)[20]
    found = of_rank(matrix, 20)
    assert found.relative_error == pytest.approx(distance(matrix, found.left, found.right), rel=1e-3)
    assert best * (1 - 1e-4) <= found.relative_error <= best * 1.02
    assert decay or found.relative_error > best * (1 + 1e-6), "it was the exact one"


def test_the_rank_within_a_tolerance_is_nearly_the_smallest_when_randomized(randomized: None) -> None:
    matrix = drawn(500, 450, decay=0.05)
    smallest = next(rank for rank, error in enumerate(tails(matrix)) if error <= 0.1)
    found = within(matrix, 0.1)
    assert found.relative_error <= 0.1
    assert smallest <= found.rank <= smallest + 2


def test_the_global_generator_is_neither_read_nor_advanced(randomized: None) -> None:
    matrix = drawn(300, 200)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = of_rank(matrix, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(of_rank(matrix, 4).left, first.left)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_norms_are_those_of_the_dense_matrix(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = drawn(300, 250, decay=decay)
    values = torch.linalg.svdvals(matrix.double())
    assert frobenius_norm(matrix) == pytest.approx(float(values.square().sum().sqrt()), rel=1e-6)
    assert spectral_norm(matrix) == pytest.approx(float(values[0]), rel=1e-5)
    monkeypatch.setattr(layouts, "EXACT_UP_TO", 8)
    assert 0.95 * float(values[0]) <= spectral_norm(matrix) <= float(values[0]) * (1 + 1e-5)


ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}
FACTORS = (".lora_A.weight", ".lora_B.weight")

both_kinds = pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)


def in_gguf(kind: RealModel, names: set[str]) -> set[str]:
    """Return what tensors are called in GGUF, each of them."""
    places = gguf.get_tensor_name_map(ARCHITECTURES[kind.name], n_blocks=2)
    found = {name: places.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert None not in found.values(), found
    assert len(set(found.values())) == len(names)
    return set(found.values())


@both_kinds
def test_a_merged_model_has_the_files_and_names_that_converters_of_the_base_take(
    kind: RealModel, tmp_path: Path
) -> None:
    base = base_directory(kind, tmp_path)
    source, model = our_directory(kind, tmp_path)
    merged = randlora.files.merge(source, tmp_path / "merged", base=base).out
    assert {path.name for path in merged.iterdir()} == {path.name for path in base.iterdir()}
    files = list(merged.glob("model*.safetensors"))  # those that mlx-lm reads
    names = {name for path in files for name in load_file(path)}
    assert names == {name for path in base.glob("*.safetensors") for name in load_file(path)}
    assert json.loads((merged / "config.json").read_text())["model_type"] == kind.name
    weights = {f"{fqn}.weight" for fqn in randlora.adapters(model)[0].targets}
    assert in_gguf(kind, names) > in_gguf(kind, weights)


@both_kinds
def test_a_lora_has_a_pair_of_factors_for_tensors_that_gguf_has_and_nothing_else(
    kind: RealModel, tmp_path: Path
) -> None:
    source, model = our_directory(kind, tmp_path)
    report = randlora.files.convert(source, tmp_path / "lora", "lora", rank=32)
    keys = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    layers = {key.removeprefix(PREFIX).removesuffix(end) for key in keys for end in FACTORS if key.endswith(end)}
    assert layers == set(randlora.adapters(model)[0].targets)
    assert keys == {f"{PREFIX}{fqn}{end}" for fqn in layers for end in FACTORS}
    assert in_gguf(kind, {f"{fqn}.weight" for fqn in layers})
    # its converter transposes the weights of GPT-2's layers, and their factors with them, which are not transposed
    assert any("llama.cpp" in note for note in report.notes) == (kind is GPT2)

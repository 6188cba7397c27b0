"""Law 9: what is saved and then loaded is the same adapter, bit for bit, whatever the model is doing meanwhile."""

import copy
import pickle
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from tests.checkpoint_files import (
    CASES,
    HEADED,
    LINEAR,
    PREFIX,
    TENSORS_FILE,
    Case,
    Headed,
    Stored,
    bases_of,
    basis_of,
    both_ways,
    edit_tensors,
    every_case,
    peft_directory,
    read_tensors,
    trained,
)
from tests.kit import adapter_values, all_bits, fill, same_bits, snapshot
from tests.laws import TOKENS, Mixed
from tests.layer_kinds import LayerKind, every_mergeable_kind
from tests.model_directories import contents
from tests.read_kinds import ReadKind, every_read_kind
from tests.strategies import KINDS_AND_STREAMS, seeds


def assert_same_adapter(saved: nn.Module, loaded: nn.Module, case: Case) -> None:
    """Compare all that an adapter is, bit for bit."""
    (theirs,), (ours,) = randlora.adapters(saved), randlora.adapters(loaded)
    assert all_bits(adapter_values(loaded)) == {
        name: (torch.promote_types(dtype, torch.float32), shape, raw) if "randlora_" in name else (dtype, shape, raw)
        for name, (dtype, shape, raw) in all_bits(adapter_values(saved)).items()
    }
    listed = {
        name: getattr(ours.config, name) for name in ("r", "alpha") if isinstance(getattr(theirs.config, name), Mapping)
    }
    assert ours.config == replace(
        theirs.config, targets=theirs.targets, exclude=None, train_also=theirs.train_also or None, **listed
    )
    assert (ours.targets, ours.specs, ours.options) == (theirs.targets, theirs.specs, theirs.options)
    for r, basis in bases_of(saved).items():
        assert bases_of(loaded)[r].digest(*basis.extent) == basis.digest(*basis.extent)
    assert torch.equal(case.output(loaded), case.output(saved))


@st.composite
def inject_options(draw: st.DrawFn) -> dict[str, Any]:
    """Draw options for every kind of bases; a ternary rank is large enough that no basis is all zeros by bad luck."""
    kind, stream = draw(st.sampled_from(KINDS_AND_STREAMS))
    return {
        "r": draw(st.integers(8, 12) if "sparse" in kind else st.integers(1, 12)),
        "basis": kind,
        "stream": draw(st.sampled_from([stream, None])) if kind in ("dense", "block") else stream,
        "seed": draw(seeds),
        "alpha": draw(st.none() | st.integers(1, 10**6) | st.floats(1e-3, 1e3)),
        "dropout": draw(st.just(0.0) | st.floats(0, 1, exclude_max=True)),
    }


@given(st.sampled_from(CASES), inject_options(), st.sampled_from(["seed", "stored"]))
def test_save_then_load_is_the_identity_for_any_options(case: Case, options: dict[str, Any], bases: Stored) -> None:
    model, twin = trained(case, **options), case.build()
    with tempfile.TemporaryDirectory() as directory:
        randlora.save(model, directory, bases=bases)
        randlora.load(twin, directory)
    assert_same_adapter(model, twin, case)


@every_case
@both_ways
def test_every_model_is_saved_and_loaded_and_left_without_a_trace(case: Case, bases: Stored, tmp_path: Path) -> None:
    model, twin = trained(case), case.build()
    before, fresh, plain, generator = snapshot(model), snapshot(twin), case.output(twin), torch.get_rng_state()
    randlora.save(model, tmp_path / "first", bases=bases)
    assert snapshot(model) == before
    randlora.load(twin, tmp_path / "first")
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_adapter(model, twin, case)
    assert not torch.equal(case.output(twin), plain)
    randlora.save(twin, tmp_path / "second", bases=bases)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    randlora.eject(twin)
    assert snapshot(twin) == fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_save_never_narrows_a_value(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(HEADED).to(dtype)
    randlora.save(model, tmp_path)
    wide = torch.promote_types(dtype, torch.float32)
    values = {name: value.to(wide) if "randlora_" in name else value for name, value in adapter_values(model).items()}
    found = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(tmp_path)[0].items()}
    assert all_bits(found) == all_bits(values)


@both_ways
def test_an_adapter_that_shared_larger_bases_reloads_alone(bases: Stored, tmp_path: Path) -> None:
    model, twin = HEADED.build(), HEADED.build()
    randlora.inject(model, r=2, targets=["body.0", "body.2"], name="wide")
    randlora.inject(model, r=2, targets=["head"], name="narrow")
    randlora.activate(fill(model, "narrow"), "narrow")
    report = randlora.save(model, tmp_path, name="narrow", bases=bases)
    randlora.load(twin, tmp_path)
    assert torch.equal(HEADED.output(twin), HEADED.output(model))
    assert randlora.adapters(twin)[0].specs == randlora.adapters(model)[0].specs
    assert any("bases='stored'" in note for note in report.notes) == (bases == "seed")


@both_ways
def test_an_adapter_whose_bases_grew_for_another_is_saved_as_if_alone(bases: Stored, tmp_path: Path) -> None:
    small = Case("small", Headed, {"targets": ["head"], "stream": "portable"})
    alone, model = trained(small, name="small"), trained(small, name="small")
    randlora.inject(model, r=2, targets=["body.0", "body.2"], stream="portable", name="large")
    assert basis_of(model, "small") is basis_of(model, "large")
    randlora.save(alone, tmp_path / "alone", bases=bases)
    randlora.save(model, tmp_path / "beside", name="small", bases=bases)
    (tensors, metadata), (again, metadata_again) = read_tensors(tmp_path / "alone"), read_tensors(tmp_path / "beside")
    assert all_bits(again) == all_bits(tensors)
    assert metadata_again == metadata


class Crossed(nn.Module):
    """One wide layer, and a pair whose widest input and output are of different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(20, 6)
        self.up = nn.Linear(6, 20)
        self.down = nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down(self.up(x)) + self.wide(self.up(x))[:, :4]
        return output


@both_ways
def test_an_adapter_whose_own_draw_would_be_larger_than_the_shared_one_reloads_alone(
    bases: Stored, tmp_path: Path
) -> None:
    case = Case("crossed", Crossed)
    model, twin = case.build(), case.build()
    randlora.inject(model, r=2, targets=["wide"], name="wide")
    randlora.inject(model, r=2, targets=["up", "down"], name="crossed")
    assert len({info.specs for info in randlora.adapters(model)}) == 1, "the bases are shared"
    randlora.activate(fill(model, "crossed"), "crossed")
    report = randlora.save(model, tmp_path, name="crossed", bases=bases)
    randlora.load(twin, tmp_path)
    assert torch.equal(case.output(twin), case.output(model))
    assert any("too narrow for PEFT" in note for note in report.notes)


@pytest.mark.parametrize("rows", [6, 12], ids=lambda rows: f"rows={rows}")
def test_bases_of_no_seed_reload_as_they_are_even_where_they_are_larger_than_needed(rows: int, tmp_path: Path) -> None:
    directory = peft_directory(tmp_path / "peft")
    foreign = {"base_model.randlora_A": torch.randn(2, 1, 8), "base_model.randlora_B": torch.randn(rows, 4, 2)}
    edit_tensors(directory, foreign)
    model, twin = LINEAR.build(), LINEAR.build()
    randlora.load(model, directory)
    randlora.save(model, tmp_path / "ours", bases="stored")
    randlora.load(twin, tmp_path / "ours")
    assert torch.equal(LINEAR.output(twin), LINEAR.output(model))


def test_an_inactive_adapter_is_saved_with_its_own_copy_of_a_parameter(tmp_path: Path) -> None:
    model = trained(HEADED, name="one")
    randlora.inject(model, **{**HEADED.options, "r": 2, "name": "two"})
    fill(model, "two", seed=9)
    twin = HEADED.build()
    randlora.save(model, tmp_path, name="two")
    randlora.load(twin, tmp_path)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(model, "two"))
    assert all_bits(adapter_values(twin)) != all_bits(adapter_values(model, "one"))


def test_a_part_of_a_larger_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model, twin = trained(LINEAR), LINEAR.build()
    randlora.save(nn.ModuleDict({"inner": model}), tmp_path)
    randlora.load(twin, tmp_path)
    assert_same_adapter(model, twin, LINEAR)


LAYERS = "embed", "q", "up", "down", "head"
PARAMETERS = tuple(name for name, _ in Mixed().named_parameters())
SITUATIONS: dict[str, Any] = {
    "plain": nullcontext,
    "merged": randlora.merged,
    "disabled": randlora.disabled,
}


@st.composite
def adapters_of_a_model(draw: st.DrawFn) -> tuple[dict[str, tuple[list[str], list[str]]], dict[str, float]]:
    """Draw targets and ``train_also`` of up to three adapters, and which are active, with their weights."""
    drawn, active, taken = {}, {}, set[str]()
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        targets = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3, unique=True))
        free = [fqn for fqn in PARAMETERS if fqn.removesuffix(".weight") not in targets]
        trained = draw(st.lists(st.sampled_from(free), max_size=4, unique=True))
        drawn[name] = targets, trained
        if taken.isdisjoint(trained) and draw(st.booleans()):
            active[name] = draw(st.sampled_from([1.0, -0.5]))
            taken.update(trained)
    return drawn, active or {"a": 1.0}


@pytest.mark.medium
@settings(max_examples=15)
@given(adapters_of_a_model(), st.sampled_from(sorted(SITUATIONS)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_saved_does_not_depend_on_the_situation_and_makes_a_fresh_model_the_same(
    drawn: tuple[dict[str, tuple[list[str], list[str]]], dict[str, float]], situation: str, dtype: torch.dtype
) -> None:
    adapters, weights = drawn
    torch.manual_seed(0)
    base = Mixed().to(dtype)
    model = copy.deepcopy(base)
    for seed, (name, (targets, also)) in enumerate(adapters.items()):
        randlora.inject(model, r=4, targets=targets, train_also=also or None, name=name, active=True)
        fill(model, name, seed=seed)
    randlora.activate(model, weights)
    inside: AbstractContextManager[object] = SITUATIONS[situation](model)
    with TemporaryDirectory() as place:
        before = [saved(model, Path(place) / "before" / name, name) for name in adapters]
        with inside:
            assert [saved(model, Path(place) / name, name) for name in adapters] == before
            output = model(TOKENS)
        fresh = copy.deepcopy(base)
        for name in adapters:
            assert randlora.files.verify(Path(place) / name).passed
            randlora.load(fresh, Path(place) / name, name=name)
    randlora.activate(fresh, weights)
    again: AbstractContextManager[object] = SITUATIONS[situation](fresh)
    with again:
        assert same_bits(fresh(TOKENS), output)


def saved(model: nn.Module, directory: Path, name: str) -> bytes:
    randlora.save(model, directory, name=name)
    return (directory / TENSORS_FILE).read_bytes()


def assert_truth_while_merged(model: nn.Module, plain: dict[str, Tensor], place: Path) -> None:
    """Hold files and states that are written while merged against those from before, and unmerge copies."""
    own, before = all_bits(adapter_values(model, "b")), saved(model, place / "plain", "b")
    state = all_bits(plain)
    with randlora.merged(model):
        assert saved(model, place / "merged", "b") == before
        assert tensors_of(model.state_dict()) == state
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert saved(twin, place / "copied", "b") == before
            randlora.unmerge(twin)
            assert all_bits(adapter_values(twin, "b")) == own
            assert tensors_of(twin.state_dict()) == state


def tensors_of(state: dict[str, Any]) -> dict[str, Any]:
    return all_bits({name: value for name, value in state.items() if isinstance(value, Tensor)})


@every_read_kind
def test_a_weight_that_one_adapter_trains_and_another_is_merged_into(kind: ReadKind, tmp_path: Path) -> None:
    model = kind.model().append(nn.Linear(4, 6))
    randlora.inject(model, **{**kind.adapter_options, "name": "a"})
    randlora.inject(model, r=2, targets=["1"], train_also=[kind.parameter_fqn], name="b", stream="portable")
    fill(model, "a")
    fill(model, "b")
    randlora.activate(model, ["a", "b"])
    assert_truth_while_merged(model, dict(model.state_dict()), tmp_path)


@every_mergeable_kind
@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
def test_what_one_adapter_trains_of_a_layer_that_another_is_merged_into(
    kind: LayerKind, quantized: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = kind.build(128, 32, True, kind.exact)
    model = nn.Sequential(layer, nn.Linear(4, 6))
    also = ["0.bias"] if kind.is_quantized else ["0.bias", "0.weight"]
    randlora.inject(model, r=4, targets=["0"], name="a")
    randlora.inject(model, r=2, targets=["1"], train_also=also, name="b")
    fill(model, "a")
    fill(model, "b")
    randlora.activate(model, ["a", "b"])
    before = saved(model, tmp_path / "plain", "b")
    state = tensors_of(model.state_dict())
    with randlora.merged(model, quantized=quantized):
        assert saved(model, tmp_path / "merged", "b") == before
        assert tensors_of(model.state_dict()) == state
        assert saved(copy.deepcopy(model), tmp_path / "copied", "b") == before
    assert saved(model, tmp_path / "after", "b") == before

"""Law 9: what is saved and then loaded is the same adapter, bit for bit, whatever the model is doing meanwhile."""

import copy
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
    PREFIX,
    TENSORS_FILE,
    Case,
    Headed,
    Stored,
    bases_of,
    basis_of,
    both_ways,
    read_tensors,
    trained,
)
from tests.kit import Bits, adapter_values, all_bits, fill, same_bits, snapshot
from tests.laws import TOKENS, Mixed
from tests.model_directories import contents
from tests.strategies import KINDS_AND_STREAMS, seeds


def assert_same_adapter(saved: nn.Module, loaded: nn.Module, case: Case) -> None:
    """Compare all that an adapter is, bit for bit; Λ and Γ of 16 bits are float32 in a file."""
    (theirs,), (ours,) = randlora.adapters(saved), randlora.adapters(loaded)
    assert all_bits(adapter_values(loaded)) == widened(saved)
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


def widened(model: nn.Module) -> dict[str, Bits]:
    values = adapter_values(model)
    return all_bits({
        name: value.to(torch.promote_types(value.dtype, torch.float32)) if "randlora_" in name else value
        for name, value in values.items()
    })


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


@settings(max_examples=40)
@given(st.sampled_from(CASES), inject_options(), st.sampled_from(["seed", "stored"]))
def test_save_then_load_is_the_identity_for_any_options_and_leaves_no_trace(
    case: Case, options: dict[str, Any], bases: Stored
) -> None:
    model, twin = trained(case, **options), case.build()
    before, fresh, generator = snapshot(model), snapshot(twin), torch.get_rng_state()
    with TemporaryDirectory() as name:
        place = Path(name)
        randlora.save(model, place / "first", bases=bases)
        with torch.inference_mode():
            randlora.save(nn.ModuleDict({"inner": model}), place / "again", bases=bases)  # its names are its own
        assert snapshot(model) == before
        randlora.load(twin, place / "first")
        assert torch.equal(torch.get_rng_state(), generator)
        assert_same_adapter(model, twin, case)
        randlora.save(twin, place / "second", bases=bases)
        assert contents(place / "second") == contents(place / "first") == contents(place / "again")
    randlora.eject(twin)
    assert snapshot(twin) == fresh


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_save_never_narrows_a_value(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(HEADED).to(dtype)
    randlora.save(model, tmp_path)
    assert all_bits({key.removeprefix(PREFIX): each for key, each in read_tensors(tmp_path)[0].items()}) == widened(
        model
    )


class Crossed(nn.Module):
    """One wide layer, and a pair whose widest input and output are of different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(20, 6)
        self.up = nn.Linear(6, 20)
        self.down = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.up(x)) + self.wide(self.up(x))[:, :4]
        return output


@both_ways
@pytest.mark.parametrize(
    ("case", "first", "second"),
    [(HEADED, ["0", "2"], ["head"]), (Case("crossed", Crossed), ["wide"], ["up", "down"])],
    ids=["larger", "would-be-larger-itself"],
)
def test_an_adapter_that_shared_other_bases_than_its_own_reloads_alone(
    case: Case, first: list[str], second: list[str], bases: Stored, tmp_path: Path
) -> None:
    model, twin = case.build(), case.build()
    randlora.inject(model, r=2, targets=first, name="first")
    randlora.inject(model, r=2, targets=second, name="second")
    assert basis_of(model, "first") is basis_of(model, "second")
    randlora.activate(fill(model, "second"), "second")
    report = randlora.save(model, tmp_path, name="second", bases=bases)
    randlora.load(twin, tmp_path)
    assert torch.equal(case.output(twin), case.output(model))
    assert randlora.adapters(twin)[0].specs == randlora.adapters(model)[1].specs
    assert any("bases='stored'" in note for note in report.notes) == (bases == "seed")
    assert any("too narrow for PEFT" in note for note in report.notes) == (case is not HEADED)


@both_ways
def test_an_adapter_whose_bases_grew_for_another_is_saved_as_if_alone(bases: Stored, tmp_path: Path) -> None:
    small = Case("small", Headed, {"targets": ["head"], "stream": "portable"})
    alone, model = trained(small, name="small"), trained(small, name="small")
    randlora.inject(model, r=2, targets=["body.0", "body.2"], stream="portable", name="large")
    assert basis_of(model, "small") is basis_of(model, "large")
    randlora.save(alone, tmp_path / "alone", bases=bases)
    randlora.save(model, tmp_path / "beside", name="small", bases=bases)
    found, expected = (contents(tmp_path / name)[TENSORS_FILE] for name in ("beside", "alone"))
    assert found == expected


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

"""What `save` writes is what the adapter is, whatever the model's weights hold at that moment."""

import copy
import pickle
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from tests.checkpoint_files import TENSORS_FILE
from tests.kit import adapter_values, all_bits, fill, same_bits
from tests.laws import TOKENS, Mixed
from tests.layer_kinds import LayerKind, every_kind
from tests.read_kinds import ReadKind, every_read_kind

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
@settings(max_examples=25)
@given(adapters_of_a_model(), st.sampled_from(sorted(SITUATIONS)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_saved_does_not_depend_on_the_situation_and_makes_a_fresh_model_the_same(
    drawn: tuple[dict[str, tuple[list[str], list[str]]], dict[str, float]], situation: str, dtype: torch.dtype
) -> None:
    adapters, weights = drawn
    torch.manual_seed(0)
    base = Mixed().to(dtype)
    model = copy.deepcopy(base)
    for seed, (name, (targets, trained)) in enumerate(adapters.items()):
        randlora.inject(model, r=4, targets=targets, train_also=trained or None, name=name, active=True)
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


@every_kind
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

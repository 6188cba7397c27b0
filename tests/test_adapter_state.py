"""An adapter in memory is what its files are: the same tensors, metadata and fields, and into a model by one way."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import safetensors.torch
import torch

import randlora
from randlora.checkpoint import AdapterState
from randlora.errors import AdapterError, CheckpointError, ConfigError
from tests.checkpoint_files import HEADED, LINEAR, Case, every_case, read_fields, read_tensors, trained
from tests.kit import adapter_values, all_bits, fill, untouched


@pytest.mark.parametrize("bases", ["seed", "stored"])
@every_case
def test_a_state_is_what_the_files_hold(case: Case, bases: Literal["seed", "stored"], tmp_path: Path) -> None:
    model = trained(case)
    randlora.save(model, tmp_path, bases=bases)
    state = randlora.adapter_state(model, bases=bases)
    tensors, metadata = read_tensors(tmp_path)
    assert all_bits(state.tensors) == all_bits(tensors)
    assert state.metadata == metadata
    assert state.config == read_fields(tmp_path)
    assert state.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert all(each.is_contiguous() and each.is_leaf and not each.requires_grad for each in state.tensors.values())
    twin = case.build()
    randlora.load(twin, state)
    assert torch.equal(case.output(twin), case.output(model))
    again = randlora.adapter_state(twin, bases=bases)
    assert (all_bits(again.tensors), again.metadata, again.config) == (all_bits(tensors), metadata, state.config)


def test_a_state_sets_an_adapter_in_place_where_there_is_one() -> None:
    model, other = trained(HEADED), fill(trained(HEADED), seed=3)
    held = {name: (id(value), value.requires_grad) for name, value in adapter_values(model).items()}
    randlora.swap(model, randlora.adapter_state(other))
    assert {name: (id(value), value.requires_grad) for name, value in adapter_values(model).items()} == held
    assert torch.equal(HEADED.output(model), HEADED.output(other))
    with untouched(model), pytest.raises(CheckpointError, match="the adapter has no layer 0, 2"):
        randlora.swap(model, randlora.adapter_state(trained(LINEAR)))


def test_a_state_belongs_to_no_model_and_is_sent_as_bytes() -> None:
    model, twin = trained(HEADED), HEADED.build()
    state, expected = randlora.adapter_state(model, bases="stored"), HEADED.output(model)
    before = all_bits(state.tensors)
    raw = safetensors.torch.save(state.tensors, state.metadata)
    received = AdapterState(safetensors.torch.load(raw), state.metadata, state.config)
    sent = pickle.loads(pickle.dumps(state))
    randlora.load(twin, state)
    fill(model, seed=1)
    fill(twin, seed=2)
    assert all_bits(state.tensors) == before
    randlora.load(model, received, name="later", active=True, trainable=True)
    assert torch.equal(HEADED.output(model), expected)
    randlora.swap(twin, sent)
    for tensor in sent.tensors.values():
        tensor.zero_()
    assert torch.equal(HEADED.output(twin), expected)


def test_other_values_are_given_whole_and_in_any_dtype() -> None:
    state = randlora.adapter_state(trained(LINEAR))
    halved = {name: tensor.double() / 2 for name, tensor in state.tensors.items()}
    other = state.with_tensors(halved)
    assert {tensor.dtype for tensor in other.tensors.values()} == {torch.float32}
    assert all(torch.equal(other.tensors[name], tensor / 2) for name, tensor in state.tensors.items())
    first, *rest = state.tensors
    for tensors, message in (
        ({name: halved[name] for name in rest}, f"there are no values of {first}"),
        ({**halved, "other": halved[first]}, "the adapter has no tensor other"),
        ({**halved, first: halved[first][:1]}, rf"{first} has shape .*, expected .*"),
    ):
        with pytest.raises(CheckpointError, match=message):
            state.with_tensors(tensors)
    with pytest.raises(ConfigError, match="tensors must be a mapping, got None"):
        state.with_tensors(None)  # type: ignore[arg-type]


def test_what_is_no_state_of_an_adapter_is_refused() -> None:
    model = trained(LINEAR)
    state = randlora.adapter_state(model)
    changed = {name: tensor + 1 for name, tensor in state.tensors.items()}
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.tensors.items()}
    for other, message in (
        (replace(state, tensors=changed), "checksum.* changed with AdapterState.with_tensors"),
        (replace(state, metadata={"format": "pt"}), "the metadata of the state has no 'randlora'"),
        (replace(state, tensors={}), "names other targets|do not match its checksum"),
        (replace(state, tensors={"one": 1}), r"tensors\['one'\] must be Tensor, got 1"),  # type: ignore[dict-item]
        (replace(state, config={**state.config, "r": "2"}), "config.r must be an integer, got '2'"),
        (state.with_tensors(nan), "holds NaN or infinite values"),
    ):
        with untouched(model), pytest.raises(CheckpointError, match=message):
            randlora.swap(model, other)
    with untouched(model), pytest.raises(ConfigError, match=r"source must be .*AdapterState, got"):
        randlora.swap(model, state.tensors)  # type: ignore[arg-type]
    randlora.inject(model, r=2, name="b")
    with untouched(model), pytest.raises(AdapterError, match=r"several adapters \(default, b\): give name="):
        randlora.adapter_state(model)
    with torch.no_grad():
        next(iter(adapter_values(model, "b").values())).fill_(float("inf"))
    with untouched(model), pytest.raises(CheckpointError, match=r"return the state of an adapter.*NaN or infinite"):
        randlora.adapter_state(model, "b")
    with pytest.raises(CheckpointError, match="bases must be 'seed' or 'stored', got 'none'"):
        randlora.adapter_state(model, "default", bases="none")  # type: ignore[arg-type]

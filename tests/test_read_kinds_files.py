"""Adapters of weights that other code reads: saved, loaded, converted, copied, several at a time, for every row."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from tests.kit import adapter_values, all_bits, fill, read, same_bits
from tests.laws import assert_close
from tests.read_kinds import EVERY_DTYPE, ReadKind, every_read_kind, or_medium

DTYPES = (torch.float32, torch.bfloat16), or_medium(False, (torch.bfloat16, torch.float32))
BASES = {"basis": "block"}, or_medium(False, {"basis": "sparse", "stream": "torch"})

# Files


@every_read_kind
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), or_medium(False, (torch.bfloat16, torch.float32))], ids=str
)
@torch.no_grad()
def test_a_saved_adapter_loads_into_a_model_of_any_dtype(
    kind: ReadKind, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    own, other = dtypes
    model = kind.adapted(own)
    report = randlora.save(model, tmp_path)
    is_foreign = any(note.startswith("PEFT cannot load this adapter") for note in report.notes)
    assert is_foreign is (kind.kind != "linear")
    same, again = kind.model(own), kind.model(other)
    loaded = randlora.load(same, tmp_path)
    assert loaded.targets == (kind.target,)
    assert all(getattr(loaded.config, name) == value for name, value in kind.options.items())
    assert same_bits(kind.run(same, own), kind.run(model, own))
    randlora.load(again, tmp_path)
    assert all_bits(adapter_values(again)) == all_bits(adapter_values(model))
    assert_close(kind.run(again, other), kind.run(model, own), torch.bfloat16)


@every_read_kind
@pytest.mark.parametrize(
    "options", [{"basis": "block"}, or_medium(False, {"basis": "sparse", "stream": "torch"})], ids=str
)
@torch.no_grad()
def test_what_was_loaded_is_saved_as_it_was(kind: ReadKind, options: dict[str, Any], tmp_path: Path) -> None:
    randlora.save(kind.adapted(**options), tmp_path / "first")
    model = kind.model()
    randlora.load(model, tmp_path / "first")
    assert same_bits(kind.run(model), kind.run(kind.adapted(**options)))
    randlora.save(model, tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


@every_read_kind
def test_a_checkpoint_of_the_base_loads_before_and_after(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.model()
    expected = all_bits({name: tensor + 1 for name, tensor in other.state_dict().items()})
    missing, unexpected = model.load_state_dict(
        {name: tensor + 1 for name, tensor in other.state_dict().items()}, strict=False
    )
    assert not unexpected
    assert set(missing) == {*kind.diagonal_fqns(model)}
    randlora.eject(model)
    assert all_bits(model.state_dict()) == expected


# Dtypes


@every_read_kind
@pytest.mark.parametrize(
    "dtype", [or_medium(dtype in (torch.float64, torch.bfloat16), dtype) for dtype in EVERY_DTYPE], ids=str
)
@torch.no_grad()
def test_a_model_computes_in_the_dtype_it_is_converted_to_and_back(kind: ReadKind, dtype: torch.dtype) -> None:
    model = kind.adapted()
    expected, plain = kind.run(model), kind.model().to(dtype).requires_grad_(False)
    model.to(dtype)
    found = kind.run(model, dtype)
    assert found.dtype == dtype
    assert_close(found, expected, torch.float32 if dtype == torch.float64 else dtype)
    assert_close(randlora.delta_weight(model, kind.target), kind.oracle_update(model), torch.float32)
    with randlora.disabled(model):
        assert same_bits(kind.run(model, dtype), kind.run(plain, dtype))
    model.double()
    changed = kind.changed(model_of(kind, model), kind.oracle_update(model))
    assert_close(kind.run(model, torch.float64), kind.run(changed, torch.float64), torch.float64)


def model_of(kind: ReadKind, adapted: nn.Module) -> nn.Module:
    """Return a plain float64 model with the base weights of an adapted one."""
    plain = kind.model(torch.float64)
    state = adapted.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


# Several adapters


@every_read_kind
def test_adapters_are_independent_and_add_up(kind: ReadKind) -> None:
    model, base = kind.adapted(), kind.model(torch.float64)
    alone = kind.run(model)
    options = {**kind.adapter_options, "r": 2, "alpha": 4, "basis": "block", **kind.other}
    randlora.inject(model, **options, name="other")
    if kind.other:
        ranks = {kind.diagonals(model, name)[0].dim() for name in ("default", "other")}
        assert ranks == {2, 3}
    fill(model, "other", seed=1, spread=0.2)
    assert same_bits(kind.run(model), alone)
    randlora.activate(model, {"default": 0.5, "other": -1.0})
    changed = kind.changed(base, 0.5 * kind.oracle_update(model), -kind.oracle_update(model, "other"))
    assert_close(kind.run(model), kind.run(changed, torch.float64), torch.float32)
    with randlora.merged(model):
        assert_close(kind.weight(model), kind.weight(changed), torch.float32)
    randlora.activate(model, "default")
    randlora.remove(model, "other")
    assert same_bits(kind.run(model), alone)
    with randlora.disabled(model):
        assert same_bits(kind.run(model), kind.run(kind.model().requires_grad_(False)))
        assert read(model, kind.parameter_fqn) is kind.weight(model)


@every_read_kind
def test_removing_or_training_the_first_changes_no_bit_of_the_second(kind: ReadKind) -> None:
    model = kind.adapted()
    randlora.inject(model, **{**kind.adapter_options, "r": 2, **kind.other}, name="other")
    fill(model, "other", seed=1, spread=0.2)
    randlora.activate(model, "other")
    alone = kind.run(model)
    fill(model, "default", seed=2)
    assert same_bits(kind.run(model), alone)
    randlora.remove(model, "default")
    assert same_bits(kind.run(model), alone)
    randlora.eject(model)
    assert same_bits(kind.run(model), kind.run(kind.model()))


# Copies


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@every_read_kind
def test_copies_and_pickles_compute_the_same_and_are_their_own(kind: ReadKind) -> None:
    model = kind.adapted()
    expected = kind.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_torch_save(model)):
        assert same_bits(kind.run(twin), expected)
        with torch.no_grad():
            kind.diagonals(twin)[0].zero_()
        assert not torch.equal(kind.run(twin), expected)
        randlora.eject(twin)
        assert type(kind.owner(twin)) is type(kind.owner(kind.model()))
        assert same_bits(kind.run(twin), kind.run(kind.model()))
    assert same_bits(kind.run(model), expected)

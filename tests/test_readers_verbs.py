"""Adapters of weights that other code reads: saved, loaded, merged, copied, several at a time."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import MergeError, RandLoRAError, TargetError
from tests.kit import adapter_values, all_bits, assert_unchanged, fill, read, same_bits, snapshot, untouched
from tests.laws import TOLERANCES, assert_close
from tests.read_kinds import (
    CONVOLUTIONS,
    EMBEDDINGS,
    EVERY_DTYPE,
    ReadKind,
    every_family,
    every_read_kind,
    every_read_kind_and_dtype,
    or_medium,
)

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


@every_family
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


@every_family
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


@every_family
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


@every_family
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


@every_family
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


@every_read_kind_and_dtype
@torch.no_grad()  # with gradients torch computes a linear layer in another way
def test_a_merged_weight_is_the_exact_sum_rounded_once_and_unmerging_restores_every_bit(
    kind: ReadKind, dtype: torch.dtype
) -> None:
    model, base = kind.adapted(dtype), kind.model(dtype)
    before, adapted = snapshot(model), kind.run(model, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    delta = randlora.delta_weight(model, kind.target)
    weight = kind.weight(base)
    expected = (weight.to(wide) + kind.in_layout(delta, weight)).to(dtype)
    with randlora.merged(model):
        assert same_bits(kind.weight(model), expected)
        assert kind.weight(model).stride() == weight.stride() or 1 in weight.shape
        atol = 2 * TOLERANCES[dtype] * max(1.0, float(adapted.abs().max()))
        torch.testing.assert_close(kind.run(model, dtype), adapted, rtol=0, atol=atol)
        if kind.is_whole_read:
            assert same_bits(kind.run(model, dtype), adapted)
    assert_unchanged(model, before)
    assert same_bits(kind.run(model, dtype), adapted)
    randlora.merge(model)
    assert type(kind.owner(model)) is type(kind.owner(base))
    assert same_bits(kind.weight(model), expected)
    assert model.state_dict().keys() == base.state_dict().keys()


@every_family
def test_ejecting_gives_back_every_object_and_every_bit(kind: ReadKind) -> None:
    model = kind.model()
    owner, before = kind.owner(model), snapshot(model)
    strides = kind.weight(model).stride()
    randlora.inject(model, **kind.adapter_options)
    assert kind.owner(model) is owner
    assert isinstance(owner, type(kind.owner(kind.model())))
    with randlora.merged(model):
        pass
    assert randlora.eject(model) == (kind.target,)
    assert_unchanged(model, before)
    assert type(owner) is type(kind.owner(kind.model()))
    assert kind.weight(model).stride() == strides


@every_family
def test_a_state_dict_of_a_merged_model_counts_no_adapter_twice(kind: ReadKind) -> None:
    model = kind.adapted()
    with randlora.merged(model):
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert same_bits(saved[kind.parameter_fqn], kind.weight(kind.model()))


@every_family
def test_a_model_whose_dtype_changes_while_merged_is_unmerged_in_it(kind: ReadKind) -> None:
    model = kind.adapted()
    with randlora.merged(model):
        model.bfloat16()
    assert same_bits(kind.weight(model), kind.weight(kind.model().bfloat16()))
    assert_close(kind.run(model, torch.bfloat16), kind.run(kind.adapted()), torch.bfloat16)


# Calls that raise leave the model as it was


@every_family
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_that_would_not_be_finite_changes_nothing(kind: ReadKind, value: float) -> None:
    model = kind.adapted()
    with torch.no_grad():
        kind.diagonals(model)[0].fill_(value)
    with untouched(model), pytest.raises(MergeError, match="would not be finite"):
        randlora.merge(model)
    with untouched(model), pytest.raises(MergeError, match="would not be finite"), randlora.merged(model):
        pass


@every_family
def test_a_problem_elsewhere_leaves_the_module_as_it_was(kind: ReadKind) -> None:
    model = nn.Sequential(kind.model()[0], nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int32), requires_grad=False)
    with untouched(model), pytest.raises(TargetError, match=r"1 has a weight of torch\.int32"):
        randlora.inject(model, **{**kind.adapter_options, "targets": [kind.target, "1"]})


@every_family
def test_a_file_that_does_not_fit_leaves_the_module_as_it_was(kind: ReadKind, tmp_path: Path) -> None:
    larger = nn.Sequential(kind.model()[0], nn.Linear(12, 12))
    randlora.inject(larger, **{**kind.adapter_options, "targets": [kind.target, "1"]})
    randlora.save(larger, tmp_path)
    for model in (kind.model(), kind.adapted(filled=False, name="other")):
        with untouched(model), pytest.raises(RandLoRAError, match=r"\b1\b"):
            randlora.load(model, tmp_path)


@every_family
def test_a_file_for_another_kind_of_weight_is_refused(kind: ReadKind, tmp_path: Path) -> None:
    randlora.save(kind.adapted(), tmp_path)
    model = nn.Sequential(nn.Linear(3, 5))
    with untouched(model), pytest.raises(RandLoRAError, match=rf"\b{kind.target}\b"):
        randlora.load(model, tmp_path)


@every_family
def test_a_file_for_a_weight_of_another_shape_is_refused(
    kind: ReadKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    randlora.save(kind.adapted(), tmp_path)
    model, layer = kind.model(), type(kind.layer(kind.adapted()))
    monkeypatch.setattr(layer, "features", staticmethod(lambda _: (7, 9)))
    with untouched(model), pytest.raises(RandLoRAError, match=rf"{kind.target} is .*7.* here, .* trained on"):
        randlora.load(model, tmp_path)


@every_family
def test_running_out_of_memory_leaves_the_module_as_it_was(kind: ReadKind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind.model()
    layer = type(kind.layer(kind.adapted()))

    def full(*_: object, **__: object) -> object:
        raise MemoryError

    monkeypatch.setattr(layer, "fresh_diagonals", full)
    with untouched(model), pytest.raises(MemoryError):
        randlora.inject(model, **kind.adapter_options)


@every_family
def test_dropout_is_refused_before_anything_changes(kind: ReadKind) -> None:
    model = kind.model()
    with untouched(model), pytest.raises(TargetError, match=rf"{kind.target} is a weight that .* dropout"):
        randlora.inject(model, **kind.adapter_options, dropout=0.1)


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *EMBEDDINGS], ids=lambda kind: kind.name)
def test_the_update_has_a_row_for_each_first_index_of_the_weight(kind: ReadKind) -> None:
    model = kind.adapted()
    rows = kind.weight(model).flatten(1)
    assert randlora.delta_weight(model, kind.target).shape == kind.layer(model).shape == rows.shape

"""Weights that other code reads are merged exactly and given back as they were, for every row of the table."""

from pathlib import Path

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import MergeError, RandLoRAError, TargetError
from tests.kit import assert_unchanged, same_bits, snapshot, untouched
from tests.laws import TOLERANCES, assert_close
from tests.read_kinds import CONVOLUTIONS, EMBEDDINGS, ReadKind, every_read_kind, every_read_kind_and_dtype


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


@every_read_kind
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


@every_read_kind
def test_a_state_dict_of_a_merged_model_counts_no_adapter_twice(kind: ReadKind) -> None:
    model = kind.adapted()
    with randlora.merged(model):
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert same_bits(saved[kind.parameter_fqn], kind.weight(kind.model()))


@every_read_kind
def test_a_model_whose_dtype_changes_while_merged_is_unmerged_in_it(kind: ReadKind) -> None:
    model = kind.adapted()
    with randlora.merged(model):
        model.bfloat16()
    assert same_bits(kind.weight(model), kind.weight(kind.model().bfloat16()))
    assert_close(kind.run(model, torch.bfloat16), kind.run(kind.adapted()), torch.bfloat16)


# Calls that raise leave the model as it was


@every_read_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_that_would_not_be_finite_changes_nothing(kind: ReadKind, value: float) -> None:
    model = kind.adapted()
    with torch.no_grad():
        kind.diagonals(model)[0].fill_(value)
    with untouched(model), pytest.raises(MergeError, match="would not be finite"):
        randlora.merge(model)
    with untouched(model), pytest.raises(MergeError, match="would not be finite"), randlora.merged(model):
        pass


@every_read_kind
def test_a_problem_elsewhere_leaves_the_module_as_it_was(kind: ReadKind) -> None:
    model = nn.Sequential(kind.model()[0], nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int32), requires_grad=False)
    with untouched(model), pytest.raises(TargetError, match=r"1 has a weight of torch\.int32"):
        randlora.inject(model, **{**kind.adapter_options, "targets": [kind.target, "1"]})


@every_read_kind
def test_a_file_that_does_not_fit_leaves_the_module_as_it_was(kind: ReadKind, tmp_path: Path) -> None:
    larger = nn.Sequential(kind.model()[0], nn.Linear(12, 12))
    randlora.inject(larger, **{**kind.adapter_options, "targets": [kind.target, "1"]})
    randlora.save(larger, tmp_path)
    for model in (kind.model(), kind.adapted(filled=False, name="other")):
        with untouched(model), pytest.raises(RandLoRAError, match=r"\b1\b"):
            randlora.load(model, tmp_path)


@every_read_kind
def test_a_file_for_another_kind_of_weight_is_refused(kind: ReadKind, tmp_path: Path) -> None:
    randlora.save(kind.adapted(), tmp_path)
    model = nn.Sequential(nn.Linear(3, 5))
    with untouched(model), pytest.raises(RandLoRAError, match=rf"\b{kind.target}\b"):
        randlora.load(model, tmp_path)


@every_read_kind
def test_a_file_for_a_weight_of_another_shape_is_refused(
    kind: ReadKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    randlora.save(kind.adapted(), tmp_path)
    model, layer = kind.model(), type(kind.layer(kind.adapted()))
    monkeypatch.setattr(layer, "features", staticmethod(lambda _: (7, 9)))
    with untouched(model), pytest.raises(RandLoRAError, match=rf"{kind.target} is .*7.* here, .* trained on"):
        randlora.load(model, tmp_path)


@every_read_kind
def test_running_out_of_memory_leaves_the_module_as_it_was(kind: ReadKind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind.model()
    layer = type(kind.layer(kind.adapted()))

    def full(*_: object, **__: object) -> object:
        raise MemoryError

    monkeypatch.setattr(layer, "fresh_diagonals", full)
    with untouched(model), pytest.raises(MemoryError):
        randlora.inject(model, **kind.adapter_options)


@every_read_kind
def test_dropout_is_refused_before_anything_changes(kind: ReadKind) -> None:
    model = kind.model()
    with untouched(model), pytest.raises(TargetError, match=rf"{kind.target} is a weight that .* dropout"):
        randlora.inject(model, **kind.adapter_options, dropout=0.1)


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *EMBEDDINGS], ids=lambda kind: kind.name)
def test_the_update_has_a_row_for_each_first_index_of_the_weight(kind: ReadKind) -> None:
    model = kind.adapted()
    rows = kind.weight(model).flatten(1)
    assert randlora.delta_weight(model, kind.target).shape == kind.layer(model).shape == rows.shape

"""Law 11: adapters of one model never touch one another. And the verbs that switch them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.config import LARGEST_FACTOR
from randlora.errors import AdapterError, TargetError
from randlora.functional import Compute
from tests.kit import assert_unchanged, fill, on_one_line, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed, adapted_names, assert_close, plain

second_options = st.fixed_dictionaries({
    "r": st.integers(3, 8),
    "basis": st.sampled_from(["dense", "sparse", "block"]),
    "seed": st.integers(0, 3),
    "alpha": st.floats(1, 50),
    "targets": st.sampled_from([["q"], ["up", "down"], "all-linear", ["head"]]),
    "train_also": st.sampled_from([None, ["norm"], ["up.weight"], r"embed\.weight"]),
})


def with_one(dtype: torch.dtype = torch.float32, **options: Any) -> Mixed:
    model = Mixed(dtype)
    randlora.inject(model, r=4, **options)
    fill(model)
    return model


def train(model: nn.Module, name: str) -> None:
    randlora.activate(model, name)
    randlora.set_trainable(model, name)
    optimizer = torch.optim.SGD(list(randlora.trainable_parameters(model)), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


@given(options=second_options)
def test_adding_training_and_removing_one_adapter_changes_no_bit_of_another(options: dict[str, Any]) -> None:
    model = with_one(train_also=["norm"])
    expected, plain = model(TOKENS), _plain(model)
    if options["train_also"] == ["up.weight"] and options["targets"] not in (["q"], ["head"]):
        options = {**options, "train_also": None}
    randlora.inject(model, name="b", **options)
    assert same_bits(model(TOKENS), expected)
    randlora.activate(model, "default")
    randlora.set_trainable(model, "default", trainable=False)
    train(model, "b")
    assert not torch.allclose(model(TOKENS), plain)
    randlora.activate(model, "default")
    assert same_bits(model(TOKENS), expected)
    with randlora.disabled(model):
        assert same_bits(model(TOKENS), plain)
    randlora.remove(model, "b")
    assert same_bits(model(TOKENS), expected)
    assert len(randlora.state.attached_state(model).bank) == 1  # type: ignore[union-attr]


def _plain(model: nn.Module) -> torch.Tensor:
    with randlora.disabled(model):
        output: torch.Tensor = model(TOKENS)
    return output


@given(options=second_options)
def test_removing_the_first_leaves_the_second_as_it_was(options: dict[str, Any]) -> None:
    options = {**options, "train_also": None}
    model = with_one()
    randlora.inject(model, name="b", active=True, **options)
    fill(model, "b", seed=1)
    expected = model(TOKENS)
    randlora.remove(model, "default")
    assert same_bits(model(TOKENS), expected)
    layers = adapted_names(model)
    assert layers == set(randlora.adapters(model)[0].targets)


@given(weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_several_active_adapters_add_their_weighted_deltas(weights: tuple[float, float]) -> None:
    model = with_one(torch.float64)
    randlora.inject(model, r=5, name="b", targets=["q"])
    fill(model, "b", seed=1)
    deltas = [randlora.delta_weight(model, "q", name=name) for name in ("default", "b")]
    randlora.activate(model, dict(zip(("default", "b"), weights, strict=True)))
    expected = weights[0] * deltas[0] + weights[1] * deltas[1]
    assert_close(randlora.delta_weight(model, "q"), expected, torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    layer = model.q
    assert_close(layer(x) - plain(layer)(x), x @ expected.T, torch.float64)


def test_a_further_adapter_starts_inactive_and_frozen() -> None:
    model = with_one()
    randlora.inject(model, r=4, name="b")
    first, second = randlora.adapters(model)
    assert (first.is_active, first.is_trainable) == (True, True)
    assert (second.is_active, second.is_trainable) == (False, False)


def test_a_further_adapter_can_be_asked_to_act_and_to_be_trained() -> None:
    model = with_one()
    randlora.inject(model, r=4, name="b", active=True, trainable=True)
    assert [(info.name, info.weight, info.is_trainable) for info in randlora.adapters(model)] == [
        ("default", None, True),
        ("b", 1.0, True),
    ]


def test_what_acts_and_what_is_trained_are_separate_matters() -> None:
    model = with_one()
    randlora.inject(model, r=4, name="b")
    randlora.activate(model, ["default", "b"])
    assert [info.is_trainable for info in randlora.adapters(model)] == [True, False]
    randlora.activate(model, "b")
    randlora.set_trainable(model, "b")
    assert [info.is_trainable for info in randlora.adapters(model)] == [True, True]


def test_adapters_with_equal_specs_hold_one_basis() -> None:
    model = with_one()
    randlora.inject(model, r=4, name="b")
    bank = randlora.state.attached_state(model).bank  # type: ignore[union-attr]
    assert len(bank) == 1


@pytest.mark.parametrize(
    "others",
    [{"seed": 1}, {"basis": "sparse"}, {"stream": "portable"}, {"r": 2}, {"basis": "block", "r": 8}],
    ids=str,
)
def test_bases_that_do_not_fit_come_beside_the_first_and_the_report_says_so(others: dict[str, Any]) -> None:
    model = with_one()
    (first,) = randlora.state.attached_state(model).bank  # type: ignore[union-attr]
    options: dict[str, Any] = {"r": 4, "name": "b", **others}
    planned = randlora.plan(model, **options)
    report = randlora.inject(model, **options)
    assert len(randlora.state.attached_state(model).bank) == 2  # type: ignore[union-attr]
    assert str(report) == str(planned)
    held = f"{first.spec}, {first.nbytes:,} bytes"
    assert f"its bases are additional, because those of the other adapters cannot be shared: {held}" in on_one_line(
        report
    )


def test_a_report_says_nothing_of_bases_that_are_shared() -> None:
    model = with_one()
    assert "beside" not in str(randlora.inject(model, r=4, name="b"))


def test_a_portable_basis_grows_for_larger_layers_without_changing_the_first_adapter() -> None:
    model = Mixed()
    randlora.inject(model, r=4, targets=["head"], stream="portable")
    fill(model)
    expected = model(TOKENS)
    randlora.inject(model, r=4, stream="portable", name="b")
    assert same_bits(model(TOKENS), expected)
    assert len(randlora.state.attached_state(model).bank) == 1  # type: ignore[union-attr]


def test_a_smaller_rank_beside_the_first_breaks_neither() -> None:
    """PEFT 0.21.2 keeps one num_bases a layer, so this breaks both of its adapters."""
    model = with_one()
    expected = model(TOKENS)
    randlora.inject(model, r=2, name="b")
    fill(model, "b", seed=1)
    assert same_bits(model(TOKENS), expected)
    randlora.activate(model, "b")
    assert not torch.allclose(model(TOKENS), expected)


def test_disabled_nests_and_restores_the_state_it_found() -> None:
    model = with_one(train_also=["head"])
    expected = model(TOKENS)
    with randlora.disabled(model):
        plain = model(TOKENS)
        with randlora.disabled(model):
            assert same_bits(model(TOKENS), plain)
        assert same_bits(model(TOKENS), plain)
    assert same_bits(model(TOKENS), expected)
    assert not torch.allclose(plain, expected)


def test_disabled_ends_when_what_is_inside_raises() -> None:
    model = with_one(train_also=["head"])
    with untouched(model), pytest.raises(ZeroDivisionError), randlora.disabled(model):
        raise ZeroDivisionError


def test_removing_the_only_adapter_gives_back_the_plain_model() -> None:
    model = Mixed()
    before = snapshot(model)
    randlora.inject(model, r=4, train_also=["head"])
    fill(model)
    randlora.remove(model, "default")
    assert_unchanged(model, before)


def test_each_adapter_has_its_own_version_of_a_head() -> None:
    model = with_one(train_also=["head"])
    first = model.head.weight
    randlora.inject(model, r=4, name="b", train_also=["head"])
    fill(model, "b", seed=1)
    assert model.head.weight is first
    randlora.activate(model, "b")
    second = model.head.weight
    assert second is not first
    randlora.activate(model, [])
    assert model.head.weight is not first
    assert model.head.weight is not second
    randlora.activate(model, "default")
    assert model.head.weight is first


def test_two_versions_of_one_head_cannot_act_together() -> None:
    model = with_one(train_also=["head"])
    randlora.inject(model, r=4, name="b", train_also=["head"])
    with untouched(model), pytest.raises(AdapterError, match=r"b and default each trained their own .*head\.weight"):
        randlora.activate(model, ["default", "b"])


def test_a_tied_parameter_trained_beside_an_adapter_stays_tied() -> None:
    model = Mixed()
    model.twin = nn.Embedding(11, 12)
    model.twin.weight = model.embed.weight
    randlora.inject(model, r=4, train_also=["embed"])
    assert model.twin.weight is model.embed.weight
    assert model.twin.weight.requires_grad
    randlora.eject(model)
    assert model.twin.weight is model.embed.weight


def test_what_is_trained_beside_follows_the_model_to_another_dtype() -> None:
    model = with_one(train_also=["head"])
    model.to(torch.bfloat16)
    with randlora.disabled(model):
        assert model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.bfloat16
    model(TOKENS)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_clone_is_a_model_of_its_own(clone: Any) -> None:
    model = with_one(train_also=["head"])
    randlora.inject(model, r=4, name="b", targets=["q"])
    expected, twin = model(TOKENS), clone(model)
    assert same_bits(twin(TOKENS), expected)
    fill(twin, seed=5)
    randlora.activate(twin, ["default", "b"])
    assert same_bits(model(TOKENS), expected)
    randlora.eject(twin)
    assert same_bits(model(TOKENS), expected)
    assert len(randlora.adapters(model)) == 2


def test_a_model_adapted_by_a_callable_can_be_pickled() -> None:
    model = Mixed()
    randlora.inject(model, r=4, targets=lambda fqn, _: fqn == "q")
    assert randlora.adapters(pickle.loads(pickle.dumps(model))) == randlora.adapters(model)
    assert randlora.adapters(model)[0].config.targets == ("q",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("c", "no adapter named 'c': it has default"),
        (["default", "c"], "no adapter named 'c'"),
        ({"default": float("nan")}, "factor of 'default' must be a finite number, got nan"),
        (["default", "default"], r"each adapter can be named once, got \['default', 'default'\]"),
        ({"default": True}, "must be a finite number, got True"),
        ({"default": -1e16}, r"factor of 'default' must be at most 1e\+15 in size, got -1e\+16"),
    ],
)
def test_what_cannot_be_activated_is_refused(names: Any, message: str) -> None:
    model = with_one()
    with untouched(model), pytest.raises(AdapterError, match=message):
        randlora.activate(model, names)


def test_an_unknown_adapter_cannot_be_removed() -> None:
    model = with_one()
    with untouched(model), pytest.raises(AdapterError, match="no adapter named 'c'"):
        randlora.remove(model, "c")


def test_delta_weight_of_a_layer_that_is_not_adapted_names_the_nearest() -> None:
    model = with_one()
    with pytest.raises(TargetError, match=r"'dwn' is not adapted; the nearest adapted layers are down"):
        randlora.delta_weight(model, "dwn")


def test_a_plain_model_has_no_adapters_and_says_so() -> None:
    model = Mixed()
    assert randlora.adapters(model) == []
    with pytest.raises(AdapterError, match="the model has no adapter: call"):
        list(randlora.trainable_parameters(model))


def test_the_optimizer_gets_what_is_trained_beside_an_inactive_adapter_too() -> None:
    model = with_one(train_also=["head"])
    before = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    randlora.activate(model, [])
    assert {id(parameter) for parameter in randlora.trainable_parameters(model)} == before
    assert len(before) == 8


def test_numpys_numbers_are_weights_too() -> None:
    model = with_one()
    randlora.activate(model, {"default": np.float32(0.5)})
    assert randlora.adapters(model)[0].weight == 0.5


def test_what_is_switched_in_inference_mode_can_be_trained() -> None:
    model = with_one(train_also=["head"])
    randlora.inject(model, r=4, name="b", train_also=["head"])
    model.double()
    with torch.inference_mode():
        randlora.activate(model, "b")
    train(model, "b")


def test_deltas_are_summed_in_the_order_of_their_activation() -> None:
    """The order is part of the sum's bits, and must not be that of a set, which changes from process to process."""
    model = with_one()
    names = ["default", "b", "c", "d", "e"]
    for seed, name in enumerate(names[1:], start=1):
        randlora.inject(model, r=4, name=name)
        fill(model, name, seed=seed)
    randlora.activate(model, names)
    expected = torch.zeros(12, 12)
    for name in names:
        expected = expected + randlora.delta_weight(model, "q", name=name)
    assert same_bits(randlora.delta_weight(model, "q"), expected)


def test_blocks_that_overlap_leave_the_adapters_on() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    fill(model)
    expected = model(TOKENS)
    first, second = randlora.disabled(model), randlora.disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(model(TOKENS), expected)
    second.__exit__(None, None, None)
    assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize(
    "call",
    [
        randlora.merge,
        lambda model: randlora.activate(model, "default"),
        lambda model: randlora.disabled(model).__enter__(),
        randlora.eject,
        lambda model: randlora.save(model, "nowhere"),
    ],
    ids=["merge", "activate", "disabled", "eject", "save"],
)
def test_a_copy_of_an_adapted_layer_belongs_to_other_adapters(call: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    randlora.inject(model, r=2, targets="all-linear")
    model.append(copy.deepcopy(model[0]))
    with untouched(model), pytest.raises(AdapterError, match="2 has adapters that were added to another module"):
        call(model)


def test_a_part_that_outlives_its_model_says_where_its_adapters_are() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    randlora.inject(model, r=2)
    with pytest.raises(AdapterError, match="were added to another module"):
        randlora.eject(model[0])


def test_ejecting_gives_back_what_required_grad_and_what_did_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    randlora.inject(model, r=2, targets="all-linear")
    model.requires_grad_(True)
    randlora.eject(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", ["factored", "materialized"])
def test_a_fresh_adapter_leaves_every_bit_whatever_its_factors(dtype: torch.dtype, compute: Compute) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)).to(dtype), torch.randn(3, 8, dtype=dtype)
    expected = model(x)
    randlora.inject(model, r=4, alpha=LARGEST_FACTOR)
    randlora.activate(model, {"default": -LARGEST_FACTOR})
    randlora.set_compute(model, compute)
    assert same_bits(model(x), expected)

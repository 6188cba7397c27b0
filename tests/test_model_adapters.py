"""Adapters of one model never touch one another: added, switched, listed, saved, routed and removed."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.config import LARGEST_FACTOR
from randlora.errors import AdapterError, TargetError
from randlora.functional import Compute
from tests.kit import assert_unchanged, fill, on_one_line, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed

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


def test_a_further_adapter_is_inactive_and_frozen_unless_asked_otherwise() -> None:
    model = with_one()
    randlora.inject(model, r=4, name="b")
    randlora.inject(model, r=4, name="c", active=True, trainable=True)
    found = [(info.is_active, info.is_trainable) for info in randlora.adapters(model)]
    assert found == [(False, True), (False, False), (True, True)]


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


def test_a_portable_basis_grows_for_larger_layers_without_changing_the_first_adapter() -> None:
    model = Mixed()
    randlora.inject(model, r=4, targets=["head"], stream="portable")
    fill(model)
    expected = model(TOKENS)
    randlora.inject(model, r=4, stream="portable", name="b")
    assert same_bits(model(TOKENS), expected)
    assert len(randlora.state.attached_state(model).bank) == 1  # type: ignore[union-attr]


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
    with untouched(model), pytest.raises(AdapterError, match="2 has adapters that were added to a different module"):
        call(model)


def test_a_part_that_outlives_its_model_says_where_its_adapters_are() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    randlora.inject(model, r=2)
    with pytest.raises(AdapterError, match="were added to a different module"):
        randlora.eject(model[0])


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


OPTIONS = "r=3, alpha=60"


def with_head_of_its_own() -> Mixed:
    model = Mixed()
    randlora.inject(model, r=3, targets=["q", "up", "down"], name="a")
    randlora.inject(model, r=3, targets=["q"], train_also=["norm"], name="b")
    fill(model, "a")
    fill(model, "b", seed=1)
    return model


@pytest.mark.parametrize(
    ("change", "states"),
    [
        (randlora.adapters, ("active, trainable", "inactive, frozen")),
        (lambda model: randlora.activate(model, "b"), ("inactive, trainable", "active, frozen")),
        (lambda model: randlora.set_trainable(model, "a", False), ("active, frozen", "inactive, frozen")),
        (lambda model: randlora.activate(model, {"a": -0.25}), ("active with the factor -0.25, trainable", None)),
        (
            lambda model: randlora.activate(model, "a", layers=["q"]),
            ("active with a factor for each layer, trainable", None),
        ),
        (lambda model: randlora.merge(model, reversible=True), ("active, trainable, merged", "inactive, frozen")),
    ],
)
def test_an_adapter_prints_as_its_options_and_state(
    change: Callable[[nn.Module], object], states: tuple[str, str | None]
) -> None:
    model = with_head_of_its_own()
    change(model)
    first, second = randlora.adapters(model)
    assert str(first) == f"'a': {OPTIONS}, 3 layers, {states[0]}"
    assert (
        str(second)
        == f"'b': {OPTIONS}, 1 layer, {states[1] or 'inactive, frozen'}\nalso trained: norm.weight, norm.bias"
    )


def test_what_a_model_has_no_more_is_said() -> None:
    model = with_head_of_its_own()
    model.up = nn.Linear(5, 7)
    info = randlora.adapters(model)[0]
    assert info.problems
    assert " ".join(str(info).split()).endswith(" ".join(info.problems[0].split()))


def test_a_line_break_in_a_name_begins_no_line() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"x\ny": nn.LayerNorm(8)}))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    assert str(randlora.adapters(model)[0]).splitlines() == [
        "'default': r=2, alpha=40, 1 layer, active, trainable",
        "also trained: 1.x\\ny.weight, 1.x\\ny.bias",
    ]


IDS = torch.arange(12).view(2, 6)
FIRST: dict[str, Any] = {"r": 4, "alpha": 8, "targets": ["v_proj"]}
SECOND: dict[str, dict[str, Any]] = {
    "the same": {},
    "a smaller r": {"r": 2},
    "a larger r": {"r": 8},
    "an r that divides no dim": {"r": 5},
    "an r above every dim": {"r": 100},
    "other layers": {"targets": ["q_proj"]},
    "larger layers too": {"targets": ["v_proj", "down_proj"]},
    "all layers": {"targets": "all-linear"},
    "another seed": {"seed": 7},
    "sparse bases": {"basis": "sparse"},
    "block bases": {"basis": "block", "blocks": (2, 2)},
    "another scaling": {"alpha": 1},
}
every_second = pytest.mark.parametrize("second", SECOND)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def add(model: nn.Module, name: str, options: dict[str, Any]) -> None:
    randlora.inject(model, name=name, **{**FIRST, **options})
    fill(model, name, seed=len(name), spread=0.3)


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    randlora.activate(model, name)
    logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.medium
@every_second
@pytest.mark.parametrize(
    "order", [("first", "second"), pytest.param(("second", "first"), marks=pytest.mark.slow)], ids="-".join
)
def test_neither_changes_the_other_and_both_come_back(second: str, order: tuple[str, str], tmp_path: Path) -> None:
    options = {"first": {}, "second": SECOND[second]}
    model, wanted = llama(), {}
    for name in order:
        add(model, name, options[name])
        wanted[name] = output(model, name)
    one, other = wanted[order[0]], wanted[order[1]]
    assert torch.equal(output(model, order[0]), one)
    if second != "the same":
        assert not torch.allclose(one, other, atol=1e-4)
    randlora.save(model, tmp_path / order[0], name=order[0], bases="seed")
    randlora.save(model, tmp_path / order[1], name=order[1], bases="stored")  # PEFT loads no such pair
    loaded = llama()
    for number, name in enumerate(order):
        single = llama()
        randlora.load(single, tmp_path / name)
        assert torch.equal(output(single, "default"), wanted[name]), "reloaded alone"
        randlora.load(loaded, tmp_path / name, name=name)
        for known in order[: number + 1]:
            assert torch.equal(output(loaded, known), wanted[known]), "loaded beside the other"
    randlora.remove(loaded, order[0])
    assert torch.equal(output(loaded, order[1]), wanted[order[1]])


@pytest.mark.medium
@every_second
@torch.no_grad()
def test_both_act_together_and_on_rows_of_one_batch(second: str) -> None:
    """PEFT's `PeftMixedModel`, which activates adapters of several kinds, takes none of RandLoRA."""
    model, summed = llama(), llama()
    add(model, "first", {})
    add(model, "second", SECOND[second])
    rows = torch.stack([output(model, "second")[0], output(model, "first")[1]])
    with randlora.serving.routed(model, ["second", "first"]):
        torch.testing.assert_close(model(input_ids=IDS).logits, rows, rtol=1e-5, atol=1e-5)
    factors = {"first": 0.5, "second": 2.0}
    for info in randlora.adapters(model):
        for fqn in info.targets:
            update = factors[info.name] * randlora.delta_weight(model, fqn, name=info.name)
            summed.get_parameter(f"{fqn}.weight").add_(update)
    randlora.activate(model, factors)
    torch.testing.assert_close(model(input_ids=IDS).logits, summed(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)

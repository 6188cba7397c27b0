"""Tokens of several adapters on the same bases, each with its own update, and Λ and Γ that a block keeps for them."""

import copy
import gc
import pickle
import weakref
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.functional import Diagonals
from randlora.serving import stacked
from randlora.serving.stacked import Stack, Way, one_by_one, stacked_update
from tests import reference
from tests.kit import fill
from tests.pairs import Case, case, every_form
from tests.serving import row_by_row
from tests.strategies import ranks, sides

every_count = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def updates(form: str, out: int, into: int, r: int, counts: list[int], x: Tensor) -> tuple[Case, Any, Tensor]:
    """Make bases, an update for each count of tokens, and what the oracle says that the tokens get."""
    made = case(form, out, into, r)
    lam, gamma, _ = made.diagonals
    diagonals = [
        Diagonals(torch.randn_like(lam), torch.randn_like(gamma), scaling)
        for scaling in torch.rand(len(counts), dtype=torch.float64).tolist()
    ]
    deltas = [reference.delta_weight(made.basis_A, made.basis_B, *one, in_features=into) for one in diagonals]
    parts = zip(x.double().split(counts), deltas, strict=True)
    return made, diagonals, torch.cat([part @ delta.T for part, delta in parts])


@every_form
@settings(max_examples=8)
@given(
    out=sides,
    into=sides,
    r=ranks,
    counts=every_count,
    way=st.sampled_from([*get_args(Way), None]),
    at_once=st.sampled_from([1, 2**22]),
)
def test_each_token_gets_the_oracles_update(
    form: str, out: int, into: int, r: int, counts: list[int], way: Way | None, at_once: int
) -> None:
    x, is_wide = torch.randn(sum(counts), into, dtype=torch.float64), into <= out
    made, diagonals, wanted = updates(form, out, into, r, counts, x)
    if way == "by term" and made.pair.A.shape[0] > 1:
        way = None
    in_turn = one_by_one(x, made.pair, diagonals, counts, is_wide=is_wide)
    torch.testing.assert_close(in_turn, wanted, rtol=1e-12, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stacked.AT_ONCE, "cpu", at_once)
        stacked._parts.cache_clear()
        found = stacked_update(x, made.pair, Stack.of(made.pair, diagonals), counts, is_wide=is_wide, way=way)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", get_args(Way))
def test_in_bfloat16_it_is_as_close_as_one_by_one(way: Way) -> None:
    x, counts = torch.randn(6, 16, dtype=torch.float64).bfloat16(), [1, 2, 3]
    made, diagonals, wanted = updates("dense", 24, 16, 8, counts, x)
    pair = type(made.pair)(made.pair.A.float(), made.pair.B.bfloat16(), *made.pair.rest)
    near = one_by_one(x, pair, diagonals, counts, is_wide=True)
    found = stacked_update(x, pair, Stack.of(pair, diagonals), counts, is_wide=True, way=way)
    errors = [(each.double() - wanted).norm() / wanted.norm() for each in (near, found)]
    assert errors[1] < 2 * errors[0] + 1e-3


def test_a_few_tokens_of_each_adapter_build_no_large_factor() -> None:
    few, many = ({part.way for part in stacked._parts((count, count), (1, 8, 8, 64), "cpu", None)} for count in (1, 64))
    assert few < {"by row", "by term"}
    assert many == {"whole"}


NAMES = ["a", "b", "c", "a", None]


def adapted(basis: Any = "dense") -> nn.Module:
    made = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    for seed, name in enumerate("abc"):
        randlora.inject(made, r=4, alpha=4 + seed, name=name, basis=basis, blocks=(2, 2) if basis == "block" else None)
        fill(made, name, seed=seed)
    return made.eval()


def alone(model: nn.Module, x: Tensor) -> Tensor:
    twin = copy.deepcopy(model)
    return row_by_row(twin, NAMES, lambda: twin(x))


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_values_are_copied_once_a_block_and_are_in_no_copy_of_the_model(
    basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, copied = list[Stack](), Stack.of

    def noted(*args: Any) -> Stack:
        copies.append(copied(*args))
        return copies[-1]

    monkeypatch.setattr(Stack, "of", noted)
    model, x = adapted(basis), torch.randn(5, 16)
    size = len(pickle.dumps(model))
    with torch.no_grad():
        wanted = alone(model, x)
        with randlora.serving.routed(model, NAMES):
            for tokens in (x, x.unsqueeze(1).expand(5, 3, 16), x):
                found = model(tokens)
                torch.testing.assert_close(found if found.dim() == 2 else found[:, 1], wanted)
                assert len(pickle.dumps(copy.deepcopy(model))) < size + 2000
        assert len(copies) == 2, "one for each layer"
        kept = weakref.ref(copies.pop().gamma)
        copies.clear()
        gc.collect()
        assert kept() is None


def in_place(held: Any) -> None:
    held["b"].mul_(-3)


def other_data(held: Any) -> None:
    other = held["b"].data * -3
    held["b"].data = torch.zeros_like(other)
    gc.collect()
    held["b"].data = other.clone()


def other_parameter(held: Any) -> None:
    held["b"] = nn.Parameter(held["b"] * -3, requires_grad=False)


@pytest.mark.parametrize(
    "change", [torch.no_grad()(in_place), torch.inference_mode()(in_place), other_data, other_parameter]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_inside_of_the_block_is_seen_and_gradients_are_after_it(change: Any, mode: Any) -> None:
    model, x = adapted(), torch.randn(5, 16)
    with randlora.serving.routed(model, NAMES):
        with mode():
            before = model(x).clone()
        change(model.get_submodule("0.randlora_lambda"))
        with mode():
            after = model(x).clone()
        for names in ([], ["a", "c"]):  # of the input alone, and of adapters too
            randlora.set_trainable(model, names)
            found = model(x.requires_grad_())
            torch.testing.assert_close(found, after)
            found.square().sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))
    with torch.no_grad():
        torch.testing.assert_close(after, alone(model, x))
    assert not torch.equal(before[1], after[1])

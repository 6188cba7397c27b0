"""Tokens of several adapters on the same bases, each with its own update, and Λ and Γ that a block keeps for them."""

import copy
import gc
import pickle
import threading
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

at_once = st.sampled_from([1, 2**22])
every_count = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def updates(form: str, out: int, into: int, r: int, many: int) -> tuple[Case, list[Diagonals], list[Tensor]]:
    """Make bases, Λ, Γ and the scaling of some updates, and what the oracle says they are."""
    made = case(form, out, into, r)
    lam, gamma, _ = made.diagonals
    diagonals = [
        Diagonals(torch.randn_like(lam), torch.randn_like(gamma), scaling)
        for scaling in torch.rand(many, dtype=torch.float64).tolist()
    ]
    return (
        made,
        diagonals,
        [reference.delta_weight(made.basis_A, made.basis_B, *one, in_features=into) for one in diagonals],
    )


def expected(x: Tensor, counts: list[int], deltas: list[Tensor]) -> Tensor:
    return torch.cat([part @ delta.T for part, delta in zip(x.split(counts), deltas, strict=True)])


@every_form
@settings(max_examples=8)
@given(out=sides, into=sides, r=ranks, counts=every_count, way=st.sampled_from([*get_args(Way), None]), at_once=at_once)
def test_each_token_gets_the_oracles_update(
    form: str, out: int, into: int, r: int, counts: list[int], way: Way | None, at_once: int
) -> None:
    made, diagonals, deltas = updates(form, out, into, r, len(counts))
    if way == "by term" and made.pair.A.shape[0] > 1:
        way = None
    x, is_wide = torch.randn(sum(counts), into, dtype=torch.float64), into <= out
    wanted = expected(x, counts, deltas)
    in_turn = one_by_one(x, made.pair, diagonals, counts, is_wide=is_wide)
    torch.testing.assert_close(in_turn, wanted, rtol=1e-12, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stacked.AT_ONCE, "cpu", at_once)
        stacked._parts.cache_clear()
        stack = Stack.of(made.pair, diagonals)
        found = stacked_update(x, made.pair, stack, counts, is_wide=is_wide, way=way)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "form", "way"),
    [
        ((24, 16), "dense", "whole"),
        ((16, 24), "dense", "by row"),
        ((24, 16), "dense", "by term"),
        ((24, 16), "block(2,4)", "by row"),
    ],
    ids=str,
)
def test_in_bfloat16_it_is_as_close_as_one_by_one(shape: tuple[int, int], form: str, way: Way) -> None:
    made, diagonals, deltas = updates(form, *shape, 8, 3)
    pair = type(made.pair)(made.pair.A.float(), made.pair.B.bfloat16(), *made.pair.rest)
    x, counts = torch.randn(6, shape[1], dtype=torch.float64).bfloat16(), [1, 2, 3]
    wanted, is_wide = expected(x.double(), counts, deltas), shape[1] <= shape[0]
    near = one_by_one(x, pair, diagonals, counts, is_wide=is_wide)
    found = stacked_update(x, pair, Stack.of(pair, diagonals), counts, is_wide=is_wide, way=way)
    errors = [(each.double() - wanted).norm() / wanted.norm() for each in (near, found)]
    assert errors[1] < 2 * errors[0] + 1e-3


def test_a_few_tokens_of_each_adapter_build_no_large_factor() -> None:
    few, many = ({part.way for part in stacked._parts((count, count), (1, 8, 8, 64), "cpu", None)} for count in (1, 64))
    assert few < {"by row", "by term"}
    assert many == {"whole"}


NAMES = ["a", "b", "c", "a", None]


@pytest.fixture
def model() -> nn.Module:
    return adapted("dense")


def adapted(basis: Any) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    for seed, name in enumerate("abc"):
        randlora.inject(made, r=4, alpha=4 + seed, name=name, basis=basis, blocks=(2, 2) if basis == "block" else None)
        fill(made, name, seed=seed)
    return made.eval()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Stack]:
    made: list[Stack] = []
    copied = Stack.of

    def recorded(*args: Any) -> Stack:
        made.append(copied(*args))
        return made[-1]

    monkeypatch.setattr(Stack, "of", recorded)
    return made


def alone(model: nn.Module, x: Tensor) -> Tensor:
    twin = copy.deepcopy(model)
    return row_by_row(twin, NAMES, lambda: twin(x))


def lam(model: nn.Module, name: str) -> nn.Parameter:
    return next(parameter for fqn, parameter in model.named_parameters() if fqn.endswith(f"lambda.{name}"))


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_values_are_copied_once_a_block_and_are_in_no_copy_of_the_model(basis: str, copies: list[Stack]) -> None:
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


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        lam(model, "b").mul_(-3)


def by_another_thread(model: nn.Module) -> None:
    thread = threading.Thread(target=in_place, args=[model])
    thread.start()
    thread.join()


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        lam(model, "b").mul_(-3)


def other_data_twice(model: nn.Module) -> None:
    other = lam(model, "b").data * -3
    lam(model, "b").data = torch.zeros_like(other)
    gc.collect()
    lam(model, "b").data = other.clone()


def other_parameter(model: nn.Module) -> None:
    held: Any = model.get_submodule("0")
    parameters = next(part for name, part in held._modules.items() if name.endswith("lambda"))
    parameters["b"] = nn.Parameter(parameters["b"] * -3, requires_grad=False)


def other_dtype(model: nn.Module) -> None:
    model.half()
    model.float()


CHANGES = [in_place, by_another_thread, in_inference_mode, other_data_twice, other_parameter, other_dtype]


@pytest.mark.parametrize(
    ("change", "mode"),
    [*((change, torch.no_grad) for change in CHANGES), (in_place, torch.inference_mode)],
    ids=lambda value: value.__name__,
)
def test_a_change_inside_of_the_block_is_seen(change: Any, mode: Any, model: nn.Module) -> None:
    x = torch.randn(5, 16)
    with randlora.serving.routed(model, NAMES):
        with mode():
            before = model(x).clone()
        change(model)
        with mode():
            after = model(x).clone()
    with torch.no_grad():
        torch.testing.assert_close(after, alone(model, x))
    assert not torch.equal(before[1], after[1])


def test_parameters_of_inference_mode_are_never_kept(model: nn.Module, copies: list[Stack]) -> None:
    x = torch.randn(5, 16)
    with torch.inference_mode():
        other_parameter(model)
        assert lam(model, "b").is_inference()
        with randlora.serving.routed(model, NAMES):
            model(x)
            lam(model, "b").mul_(-3)
            after = model(x)
        assert len(copies) == 3, "two of the first layer, which has such a parameter, one of the second"
        torch.testing.assert_close(after, alone(model, x))


def test_gradients_after_a_forward_without(model: nn.Module) -> None:
    randlora.activate(model, ["a", "b", "c"])
    randlora.set_trainable(model, ["a", "b", "c"])
    x = torch.randn(5, 16)
    with randlora.serving.routed(model, NAMES):
        with torch.no_grad():
            without = model(x)
        found = model(x)
        torch.testing.assert_close(found, without)
        found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))

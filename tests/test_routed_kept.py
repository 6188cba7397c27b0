"""Λ and Γ that a `routed` block keeps: copied once, and never used after the parameters have changed."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.serving.stacked import Stack
from tests.kit import fill

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
    """Record every copy that is made of Λ and Γ."""
    made: list[Stack] = []
    copied = Stack.of

    def recorded(*args: Any) -> Stack:
        made.append(copied(*args))
        return made[-1]

    monkeypatch.setattr(Stack, "of", recorded)
    return made


def expected(model: nn.Module, x: Tensor) -> Tensor:
    """Return what each adapter alone gives, from a copy of the model."""
    twin, rows = copy.deepcopy(model), []
    for row, name in enumerate(NAMES):
        if name is None:
            with randlora.disabled(twin):
                rows.append(twin(x)[row])
        else:
            randlora.activate(twin, name)
            rows.append(twin(x)[row])
    return torch.stack(rows)


def lam(model: nn.Module, name: str) -> nn.Parameter:
    return next(parameter for fqn, parameter in model.named_parameters() if fqn.endswith(f"lambda.{name}"))


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_values_are_copied_once_a_block(basis: str, copies: list[Stack]) -> None:
    model, x = adapted(basis), torch.randn(5, 16)
    with torch.no_grad():
        wanted = expected(model, x)
        for _ in range(2):
            copies.clear()
            with randlora.serving.routed(model, NAMES):
                for tokens in (x, x.unsqueeze(1).expand(5, 3, 16), x):
                    found = model(tokens)
                    torch.testing.assert_close(found if found.dim() == 2 else found[:, 1], wanted)
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


def other_data(model: nn.Module) -> None:
    lam(model, "b").data = lam(model, "b").data * -3


def other_data_twice(model: nn.Module) -> None:
    other = lam(model, "b").data * -3
    lam(model, "b").data = torch.zeros_like(other)
    gc.collect()
    lam(model, "b").data = other.clone()


def other_parameter(model: nn.Module) -> None:
    held: Any = model.get_submodule("0")
    parameters = next(part for name, part in held._modules.items() if name.endswith("lambda"))
    parameters["b"] = nn.Parameter(parameters["b"] * -3, requires_grad=False)


def by_a_state_dict(model: nn.Module) -> None:
    model.load_state_dict({
        name: value * -3 if name.endswith("lambda.b") else value for name, value in model.state_dict().items()
    })


def by_an_optimizer(model: nn.Module) -> None:
    parameter = lam(model, "b")
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5).step()


def other_dtype(model: nn.Module) -> None:
    model.half()
    model.float()


CHANGES: list[Callable[[nn.Module], None]] = [
    in_place, by_another_thread, in_inference_mode, other_data, other_data_twice, other_parameter, by_a_state_dict,
    by_an_optimizer, other_dtype,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_inside_of_the_block_is_seen(change: Any, mode: Any, model: nn.Module) -> None:
    x = torch.randn(5, 16)
    with randlora.serving.routed(model, NAMES):
        with mode():
            before = model(x).clone()
        change(model)
        with mode():
            after = model(x).clone()
    with torch.no_grad():
        torch.testing.assert_close(after, expected(model, x))
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
        torch.testing.assert_close(after, expected(model, x))


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


def test_copies_and_pickles_made_inside_leave_it(model: nn.Module, copies: list[Stack]) -> None:
    x, size = torch.randn(5, 16), len(pickle.dumps(model))
    with randlora.serving.routed(model, NAMES), torch.no_grad():
        model(x)
        assert len(pickle.dumps(model)) < size + 2000
        copy.deepcopy(model)
        model(x)
    assert len(copies) == 2

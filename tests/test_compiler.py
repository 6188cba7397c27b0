"""Tracers and modes of torch: whatever sees a model first leaves it as good as it was."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import randlora
from randlora.errors import AdapterError
from tests.kit import fill, same_bits, untouched
from tests.laws import assert_close, needs_export

every_basis = pytest.mark.parametrize("basis", ["dense", "block"])


def cold_model(basis: Any) -> nn.Sequential:
    """Make a filled model whose bases nothing has written out yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    randlora.inject(model, r=4, targets="all-linear", basis=basis)
    return fill(model)


def compile_in_inference_mode(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    return output.clone()


def compile_whole(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    return output


def export(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = torch.export.export(model, (x,)).module()(x)
    return output


def run_with_fake_tensors(model: nn.Module, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))
    output: Tensor = model(x)
    return output


@pytest.mark.medium
@pytest.mark.parametrize(
    ("see", "basis"),
    [
        (compile_whole, "dense"),
        (compile_in_inference_mode, "block"),
        pytest.param(export, "dense", marks=needs_export),
        (run_with_fake_tensors, "block"),
    ],
)
def test_a_tracer_that_comes_first_sees_the_right_values_and_spoils_none(
    see: Callable[[nn.Module, Tensor], Tensor], basis: str
) -> None:
    expected = cold_model(basis)(x := torch.randn(3, 8))
    model = cold_model(basis)
    assert_close(see(model, x).detach(), expected.detach(), torch.float32)
    assert same_bits(model(x), expected)
    model(x).sum().backward()
    assert model.get_parameter("0.randlora_lambda.default").grad is not None


@every_basis
def test_a_transform_that_comes_first_spoils_no_bases_for_the_next(basis: str) -> None:
    model = pickle.loads(pickle.dumps(cold_model(basis)))  # a pickle holds no bases that a seed brings back
    lam, x = model.get_parameter("0.randlora_lambda.default").detach(), torch.randn(3, 8)

    def loss(lam: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.randlora_lambda.default": lam}, (x,)).square().sum()  # type: ignore[no-any-return]

    second = torch.func.jacrev(torch.func.jacrev(loss))
    torch.testing.assert_close(second(lam), second(lam))
    assert model(x).requires_grad


@pytest.mark.medium
@pytest.mark.parametrize(
    ("basis", "dynamic", "most"), [("dense", None, 2), ("block", True, 1)], ids=["automatic", "dynamic"]
)
def test_the_number_of_tokens_is_no_condition_of_a_graph(basis: Any, dynamic: bool | None, most: int) -> None:
    """The first number is taken for a constant unless told otherwise; every other shares one graph.

    So do adapters of other bases, of which every tensor is a constant with a name of its own.
    """
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(24, 32))  # cheaper factored for few tokens and materialized for many
    for seed, name in enumerate(("one", "other")):
        randlora.inject(model, r=8, targets="all-linear", basis=basis, seed=seed, name=name)
        fill(model, name)
    randlora.activate(model, ["one", "other"])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    for tokens in (3, 16, 200, 5000):
        x = torch.randn(tokens, 24, requires_grad=True)
        found, expected = compiled(x), model(x)
        assert_close(found.detach(), expected.detach(), torch.float32)
        ours, theirs = (torch.autograd.grad(output.sum(), x)[0] for output in (found, expected))
        assert_close(ours, theirs, torch.float32)
    assert counter.frame_count == most


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # what torch.compile imports
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapper_is_not_adapted_under_the_names_it_gives(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    wrapped = wrap(model)
    with untouched(model), pytest.raises(AdapterError, match=r"call this on the wrapped model\.(_orig_mod|module)"):
        randlora.inject(wrapped, r=4)

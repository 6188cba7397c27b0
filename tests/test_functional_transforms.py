"""torch.func, forward-mode differentiation and the compiler on the operation itself."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vmap

from randlora.functional import Compute, Diagonals, adapted_linear
from randlora.functional.scratch import is_in_transform
from tests.pairs import Case, case, every_form

every_dense_form = pytest.mark.parametrize("form", ["dense", "block(2,4)"])  # the others are not used under transforms
every_way = pytest.mark.parametrize("compute", get_args(Compute))
every_shape = pytest.mark.parametrize("shape", [(9, 12), (12, 9)], ids=["down", "up"])

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def prepared(form: str, shape: tuple[int, int], compute: Compute) -> tuple[Loss, list[Tensor]]:
    """Make a loss of ``(x, weight, lam, gamma)``, and values for them."""
    made: Case = case(form, *shape, 4)

    def loss(x: Tensor, weight: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        diagonals = Diagonals(lam, gamma, 0.5)
        output = adapted_linear(x, made.pair, diagonals, weight=weight, compute=compute)
        return output.square().sum()

    x, weight = torch.randn(3, shape[1], dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    return loss, [x, weight, *made.diagonals[:2]]


def test_torch_says_whether_a_transform_is_active() -> None:
    """By a private name: see randlora/functional/scratch.py."""
    asked: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        asked.append(is_in_transform())
        return x.sum()

    for call in (vmap(ask), grad(ask), ask):
        call(torch.zeros(3, 1)[:, 0])
    assert asked == [True, True, False]


@every_dense_form
@every_way
@every_shape
@pytest.mark.parametrize("batched", [0, 1, 2, 3], ids=["x", "weight", "lam", "gamma"])
def test_gradients_of_a_batch_are_those_of_its_members(
    form: str, compute: Compute, shape: tuple[int, int], batched: int
) -> None:
    loss, values = prepared(form, shape, compute)
    values[batched] = torch.stack([values[batched], -values[batched], 2 * values[batched]])
    dims = tuple(0 if index == batched else None for index in range(4))
    found = vmap(grad(loss, (0, 1, 2, 3)), in_dims=dims)(*values)
    for member in range(3):
        x, weight, lam, gamma = (value[member] if index == batched else value for index, value in enumerate(values))
        for ours, expected in zip(found, grad(loss, (0, 1, 2, 3))(x, weight, lam, gamma), strict=True):
            torch.testing.assert_close(ours[member], expected)


@every_dense_form
@every_way
def test_the_transform_of_a_gradient_is_differentiated_too(form: str, compute: Compute) -> None:
    """Against autograd's second derivative, which finite differences hold."""
    loss, values = prepared(form, (9, 12), compute)
    x, weight, lam, gamma = values
    found = grad(lambda inner: grad(lambda lam: loss(x, weight, lam, gamma))(inner).square().sum())(lam)
    lam = lam.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x, weight, lam, gamma), lam, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), lam)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


@every_form
@every_way
@pytest.mark.parametrize("shape", [(9, 12), (12, 9), (24, 24)], ids=str)
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "update"])
def test_a_batch_of_gradients_is_led_back_at_once(
    form: str, compute: Compute, shape: tuple[int, int], has_weight: bool
) -> None:
    """``is_grads_batched`` and ``jacobian(vectorize=True)`` use the older of torch's two vmaps."""
    made, x = case(form, *shape, 4), torch.randn(3, shape[1], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        own = weight if has_weight else None
        part = adapted_linear(x, made.pair, Diagonals(lam, gamma, 0.5), weight=own, compute=compute)
        return part if has_weight else part + x @ weight.T

    leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, *made.diagonals[:2]))
    output, grads = run(*leaves), torch.randn(5, 3, shape[0], dtype=torch.float64)
    found = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    for member, grad_output in enumerate(grads):
        for ours, expected in zip(
            found, torch.autograd.grad(output, leaves, grad_output, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(ours[member], expected)
    one_by_one = torch.autograd.functional.jacobian(run, leaves)
    for ours, expected in zip(torch.autograd.functional.jacobian(run, leaves, vectorize=True), one_by_one, strict=True):
        torch.testing.assert_close(ours, expected)


in_forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own import


@in_forward_mode
def test_forward_mode_is_refused_where_the_operation_is_autograds() -> None:
    loss, (x, weight, lam, gamma) = prepared("dense", (9, 12), "auto")
    x.requires_grad_()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        loss(x, weight, forward_ad.make_dual(lam, lam), gamma)


@in_forward_mode
def test_forward_mode_is_right_where_no_gradient_is_wanted() -> None:
    """The parts of the operation know it."""
    loss, (x, weight, lam, gamma) = prepared("dense", (9, 12), "auto")
    x.requires_grad_(False)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(x, weight, forward_ad.make_dual(lam, lam), gamma)).tangent
    (expected,) = torch.autograd.grad(loss(x, weight, lam.requires_grad_(), gamma), lam)
    torch.testing.assert_close(tangent, (expected * lam.detach()).sum())


@pytest.mark.medium
@every_dense_form
@every_way
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # what torch.compile imports
def test_the_compiler_makes_one_graph_of_it(form: str, compute: Compute) -> None:
    loss, values = prepared(form, (9, 12), compute)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [value.clone().requires_grad_() for value in values]
    torch._dynamo.reset()
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for ours, expected in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(ours, expected)

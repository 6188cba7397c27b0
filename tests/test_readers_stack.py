"""An adapted stack as an operand: no gradient is lost, and torch's ways of calling a function all work."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.layers.scopes import in_call
from randlora.readers.adapted_stack import AdaptedStack, Parts
from tests.kit import fill, untouched


@pytest.fixture(autouse=True)
def _in_a_call() -> Iterator[None]:
    """Have every test read the stack as code in a forward does."""
    with in_call():
        yield


EXPERTS, OUT, IN = 4, 6, 8
each_or_shared = pytest.mark.parametrize("experts", ["each", "shared"])


class Stack(nn.Module):
    """Holds a stack under a name of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, OUT, IN, generator=torch.Generator().manual_seed(0)))


class Product(torch.autograd.Function):
    """A product that torch does not ask `__torch_function__` about."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.reshape(-1, IN).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.reshape(-1, IN), (grad.mT @ x).view(weight.shape)


PRODUCT: Callable[[Tensor, Tensor], Tensor] = Product.apply


def adapted(experts: Any = "each") -> Any:
    model = nn.Sequential()
    model.mlp = Stack()
    randlora.inject(model, r=3, targets=["mlp.up_proj"], experts=experts)
    return fill(model)


def gradients(model: nn.Module, output: Tensor) -> tuple[Tensor, ...]:
    loss = (output * torch.arange(1.0, output.numel() + 1).view(output.shape)).sum()
    return torch.autograd.grad(loss, tuple(randlora.trainable_parameters(model)))


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


OPAQUE: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor], Tensor]]] = {
    "function": (PRODUCT, lambda whole: whole.flatten(0, 1)),
    "of a matrix": (lambda x, stack: PRODUCT(x, stack[1]), lambda whole: whole[1]),
    "checkpoint": (
        lambda x, stack: checkpoint(lambda x, stack: x @ stack[0].mT, x, stack, use_reentrant=True),
        lambda whole: whole[0],
    ),
}


@each_or_shared
@pytest.mark.parametrize("name", OPAQUE)
def test_a_gradient_that_would_not_reach_the_adapters_is_an_error_and_that_of_a_clone_reaches_them(
    name: str, experts: str
) -> None:
    model, x = adapted(experts), tokens(3, IN).requires_grad_()
    run, used = OPAQUE[name]
    with pytest.raises(RuntimeError, match=r"cannot reach its adapters.*Pass its \.clone\(\) instead"):
        run(x, model.mlp.up_proj).sum().backward()
    trained = [*randlora.trainable_parameters(model)]
    assert all(parameter.grad is None for parameter in trained)
    run(x, model.mlp.up_proj.clone()).sum().backward()
    expected = torch.autograd.grad((x @ used(model.mlp.up_proj + 0).mT).sum(), trained)
    torch.testing.assert_close([parameter.grad for parameter in trained], [*expected])


def test_a_stack_requires_a_gradient_where_its_sum_does() -> None:
    model = adapted()
    stack = model.mlp.up_proj
    assert stack.requires_grad
    assert stack[0].requires_grad
    assert stack.mT.requires_grad
    with torch.no_grad():
        assert not model.mlp.up_proj.requires_grad
    randlora.set_trainable(model, "default", trainable=False)
    assert not model.mlp.up_proj.requires_grad


def test_other_checkpointing_and_what_needs_no_gradient_work_with_the_stack_itself() -> None:
    model, x = adapted(), tokens(3, IN)
    expected = gradients(model, x @ model.mlp.up_proj[0].mT)
    found = gradients(model, checkpoint(lambda x, stack: x @ stack[0].mT, x, model.mlp.up_proj, use_reentrant=False))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        output = PRODUCT(x, model.mlp.up_proj)
        torch.testing.assert_close(output, x @ (model.mlp.up_proj + 0).flatten(0, 1).mT)
        assert torch.equal(copy.deepcopy(model.mlp.up_proj), model.mlp.up_proj + 0)


# Calls


x_of, tokens_of = tokens(3, IN), tokens(EXPERTS, 3, IN)
CALLS: dict[str, Callable[[Any], Tensor]] = {
    "linear-weight": lambda stack: F.linear(x_of, weight=stack[1]),
    "linear-input": lambda stack: F.linear(input=x_of, weight=stack[1], bias=torch.ones(OUT)),
    "linear-many": lambda stack: F.linear(tokens(60, IN), stack[1], torch.ones(OUT)),
    "matmul": lambda stack: torch.matmul(input=x_of, other=stack[1].mT),
    "matmul-other": lambda stack: x_of.matmul(other=stack[1].mT),
    "mm": lambda stack: torch.mm(x_of, mat2=stack[1].mT),
    "bmm": lambda stack: torch.bmm(tokens_of, mat2=stack.mT),
    "bmm-input": lambda stack: torch.bmm(input=tokens_of, mat2=stack.mT),
    "transpose": lambda stack: tokens_of.bmm(stack.transpose(dim0=1, dim1=2)),
    "transpose-input": lambda stack: tokens_of.bmm(torch.transpose(input=stack, dim0=1, dim1=2)),
    "t": lambda stack: x_of.mm(torch.t(input=stack[1])),
}


@each_or_shared
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_arguments_by_name_form_no_sum(
    call: Callable[[Any], Tensor], experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(experts)
    expected = call(model.mlp.up_proj + 0)
    monkeypatch.delattr(Parts, "formed")
    torch.testing.assert_close(call(model.mlp.up_proj), expected)


FORMED: dict[str, Callable[[Any], Any]] = {
    "out": lambda stack: torch.matmul(x_of, stack[1].mT, out=torch.empty(3, OUT)),
    "einsum": lambda stack: torch.einsum("ti,eoi->teo", x_of, stack),
    "left": lambda stack: torch.matmul(input=stack[1], other=x_of.mT),
    "copy_": lambda stack: torch.empty(EXPERTS, OUT, IN).copy_(stack),
    "add_": lambda stack: torch.zeros(EXPERTS, OUT, IN).add_(stack),
    "addmm_": lambda stack: torch.zeros(3, OUT).addmm_(x_of, stack[1].mT),
    "setitem": lambda stack: torch.zeros(2, EXPERTS, OUT, IN).index_copy_(0, torch.tensor([1]), stack[None]),
}


@torch.no_grad()
@pytest.mark.parametrize("call", FORMED.values(), ids=FORMED)
def test_other_calls_are_those_with_the_sum(call: Callable[[Any], Any]) -> None:
    model = adapted()
    torch.testing.assert_close(call(model.mlp.up_proj), call(model.mlp.up_proj + 0))


def test_unknown_arguments_are_torchs_own_errors() -> None:
    with pytest.raises(TypeError, match="linear"):
        F.linear(x_of, weights=adapted().mlp.up_proj[0])  # type: ignore[call-arg]


WRITES: dict[str, Callable[[Any], Any]] = {
    "__setitem__": lambda stack: stack.__setitem__(0, torch.zeros(OUT, IN)),
    "add_": lambda stack: stack.__iadd__(1),
    "zero_": lambda stack: stack.zero_(),
    "normal_": nn.init.normal_,
    "add": lambda stack: torch.add(torch.ones(EXPERTS, OUT, IN), 1, out=stack),
    "_foreach_add_": lambda stack: torch._foreach_add_([stack], 1),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "write"), WRITES.items(), ids=WRITES)
def test_writing_to_a_stack_is_refused(name: str, write: Callable[[Any], Any]) -> None:
    model = adapted()
    with untouched(model), pytest.raises(RuntimeError, match=f"cannot {name} an adapted stack of weights in place"):
        write(model.mlp.up_proj)


@each_or_shared
def test_matrices_at_no_index_are_an_empty_stack(experts: str) -> None:
    model = adapted(experts)
    none = model.mlp.up_proj[torch.tensor([], dtype=torch.int64)]
    assert none.shape == (0, OUT, IN)
    assert not isinstance(none, AdaptedStack)
    for gradient in gradients(model, none):
        assert not gradient.any()

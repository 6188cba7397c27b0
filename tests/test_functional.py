"""The operation, its rows and its stacks: values and gradients by the oracle, what they keep and what they cost."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils.flop_counter import FlopCounterMode

from randlora.functional import (
    Compute,
    DensePair,
    Diagonals,
    adapted_linear,
    cost,
    delta_weight,
    operation,
    scratch,
    update_rows,
)
from randlora.functional.cost import ON_CPU, ON_GPU, SMALL_WEIGHT, Sizes, Way, backward_ways, forward_way
from randlora.functional.operation import adapted
from randlora.functional.scratch import Observer, is_in_transform
from randlora.readers.adapted_stack import chosen_all_at_once, summed_linear
from tests import reference
from tests.further import further
from tests.kit import same_bits
from tests.pairs import Case, case, every_form
from tests.strategies import ranks, sides

Shape = tuple[int, int]
Loss = Callable[..., Tensor]
Derivative = Callable[[Loss, list[Tensor], int], Tensor]
every_way = pytest.mark.parametrize("compute", get_args(Compute))
every_shape = pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)], ids=["square", "down", "up"])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def oracle(made: Case, in_features: int, lam: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    own_lam, own_gamma, scaling = made.diagonals
    lam, gamma = own_lam if lam is None else lam, own_gamma if gamma is None else gamma
    return reference.delta_weight(made.basis_A, made.basis_B, lam, gamma, scaling, in_features=in_features)


@every_form
@every_way
@given(
    out=sides, into=sides, r=ranks, tokens=st.integers(0, 40), turned=st.booleans(),
    ids=st.lists(st.integers(0, 39), max_size=12), dtype=st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_output_update_and_rows_are_those_of_the_oracle(
    form: str, compute: Compute, out: int, into: int, r: int, tokens: int, turned: bool, ids: list[int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    made, x, weight, bias = case(form, out, into, r), random(tokens, into), random(out, into), random(out)
    weight = weight.T.contiguous().T if turned else weight
    update, before, is_wide = oracle(made, into), weight.clone(), into <= out
    found = adapted_linear(x, made.pair, made.diagonals, weight=weight, bias=bias, compute=compute)
    torch.testing.assert_close(found, x @ (weight + update).T + bias)
    torch.testing.assert_close(adapted_linear(x, made.pair, made.diagonals, compute=compute), x @ update.T)
    assert torch.equal(weight, before)
    torch.testing.assert_close(delta_weight(made.pair, made.diagonals, is_wide=is_wide), update)
    lam, gamma = (random(3, *part.shape) for part in made.diagonals[:2])
    stack = delta_weight(made.pair, Diagonals(lam, gamma, 0.7), is_wide=is_wide)
    torch.testing.assert_close(stack, torch.stack([oracle(made, into, *each) for each in zip(lam, gamma, strict=True)]))
    chosen = torch.tensor(ids, dtype=dtype) % out
    found = update_rows(chosen, made.pair, made.diagonals, num_rows=out, is_wide=is_wide)
    assert found.shape == (len(ids), into)
    torch.testing.assert_close(found, update[chosen.long()])


def test_in_bfloat16_the_sum_of_weight_and_update_is_rounded_once() -> None:
    made = case("dense", 64, 48, 8)
    pair = DensePair(made.pair.A.float(), made.pair.B.to(torch.bfloat16))
    weight = torch.randn(64, 48).to(torch.bfloat16)
    layer = adapted(weight, pair, made.diagonals.lam, made.diagonals.gamma, 1e-2, is_wide=True)
    scaled_A = pair.scaled_A(layer.lam, layer.gamma)  # the scaling is in Λ here
    exact = weight.double() + pair.B.double() @ scaled_A.double()
    twice = weight + (pair.B @ scaled_A)
    is_right = [(found == exact.to(torch.bfloat16)).double().mean().item() for found in (layer.total(), twice)]
    assert is_right[0] > 0.995
    assert is_right[1] < is_right[0]


@pytest.mark.product
@every_form
@every_way
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 6)], ids=str)
def test_gradients_are_those_of_finite_differences_once_and_twice(form: str, compute: Compute, shape: Shape) -> None:
    made, is_wide = case(form, *shape, 3), shape[1] <= shape[0]
    x, weight, bias, scaling = random(2, shape[1]), random(*shape), random(shape[0]), made.diagonals.scaling
    leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, bias, *made.diagonals[:2]))
    stacked = tuple(random(2, *part.shape).requires_grad_() for part in leaves[3:])

    def run(x: Tensor, weight: Tensor, bias: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        diagonals = Diagonals(lam, gamma, scaling)
        return adapted_linear(x, made.pair, diagonals, weight=weight, bias=bias, compute=compute)

    def update(lam: Tensor, gamma: Tensor) -> Tensor:
        return delta_weight(made.pair, Diagonals(lam, gamma, scaling), is_wide=is_wide)

    def rows(lam: Tensor, gamma: Tensor, ids: Any = ((0, 3), (3, 3))) -> Tensor:
        chosen = torch.tensor(ids) % shape[0]
        return update_rows(chosen, made.pair, Diagonals(lam, gamma, scaling), num_rows=shape[0], is_wide=is_wide)

    checked: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [(run, leaves)]
    if compute == "auto":
        assert rows(*leaves[3:]).shape == (2, 2, shape[1])
        assert torch.autograd.gradcheck(partial(rows, ids=[5] * 50), leaves[3:], fast_mode=True)
        assert torch.autograd.gradcheck(rows, leaves[3:], fast_mode=True)
        checked += [(update, leaves[3:]), (update, stacked)]
    for function, inputs in checked:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *leaves: function(*leaves).square(), inputs, fast_mode=True)  # noqa: B023


@every_form
def test_autocast_does_not_reach_into_the_rows(form: str) -> None:
    made, found = case(form, 40, 8, 4), []
    trained = [value.float().requires_grad_() for value in made.diagonals[:2]]
    pair: Any = type(made.pair)(made.pair.A.float(), made.pair.B.float(), *made.pair.other_arguments)
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rows = update_rows(
                torch.tensor([5, 0] * 25), pair, Diagonals(trained[0], trained[1], 0.7), num_rows=40, is_wide=True
            )
            found.append((rows, *torch.autograd.grad(rows.sum(), trained)))
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@every_form
@pytest.mark.parametrize("shape", [(24, 24), (23, 39), (39, 23)], ids=str)
def test_few_tokens_go_through_without_the_basis(form: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """In backward by layers of 256 and more: the further operators cost smaller ones more than they spare."""
    monkeypatch.setattr(cost, "MORE_OPERATORS", 0)
    made, x, weight = case(form, *shape, 8), random(1, shape[1]), random(*shape)
    chosen = Sizes(1, made.pair.shape, shape[1] == min(shape), has_weight=True)
    assert forward_way(chosen) == "few_tokens"
    assert backward_ways(chosen, **BOTH) == ("few_tokens", "few_tokens")

    def run(x: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        return adapted_linear(x, made.pair, Diagonals(lam, gamma, 0.7), weight=weight)

    lam, gamma = made.diagonals[:2]
    torch.testing.assert_close(run(x, lam, gamma), x @ (weight + oracle(made, shape[1])).T)
    for needs_input in (True, False):
        leaves = x.requires_grad_(needs_input), lam.requires_grad_(), gamma.requires_grad_()
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_gradients_through_the_sum_of_a_weight_and_an_update() -> None:
    for trained in ((1,), (2, 3), (0,), (0, 1, 2, 3)):
        shapes = (2, 3, 5), (4, 5), (4, 5), (4,)
        leaves = [random(*shape).requires_grad_(at in trained) for at, shape in enumerate(shapes)]
        assert torch.autograd.gradcheck(summed_linear, leaves)


# Transforms of torch.func, which the operation knows by a private name: see randlora/functional/scratch.py


def prepared(form: str, shape: Shape, compute: Compute) -> tuple[Callable[..., Tensor], list[Tensor]]:
    made = case(form, *shape, 4)

    def loss(x: Tensor, weight: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        output = adapted_linear(x, made.pair, Diagonals(lam, gamma, 0.5), weight=weight, compute=compute)
        return output.square().sum()

    return loss, [random(3, shape[1]), random(*shape), *made.diagonals[:2]]


@pytest.mark.parametrize("form", ["dense", "block(2,4)"])
@every_way
def test_transforms_of_gradients_are_those_of_each_member_and_differentiated_too(form: str, compute: Compute) -> None:
    for batched in range(4):
        loss, values = prepared(form, (9, 12) if batched % 2 else (12, 9), compute)
        values[batched] = torch.stack([values[batched], -values[batched], 2 * values[batched]])
        asked: list[bool] = []

        def watched(*values: Tensor, loss: Any = loss, asked: list[bool] = asked) -> Any:
            asked.append(is_in_transform())
            return loss(*values)

        in_dims = tuple(0 if at == batched else None for at in range(4))
        found = vmap(grad(watched, (0, 1, 2, 3)), in_dims=in_dims)(*values)
        assert (asked, is_in_transform()) == ([True], False)
        for member in range(3):
            own = [value[member] if index == batched else value for index, value in enumerate(values)]
            for ours, wanted in zip(found, grad(loss, (0, 1, 2, 3))(*own), strict=True):
                torch.testing.assert_close(ours[member], wanted)
    loss, (x, weight, lam, gamma) = prepared(form, (9, 12), compute)
    second = grad(lambda inner: grad(lambda lam: loss(x, weight, lam, gamma))(inner).square().sum())(lam)
    lam = lam.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x, weight, lam, gamma), lam, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), lam)  # which finite differences hold
    assert expected.abs().sum() > 0
    torch.testing.assert_close(second, expected)


@every_form
@every_way
def test_a_batch_of_gradients_is_led_back_at_once(form: str, compute: Compute) -> None:
    """``is_grads_batched`` uses the older of torch's two vmaps."""
    for shape, has_weight in (((9, 12), True), ((12, 9), False)):
        made, x, weight = case(form, *shape, 4), random(3, shape[1]), random(*shape)
        leaves = tuple(tensor.requires_grad_() for tensor in (x, weight, *made.diagonals[:2]))
        output = adapted_linear(x, made.pair, made.diagonals, weight=weight if has_weight else None, compute=compute)
        output = output if has_weight else output + x @ weight.T
        grads = random(5, *output.shape)
        found = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
        for member, grad_output in enumerate(grads):
            expected = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
            torch.testing.assert_close(tuple(ours[member] for ours in found), expected)


def tangents(values: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value.sin() for value in values)


def by_duals(loss: Loss, values: list[Tensor], at: int) -> Tensor:
    """Return the tangent for that of one value, while every value also requires a gradient."""
    with forward_ad.dual_level():
        duals = [value.clone().requires_grad_() for value in values]
        duals[at] = forward_ad.make_dual(duals[at], values[at].sin())
        tangent: Tensor = forward_ad.unpack_dual(loss(*duals)).tangent.detach()
        return tangent


def directional(loss: Loss, values: list[Tensor], at: int) -> Tensor:
    gradient: Tensor = grad(loss, at)(*values)
    return (gradient * values[at].sin()).sum()


def along(transform: Callable[..., Any]) -> Derivative:

    def derivative(loss: Loss, values: list[Tensor], at: int) -> Tensor:
        found: Tensor = transform(lambda value: loss(*values[:at], value, *values[at + 1 :]), values[at])
        return found

    return derivative


FORWARD: dict[str, tuple[Derivative, Derivative]] = {
    "dual numbers": (by_duals, directional),
    "jvp without gradients": (
        along(lambda f, value: torch.no_grad()(jvp)(f, (value,), (value.sin(),))[1]),
        directional,
    ),
    "jvp of all": (
        lambda loss, values, _: jvp(loss, (*values,), tangents(values))[1],
        lambda loss, values, _: sum((directional(loss, values, at) for at in range(4)), torch.zeros(())),
    ),
    "linearize": (along(lambda f, value: linearize(f, value)[1](value.sin())), directional),
    "hessian": (along(lambda f, value: hessian(f)(value)), along(lambda f, value: jacrev(jacrev(f))(value))),
    "jacfwd twice": (along(lambda f, value: jacfwd(jacfwd(f))(value)), along(lambda f, value: hessian(f)(value))),
    "jacrev of jacfwd": (along(lambda f, value: jacrev(jacfwd(f))(value)), along(lambda f, value: hessian(f)(value))),
    "across": (
        lambda loss, values, at: jacfwd(jacrev(loss, at), (at + 1) % 4)(*values),
        lambda loss, values, at: jacrev(jacrev(loss, at), (at + 1) % 4)(*values),
    ),
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of linearize about its own graph
@pytest.mark.parametrize("form", ["dense", "block(2,4)", further("block(3,1)"), further("block(1,2)")])
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_agrees_with_reverse_mode_in_every_nesting(form: str, transform: str) -> None:
    forward, reverse = FORWARD[transform]
    for shape, compute in zip(((9, 12), (12, 9), (12, 12)), get_args(Compute), strict=True):
        loss, values = prepared(form, shape, compute)
        for at in range(4):
            expected = reverse(loss, values, at)
            assert expected.abs().max() > 0
            torch.testing.assert_close(forward(loss, values, at), expected)


def kept_by(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return run(), kept


def storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def trained(form: str, shape: Shape, tokens: int) -> tuple[Case, Tensor, Tensor]:
    made = case(form, *shape, 4)
    for tensor in made.diagonals[:2]:
        tensor.requires_grad_()
    return made, random(tokens, shape[1]).requires_grad_(), random(*shape)


class Watch(Observer):
    """Notes the largest tensor that operations make, and how many compute or copy.

    Of matrices of a shape that are multiplied into new memory, it notes which of some tensors live meanwhile.
    """

    def __init__(self, shape: Shape = (0, 0)) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries, self.kernels = 0, 0
        self.shape, self.products, self.living = shape, 0, 0
        self.written: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(alias.alias_info is not None and not alias.alias_info.is_write for alias in func._schema.returns)
        self.kernels += not (is_view or func is torch.ops.aten._unsafe_view.default)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor._is_view():
                self.entries = max(self.entries, tensor.numel())
        if func is torch.ops.aten.mm.default and result.shape == self.shape:
            self.products += 1
            self.living += sum(reference() is not None for reference in self.written)
        return result


@pytest.mark.product
@every_form
@every_way
@every_shape
@pytest.mark.parametrize("tokens", [1, 100])
def test_backward_keeps_inputs_and_makes_nothing_larger(form: str, compute: Compute, shape: Shape, tokens: int) -> None:
    made, x, weight = trained(form, shape, tokens)
    given = storages((x, weight, *made.diagonals[:2]))
    with Watch() as watch:
        run = partial(adapted_linear, x, made.pair, made.diagonals, weight=weight, compute=compute)
        output, kept = kept_by(run)
        output.sum().backward()
    assert storages(kept) == given
    if form != "block(3,1)":  # whose blocks are filled up to a multiple of three
        assert watch.entries <= max(weight.numel(), tokens * max(shape))


@every_form
def test_of_updates_and_rows_the_diagonals_and_indices_alone_are_kept_and_nothing_without_gradients(form: str) -> None:
    made, x, weight = trained(form, (24, 24), 7)
    run, diagonals = partial(adapted_linear, x, made.pair, made.diagonals, weight=weight), made.diagonals[:2]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert kept_by(run)[1] == []
    kept = kept_by(lambda: delta_weight(made.pair, made.diagonals, is_wide=True))[1]
    assert storages(kept) == storages(diagonals)
    for alone in (weight, *diagonals, x):
        for each in (weight, *diagonals, x):
            each.requires_grad_(each is alone)
        kept = kept_by(run)[1]
        assert storages(kept) <= storages((x, weight, *diagonals))
    assert not storages([x]) & storages(kept)
    table, ids = trained(form, (400, 8), 1)[0], torch.tensor([[7, 399, 7], [0, 12, 7]])
    with Watch() as before:
        rows, kept = kept_by(lambda: update_rows(ids, table.pair, table.diagonals, num_rows=400, is_wide=True))
    with Watch() as backward:
        rows.sum().backward()
    assert all(0 < watch.entries < 400 for watch in (before, backward)), "a tensor of the size of the table"
    given = storages(table.diagonals[:2])
    assert given <= storages(kept) <= given | storages(tensor for tensor in kept if not tensor.is_floating_point())


@pytest.mark.parametrize("form", ["dense", "block(2,4)"])
@every_way
@every_shape
def test_a_weight_written_out_is_gone_before_its_gradient_comes(form: str, compute: Compute, shape: Shape) -> None:
    made, x, weight = trained(form, shape, 200)

    def write_out(dtype: torch.dtype) -> Tensor:
        written = weight.to(dtype, copy=True)
        watch.written.append(weakref.ref(written))
        return written

    with Watch(shape) as watch:
        adapted_linear(x, made.pair, made.diagonals, weight=write_out, compute=compute).sum().backward()
    assert len(watch.written) == 2
    assert watch.products > 0 or compute != "materialized"
    assert watch.living == 0
    if form == "dense":  # whose update is added to what was written out, in place
        with torch.no_grad():
            written, update = weight.clone(), delta_weight(made.pair, made.diagonals, is_wide=shape[1] == min(shape))
            adapted_linear(x, made.pair, made.diagonals, weight=lambda _: written, compute="materialized")
        torch.testing.assert_close(written, weight + update)


@every_way
def test_a_merge_between_forward_and_backward_changes_no_gradient(compute: Compute) -> None:
    made, x, weight = trained("dense", (24, 40), 7)
    held = nn.Parameter(weight.clone(), requires_grad=False)
    output = adapted_linear(x, made.pair, made.diagonals, weight=held, compute=compute)
    held.data = held.data + 1
    (found,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(found, (weight + oracle(made, 40)).sum(0).expand_as(x))


PASS, FORMED = 2 * 10 * 32 * 32, 2 * 32**3  # of ten tokens through a weight, and of the bases to an update
PRODUCTS: list[tuple[str, Compute, Shape, str, float]] = [
    # base twice, each factor in forward, input gradient and that of Λ and Γ: 6 less the one shared
    ("dense", "factored", (32, 32), "all", PASS * (2 + 5)),
    # forward, input gradient, weight gradient; the update twice and its gradient
    ("dense", "materialized", (32, 32), "all", PASS * 3 + FORMED * 3),
    ("block(2,4)", "factored", (32, 32), "all", PASS * (2 + 3 / 2 + 2 / 4)),
    ("block(2,4)", "materialized", (32, 32), "all", PASS * 3 + FORMED * 3 / 8),
    # without a weight: two products in forward, two for the input, two for Λ and Γ
    *(("dense", "factored", (20, 28), needs, 2 * 10 * 20 * (20 + 28) * 2) for needs in ("input", "diagonals")),
    *(("dense", "factored", (28, 20), needs, 2 * 10 * 20 * (20 + 28) * 2) for needs in ("input", "diagonals")),
]


@pytest.mark.parametrize(("form", "compute", "shape", "needs", "expected"), PRODUCTS)
def test_a_step_makes_these_products(form: str, compute: Compute, shape: Shape, needs: str, expected: float) -> None:
    made, x, weight = trained(form, shape, 10)
    for tensor in (x,) if needs == "diagonals" else made.diagonals[:2] if needs == "input" else ():
        tensor.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        base = weight if needs == "all" else None
        adapted_linear(x, made.pair, made.diagonals, weight=base, compute=compute).sum().backward()
    assert counter.get_total_flops() == expected
    assert [each.grad is not None for each in (x, made.diagonals.lam)] == [needs != "diagonals", needs != "input"]


@every_shape
def test_gradients_summed_over_strips_are_those_of_all_tokens(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x, weight = trained("block(2,4)", shape, 1000)
    found, kernels = [], []
    for entries in (1, 2**20):
        monkeypatch.setattr(scratch, "CACHED_ENTRIES", entries)
        output = adapted_linear(x.detach(), made.pair, made.diagonals, weight=weight, compute="factored")
        with Watch() as watch:
            found.append(torch.autograd.grad(output.sin().sum(), made.diagonals[:2]))
        kernels.append(watch.kernels)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert 500 > kernels[0] > kernels[1], "strips of a few tokens would cost more than they save"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("leading", [(), (3,)], ids=["dense", "block"])
def test_strips_make_equal_bits(dtype: torch.dtype, leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, num_bases, columns = 7, 5, 40
    A, lam = (torch.randn(*leading, rows, *shape) for shape in ((1, columns), (num_bases, 1)))
    gamma = torch.randn(*(leading and (*leading, 1)), num_bases, columns)
    upstream = torch.randn(*leading, rows, num_bases, columns).to(dtype)
    row = num_bases * columns * len(torch.empty(leading).flatten())
    found, largest = [], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for entries in (2**20, 2 * row, 1):
        monkeypatch.setattr(scratch, "ENTRIES_PER_THREAD", entries)
        used = upstream.clone()
        with torch.no_grad(), Watch() as build:
            basis = scratch.scaled_basis(A, lam, gamma, dtype)
        with torch.no_grad(), Watch() as sums:
            found.append((basis, *scratch.diagonal_gradients(used, A, lam, gamma)))
        largest.append((build.entries, sums.entries))
    whole = rows * row
    assert largest[0] == (whole, whole)
    expected = (A * gamma * lam).to(dtype)
    for basis, *gradients in found:
        assert same_bits(basis, expected)
        for ours, alone in zip(gradients, found[0][1:], strict=True):
            torch.testing.assert_close(ours, alone)
    assert same_bits(found[0][1], found[2][1]), "of Λ no sum is split"
    # the result and, from an upstream gradient that is not overwritten, the products of a strip alone
    assert [sums for _, sums in largest[1:]] == [2 * row, row]


BLOCK = (1 / 4, 1 / 8, 1 / 32)


def sizes(
    tokens: int,
    into: int = 1024,
    out: int = 1024,
    shares: Any = (1.0,) * 3,
    *,
    has_weight: bool = True,
    entry: float = 40,
) -> Sizes:
    max_dim, min_dim = max(into, out), min(into, out)
    num_bases = -(-min_dim // 32)
    return Sizes(
        tokens, cost.Shape(max_dim, min_dim, 32 * num_bases, num_bases, shares, entry), into <= out, has_weight
    )


BOTH = {"needs_input": True, "needs_diagonals": True}
WAYS: list[tuple[Sizes, Way, tuple[Way, Way]]] = [
    (sizes(1), "few_tokens", ("few_tokens", "few_tokens")),
    (sizes(128), "factored", ("factored", "factored")),
    (sizes(8192), "materialized", ("materialized", "materialized")),
    (sizes(1, shares=BLOCK), "few_tokens", ("few_tokens", "few_tokens")),
    (sizes(128, shares=BLOCK), "factored", ("factored", "factored")),
    (sizes(8192, shares=BLOCK), "materialized", ("materialized", "factored")),
    (sizes(1, 128, 128), "few_tokens", ("factored", "factored")),  # of fewer operators
    (sizes(1, 256, 256), "few_tokens", ("few_tokens", "few_tokens")),
]


def test_layers_take_the_ways_that_were_measured_fastest() -> None:
    for found, forward, backward in WAYS:
        assert (forward_way(found), backward_ways(found, **BOTH)) == (forward, backward), found
    assert forward_way(sizes(900)) == "materialized"
    assert forward_way(sizes(900, has_weight=False)) == "factored"
    assert forward_way(sizes(1400, has_weight=False)) == "materialized"
    cheap, dear = (sizes(600, shares=BLOCK, entry=entry) for entry in (40, 400))
    assert (forward_way(cheap), forward_way(dear)) == ("materialized", "factored")
    for needs_weight, way in ((False, "factored"), (True, "materialized")):  # which is not paid for again
        asked = {"needs_input": False, "needs_diagonals": True, "needs_weight": needs_weight}
        assert backward_ways(sizes(800), **asked)[1] == way
    passes = [("cpu", torch.bfloat16, ON_CPU), ("xpu", torch.float8_e4m3fn, ON_GPU[torch.float32])]
    assert all(cost.pass_over(device, dtype) == entry for device, dtype, entry in passes)
    assert cost.pass_over("cuda", torch.bfloat16) > cost.pass_over("cuda", torch.float32)
    expert = case("dense", 256, 256, 32).pair
    together = [chosen_all_at_once([each] * 2, expert.shape, is_wide=True, compute="auto") for each in (12, 13)]
    assert together == [True, False], "of a few tokens each"
    assert not chosen_all_at_once([12] * 2, expert.shape, is_wide=True, compute="factored"), "it was asked for"
    square: Any = case("block(2,4)", 256, 256, 32).pair
    small: Any = case("block(2,4)", 512, 512, 32).pair
    for pair in (square, small):
        pair.written = pair.write_out()
    assert small.max_dim * small.min_dim == SMALL_WEIGHT
    used: list[tuple[Any, Any]] = [(square, 16), (square, 17), (small, 4), (square, 1.0)]
    is_dense = [isinstance(operation._pair(pair, None, None, (), tokens, "auto"), DensePair) for pair, tokens in used]
    assert is_dense == [True, False, True, False]


@given(
    shape=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    tokens=st.integers(0, 100_000),
    shares=st.sampled_from([(1.0, 1.0, 1.0), BLOCK]),
)
def test_few_tokens_take_little_room_and_more_are_materialized(shape: Shape, tokens: int, shares: Any) -> None:
    few, many = (sizes(count, *shape, shares) for count in (tokens, 2 * tokens + 1))
    assert forward_way(few) != "materialized" or forward_way(many) == "materialized"
    assert forward_way(few) != "few_tokens" or few.laid_out <= shape[0] * shape[1]

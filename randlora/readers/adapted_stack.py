"""A stack of weights with the updates of its adapters. Updates are formed only for the matrices that are used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora.functional import Compute, Pair, adapted_linear
from randlora.functional.cost import ALWAYS, Shape, Sizes
from randlora.functional.operation import AdaptedWeight, adapted, chosen_forward
from randlora.functional.scratch import in_dtype, without_autocast
from randlora.layers.base import autocast_dtype, is_plain_tensor, product_dtype
from randlora.layers.weight import Update, rounded_sum, sum_updates
from randlora.places import has_values

ENTRIES = 2**22
"""Entries of the tokens repeated for each term that are computed at once, but at least as many as in one weight."""
MATRIX_OPERATORS = 4 * 2**15
"""The cost of the operators for one more matrix in a stage, as entries that a pass reads in the same time."""
GATHERING_PASSES = 7
"""Further passes over the repeated tokens if each has its own Γ, which is gathered and whose gradient is summed.

Both were measured on a CPU: with 128 experts of 128 features, all at once is faster below 32 tokens an expert, with 32
experts of 512 features below 8.
"""


class Shared:
    """Updates that all matrices of a stack have in common. Their sum is formed at most once."""

    def __init__(self, updates: Iterable[Update]) -> None:
        """Take the updates."""
        self.updates = tuple(updates)
        self._formed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def formed(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the sum of the updates, ``(out, in)``."""
        if (device, dtype) not in self._formed:
            self._formed[device, dtype] = sum_updates(self.updates, (), device=device, dtype=dtype)
        return self._formed[device, dtype]

    def is_worth_forming(self, tokens: int, device: torch.device, dtype: torch.dtype, compute: Compute) -> bool:
        """Whether the product of one matrix with this many tokens is faster if the sum is formed."""
        if (device, dtype) in self._formed:
            return True
        pair, is_wide = self.updates[0].parts(device, dtype)[0], self.updates[0].is_wide
        return chosen_forward(tokens, pair, is_wide=is_wide, has_weight=True, compute=compute) == "materialized"


class Own:
    """Updates with a Λ and a Γ for each matrix of a stack, or the updates of one matrix."""

    def __init__(self, updates: Iterable[Update]) -> None:
        """Take the updates."""
        self.updates = tuple(updates)
        self._each: tuple[tuple[tuple[Tensor, ...], tuple[Tensor, ...]], ...] | None = None

    def at(self, index: Any) -> Own:
        """Return the updates of one matrix, or of the matrices at several indices.

        Λ and Γ are split once, because the gradient of each single index would be as large as the whole stack.
        """
        if not isinstance(index, int):
            parts: Iterable[tuple[Tensor, Tensor]] = ((each.lam[index], each.gamma[index]) for each in self.updates)
        else:
            if self._each is None:
                self._each = tuple((update.lam.unbind(), update.gamma.unbind()) for update in self.updates)
            parts = ((lams[index], gammas[index]) for lams, gammas in self._each)
        return Own(
            update._replace(lam=lam, gamma=gamma, shape=update.shape[-2:])
            for update, (lam, gamma) in zip(self.updates, parts, strict=True)
        )

    def are_faster_together(self, x: Tensor, counts: Sequence[int], compute: Compute) -> bool:
        """Whether `products` is faster than one matrix after the other, given the number of tokens of each matrix."""
        pairs = [update.parts(x.device, x.dtype)[0] for update in self.updates]
        is_wide = self.updates[0].is_wide
        return all(chosen_all_at_once(counts, pair.shape, is_wide=is_wide, compute=compute) for pair in pairs)

    def products(self, x: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
        """Yield the products of tokens, sorted by their matrix, with each update; to be called without autocast.

        The number of operators does not depend on the number of matrices. Only x, stacks of Λ and Γ and a reference to
        the bases are saved for backward. ``counts`` has the number of tokens of each matrix.
        """
        for update in self.updates:
            pair, (lam, gamma, scaling) = update.parts(x.device, x.dtype)
            groups = Groups(counts, pair, scaling, update.is_wide)
            yield _Grouped.apply(x, lam, gamma, groups)  # type: ignore[no-untyped-call]


class Parts(NamedTuple):
    """What an `AdaptedStack` is made of."""

    weight: Tensor  # without updates, ``(matrices, rows, columns)``, or one matrix of it
    is_out_in: bool  # whether rows are outputs and columns inputs; ``False`` for ``(in, out)``
    own: Own  # updates with a Λ and a Γ for each matrix
    shared: Shared  # updates that all matrices have in common
    compute: Compute

    @property
    def operands(self) -> list[Tensor]:
        """The tensors to which the sum may pass gradients on."""
        updates = (*self.own.updates, *self.shared.updates)
        return [self.weight, *(diagonal for update in updates for diagonal in (update.lam, update.gamma))]

    def turned(self) -> Parts:
        """Return the transposes of the matrices."""
        return self._replace(weight=self.weight.mT, is_out_in=not self.is_out_in)

    def at(self, index: Any) -> Parts:
        """Return one matrix, or the matrices at several indices."""
        if isinstance(index, Tensor) and index.dim() == 0:
            index = int(index)
        return self._replace(weight=self.weight[index], own=self.own.at(index))

    def formed(self) -> Tensor:
        """Return weight + updates, added in float32 or wider and rounded once, with the memory layout of the weight."""
        is_turned = self.weight.stride(-1) != 1
        stored = self.weight.mT if is_turned else self.weight
        dtype = torch.promote_types(stored.dtype, torch.float32)
        if self.own.updates:
            updates = (*self.own.updates, *self.shared.updates)
            delta = sum_updates(updates, (), device=stored.device, dtype=dtype)
        else:  # for all matrices at once
            delta = self.shared.formed(stored.device, dtype)
        total = rounded_sum(stored, delta if self.is_out_in is not is_turned else delta.mT)
        return total.mT if is_turned else total

    def multiplies(self, x: object) -> bool:
        """Whether `product` can multiply these tokens, ``(..., in)``, by one matrix."""
        if not isinstance(x, Tensor) or self.weight.dim() != 2 or x.dim() < 2:
            return False
        return product_dtype(x, self.weight, self.weight.shape[1 if self.is_out_in else 0]) is not None

    def product(self, x: Tensor, bias: Tensor | None = None, *, has_weight: bool = True) -> Tensor:
        """Return the product of tokens, ``(..., in)``, with one matrix, ``(..., out)``, or with its updates alone."""
        dtype = autocast_dtype(x, self.weight.dtype)
        weight = None if not has_weight else self.weight if self.is_out_in else self.weight.mT
        x, tokens = x.to(dtype), x.shape[:-1].numel()
        if not self.own.updates and self.shared.is_worth_forming(tokens, x.device, dtype, self.compute):
            delta = self.shared.formed(x.device, dtype)
            return F.linear(x, delta, bias) if weight is None else summed_linear(x, weight, delta, bias)
        first, *others = (*self.own.updates, *self.shared.updates)
        of_first = first.parts(x.device, dtype)
        product = partial(adapted_linear, x, compute=self.compute, is_wide=first.is_wide)
        output = product(*of_first, weight=weight, bias=bias)
        for other in others:
            output = output + product(*other.parts(x.device, dtype))
        return output


class AdaptedStack(Tensor):
    """A stack of weights with their updates, or one matrix of it, as a tensor without values.

    Products with one matrix and grouped products compute base and updates without forming their sum. For any other
    operation of torch the sum is formed. Computing a gradient of the stack itself raises an error.
    """

    parts: Parts

    @staticmethod
    def __new__(cls, parts: Parts) -> Self:
        """Create the tensor."""
        weight, operands = parts.weight, parts.operands if torch.is_grad_enabled() else []
        wrapper = partial(Tensor._make_wrapper_subclass, cls, weight.shape, strides=weight.stride())
        make = partial(wrapper, dtype=weight.dtype, device=weight.device)
        needs_grad = any(operand.requires_grad for operand in operands)
        made: Self = _Linked.apply(make, *operands) if needs_grad else make()  # type: ignore[no-untyped-call]
        made.parts = parts
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        is_in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        written = [next(iter((*args, *kwargs.values())))] if is_in_place else []
        if any(map(_has_stack, (*written, kwargs.get("out")))):
            raise RuntimeError(f"cannot {name} an adapted stack of weights in place: change the parameter instead")
        if name in GROUPED:
            result = _grouped(func, *args, **kwargs)
        else:
            compute, names = PRODUCTS.get(func, (None, ()))
            given = names[len(args) : len(args) + len(kwargs)]
            is_known = compute is not None and kwargs.keys() == {*given}
            result = compute(*args, *map(kwargs.get, given)) if compute and is_known else NotImplemented
        if result is not NotImplemented:
            return result
        return func(*map(_formed, args), **{name: _formed(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Raise an error: past `__torch_function__`, gradients would not reach the adapters."""
        raise RuntimeError(f"cannot compute {func} of an adapted stack of weights: call .clone() on it first")


class _Linked(torch.autograd.Function):
    """Connects an adapted stack with Λ and Γ, so that any gradient of the stack itself is noticed."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], *operands: Tensor) -> Tensor:  # noqa: ARG004
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(
            "the gradient of an adapted stack of weights cannot reach its adapters: it was passed to a "
            "torch.autograd.Function, or as an argument to checkpoint(use_reentrant=True). Pass its .clone() instead"
        )


def _has_stack(value: Any) -> bool:
    return isinstance(value, AdaptedStack) or (isinstance(value, list | tuple) and any(map(_has_stack, value)))


def _formed(value: Any) -> Any:
    if isinstance(value, AdaptedStack):
        return value.parts.formed()
    return type(value)(map(_formed, value)) if type(value) in (list, tuple) else value


def _select(stack: AdaptedStack, index: Any) -> Any:
    """Return one matrix, or the sums of several, each formed once."""
    if stack.dim() != 3 or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool):
        return AdaptedStack(stack.parts.at(index))
    if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64):
        if not has_values(index):  # values are not known, so neither is which occur
            return stack.parts.at(index).formed()
        which, places = index.unique(return_inverse=True)
        which = which if len(which) else index.new_zeros(1)  # none is visited: form any one
        return stack.parts.at(which).formed()[places]
    return NotImplemented


def _turn(stack: AdaptedStack, first: int = -2, second: int = -1) -> Any:
    dims = {dim % stack.dim() for dim in (first, second)}
    return AdaptedStack(stack.parts.turned()) if dims == {stack.dim() - 2, stack.dim() - 1} else NotImplemented


def _turn_matrix(stack: AdaptedStack) -> Any:
    return AdaptedStack(stack.parts.turned()) if stack.dim() == 2 else NotImplemented


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(matrix, AdaptedStack) and matrix.parts.is_out_in and matrix.parts.multiplies(x):
        return matrix.parts.product(x, bias)
    return NotImplemented


def _matmul(x: Tensor, matrix: Tensor) -> Any:
    if isinstance(matrix, AdaptedStack) and not matrix.parts.is_out_in and matrix.parts.multiplies(x):
        return matrix.parts.product(x)
    return NotImplemented


def _batched(x: Tensor, stack: Tensor) -> Any:
    """Return the products of the matrices ``(in, out)`` with the tokens of each, ``(matrices, tokens, in)``."""
    if not isinstance(stack, AdaptedStack) or stack.parts.is_out_in or not is_plain_tensor(x) or x.dim() != 3:
        return NotImplemented
    matrices = [stack.parts.at(index) for index in range(len(stack))]
    if len(x) != len(matrices) or not all(map(Parts.multiplies, matrices, x)):
        return NotImplemented
    base = torch.bmm(x, stack.parts.weight)
    updates = [matrix.product(rows, has_weight=False) for matrix, rows in zip(matrices, x, strict=True)]
    return base + torch.stack(updates)


def _grouped(
    func: Callable[..., Tensor], x: Any = None, stack: Any = None, /, offs: Any = None, *more: Any, **others: Any
) -> Any:
    """Return the products of tokens, ``(tokens, in)``, sorted by their matrix, with matrices ``(in, out)``.

    ``offs`` has the end of each matrix's tokens, and ``func`` computes the product with the base.
    """
    if not isinstance(stack, AdaptedStack) or stack.parts.is_out_in or stack.dim() != 3 or offs is None or more:
        return NotImplemented
    parts = stack.parts
    one = parts._replace(weight=parts.weight[0], own=Own(()))
    if x.dim() != 2 or not one.multiplies(x):
        return NotImplemented
    with without_autocast(x.device.type):  # as in the function itself
        x = x.to(parts.weight.dtype)
        if not parts.own.updates:
            return func(x, parts.weight, offs=offs, **others) + one.product(x, has_weight=False)
        counts = [end - start for start, end in itertools.pairwise([0, *offs.tolist(), len(x)])]
        *rows_of, rest = x.split(counts)  # the gradient of each single slice would be as large as x
        if parts.own.are_faster_together(x, counts[:-1], parts.compute):
            tokens = x[: len(x) - counts[-1]]
            changes = [*parts.own.products(tokens, counts[:-1])]
            changes += [one.product(tokens, has_weight=False)] if parts.shared.updates else []
            change = sum(changes[1:], changes[0])
        else:
            visited = ((parts.at(index), rows) for index, rows in enumerate(rows_of) if len(rows))
            change = torch.cat([
                x.new_empty(0, parts.weight.shape[-1]),
                *(part.product(rows, has_weight=False) for part, rows in visited),
            ])
        # the base is computed by the function itself, so that a fresh adapter changes no bit
        return func(x, parts.weight, offs=offs, **others) + F.pad(change, (0, 0, 0, len(rest)))


def chosen_all_at_once(counts: Sequence[int], shape: Shape, *, is_wide: bool, compute: Compute) -> bool:
    """Whether matrices of a stack, with these numbers of tokens, are computed together, without building ``UA``."""
    visited = len(counts) - counts.count(0)
    if compute != "auto" or not visited:
        return False
    sizes = Sizes(-(-sum(counts) // visited), shape, is_wide, has_weight=True)
    one_by_one = min(sizes.product(way) for way in ALWAYS) + shape.entry * MATRIX_OPERATORS
    return sizes.through_terms + GATHERING_PASSES * shape.entry * sizes.laid_out + sizes.through_B <= one_by_one


class Groups(NamedTuple):
    """Tokens sorted by the matrix of a stack that each belongs to, and what a product needs of the layer."""

    counts: Sequence[int]
    pair: Pair
    scaling: float
    is_wide: bool

    def parts(self, lam: Tensor, gamma: Tensor) -> Iterator[tuple[slice, Tensor, AdaptedWeight]]:
        """Yield slices of the tokens with the matrix of each token, and their updates with a Λ and a Γ for each."""
        shape, tokens = self.pair.shape, sum(self.counts)
        matrices = torch.arange(len(self.counts), device=lam.device)
        matrix_of = matrices.repeat_interleave(torch.tensor(self.counts, device=lam.device), output_size=tokens)
        at_once = max(1, max(ENTRIES, shape.max_dim * shape.min_dim) // (shape.num_bases * shape.min_dim))
        for start in range(0, tokens, at_once):
            part = slice(start, min(start + at_once, tokens))
            which = matrix_of[part]
            yield part, which, adapted(None, self.pair, lam[which], gamma[which], self.scaling, is_wide=self.is_wide)


class _Grouped(torch.autograd.Function):
    """The product of tokens with an update of the matrices that they belong to. Autograd would keep a Γ for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: Tensor, gamma: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, lam, gamma)
        ctx.groups = groups
        return torch.cat([updates.output(x[part], None, "few_tokens") for part, _, updates in groups.parts(lam, gamma)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gamma = ctx.saved_tensors
        needs_x, needs_lam, needs_gamma, _ = ctx.needs_input_grad
        grads_x, grad_lam, grad_gamma = [], torch.zeros_like(lam), torch.zeros_like(gamma)
        with without_autocast(grad.device.type):
            for part, which, updates in ctx.groups.parts(lam, gamma):
                x_part = x[part] if needs_lam or needs_gamma else None
                of_x, *of_both = updates.gradients_of_few_tokens(x_part, grad[part], needs_input=needs_x, sums=False)
                grads_x.append(of_x)
                for total, of_tokens in zip((grad_lam, grad_gamma), of_both, strict=True):
                    if of_tokens is not None:
                        total.index_add_(0, which, in_dtype(of_tokens, total.dtype))
        return torch.cat(grads_x) if needs_x else None, grad_lam, grad_gamma, None


def summed_linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ (weight + delta).T + bias`` in the dtype of x. The sum is not kept for backward."""
    rows = x.reshape(-1, x.shape[-1])
    with without_autocast(x.device.type):
        output: Tensor = _SummedLinear.apply(rows, weight, delta)  # type: ignore[no-untyped-call]
        output = output if bias is None else output + bias.to(output.dtype)
    return output.view(*x.shape[:-1], output.shape[1])


class _SummedLinear(torch.autograd.Function):
    """`summed_linear` of a matrix. Many weights may have one update, and plain autograd would keep a sum for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, delta)
        return F.linear(x, weight.to(x.dtype) + delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, delta = ctx.saved_tensors
        needs_x, needs_weight, needs_delta = ctx.needs_input_grad
        with without_autocast(grad.device.type):
            grad_x = grad @ (weight.to(x.dtype) + delta) if needs_x else None
            grad_sum = grad.T @ x if needs_weight or needs_delta else None
        grad_weight = grad_sum.to(weight.dtype) if needs_weight and grad_sum is not None else None
        return grad_x, grad_weight, grad_sum if needs_delta else None


PRODUCTS: Mapping[Any, tuple[Callable[..., Any], tuple[str, ...]]] = {
    Tensor.__getitem__: (_select, ()),
    **dict.fromkeys((Tensor.transpose, torch.transpose), (_turn, ("input", "dim0", "dim1"))),
    Tensor.mT.__get__: (_turn, ()),  # type: ignore[attr-defined]
    Tensor.T.__get__: (_turn_matrix, ()),  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.t, torch.t), (_turn_matrix, ("input",))),
    F.linear: (_linear, ("input", "weight", "bias")),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (_matmul, ("input", "other"))),
    **dict.fromkeys((torch.mm, Tensor.mm), (_matmul, ("input", "mat2"))),
    Tensor.__rmatmul__: (lambda matrix, x: _matmul(x, matrix), ()),
    **dict.fromkeys((torch.bmm, Tensor.bmm), (_batched, ("input", "mat2"))),
}
"""Functions of torch that are computed without forming the sum, with the names of their parameters."""

GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Names of grouped products. Not every torch has all of them, and the last is an operator of transformers."""

DESCRIPTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cuda", "is_leaf", "is_meta", "is_sparse")),
    *(getattr(Tensor, name).__get__ for name in ("layout", "ndim", "requires_grad", "shape", "itemsize", "nbytes")),
    *(getattr(Tensor, name) for name in ("__len__", "dim", "element_size", "is_complex", "is_contiguous")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "ndimension", "nelement", "numel", "size", "stride")),
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
}
"""Functions that describe a tensor and need no values."""

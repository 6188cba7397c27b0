"""Arithmetic on temporary tensors, in place if this is allowed, and the scaled basis UA = Λ·A·Γ with its gradients.

New memory is expensive: the system clears every page first, which can take longer than the arithmetic. UA has about
``min_dim²`` entries, so the passes over it are made strip by strip: some rows of A at a time, whose results stay in the
cache until the last pass over them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

# Private, but the only way to ask. Without it everything runs as under a mode, which is correct but slower;
# tests/test_modes.py fails if torch renames it.
count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
"""Return the number of active modes."""


class Observer(TorchDispatchMode):
    """A mode that keeps no results of operators, so that arithmetic in place can continue."""


def may_be_kept() -> bool:
    """Whether an active mode may keep results of operators, so that these must not be overwritten."""
    return count_modes() > 0 and not all(isinstance(mode, Observer) for mode in _get_current_dispatch_mode_stack())


without_modes = _disable_current_modes  # a context in which no mode is active, for tensors that must be real

# Private, but the only way to ask, and what torch's own `Function.apply` asks. Without it everything runs as under a
# transform, which is correct but slower; tests/test_functional.py fails if torch renames it.
is_in_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a `torch.func` transform is active."""

is_traced: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
"""Whether `torch.jit.trace` runs the code: what `torch.jit.is_tracing` asks, which takes five times as long."""


def is_forward_mode() -> bool:
    """Whether a block of forward-mode differentiation is open, as in `torch.func.jvp`, ``jacfwd`` and ``hessian``."""
    return getattr(forward_ad, "_current_level", -1) >= 0  # private, but the only way to ask; tested likewise


def is_in_backward() -> bool:
    """Whether this thread runs a backward, such as one of autograd's, which compute what is checkpointed again."""
    return torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether the code runs under a compiler, under `torch.jit.trace`, a `torch.func` transform or in forward mode."""
    return torch.compiler.is_compiling() or is_in_transform() or is_traced() or is_forward_mode()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is off. On the meta device, which has no autocast, it does nothing."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def may_overwrite() -> bool:
    """Whether temporary tensors may be overwritten.

    Not in compiled or traced code, not while autograd records, which may need the old values, not under `torch.func`
    transforms, where a batch cannot be written into an unbatched tensor, nor under a dispatch mode that may keep the
    results of operators, as selective activation checkpointing does.
    """
    return not (torch.is_grad_enabled() or is_transformed() or (count_modes() and may_be_kept()))


ENTRIES_PER_THREAD = 2**17
"""Entries of a strip of UA for each thread. Measured on a CPU: fewer cost more operators than they save memory."""

CACHED_ENTRIES = 2**20  # entries of a strip that fit into a CPU's cache together with the results computed from them


def may_be_in_strips(tensor: Tensor) -> bool:
    """Whether results can be written piece by piece, and whether that is faster: not on a GPU."""
    return tensor.device.type == "cpu" and may_overwrite()


def times(scratch: Tensor, factor: Tensor) -> Tensor:
    """Return ``scratch * factor``; ``scratch`` may be overwritten."""
    dtype = scratch.dtype
    fits = factor.dtype == dtype or torch.promote_types(dtype, factor.dtype) == dtype
    return scratch.mul_(factor) if fits and may_overwrite() else scratch * factor


def plus(scratch: Tensor | None, term: Tensor, factor: float) -> Tensor:
    """Return ``scratch + factor·term``, or ``factor·term`` for ``None``; both may be overwritten."""
    if scratch is None:
        return scaled(term, factor)
    if is_forward_mode():  # where torch.func.linearize crashes in an add() with alpha
        return scratch + term * factor
    return scratch.add_(term, alpha=factor) if may_overwrite() else torch.add(scratch, term, alpha=factor)


def plus_product(scratch: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """Return ``scratch + factor·left @ right`` of matrices or batches, rounded once; ``scratch`` may be overwritten."""
    is_batch = left.dim() == 3
    if scratch is None:
        return scaled(torch.bmm(left, right) if is_batch else left @ right, factor)
    if may_overwrite():
        return (scratch.baddbmm_ if is_batch else scratch.addmm_)(left, right, alpha=factor)
    return (torch.baddbmm if is_batch else torch.addmm)(scratch, left, right, alpha=factor)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return ``factor·tensor``; ``tensor`` may be overwritten."""
    if factor == 1:
        return tensor
    return tensor.mul_(factor) if may_overwrite() else tensor * factor


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype. If it has this dtype, it is returned without a call to torch."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _rows_at_once(A: Tensor, lam: Tensor) -> int:
    """Return how many rows of A a strip has; all of them if strips would not pay, or cannot be written."""
    rows, entries = A.size(-3), A.numel() * lam.size(-2)
    if entries <= ENTRIES_PER_THREAD or not may_be_in_strips(A):
        return rows
    strip = ENTRIES_PER_THREAD * torch.get_num_threads()  # which a compiler does not trace
    return min(rows, max(1, strip * rows // entries))


def scaled_basis(A: Tensor, lam: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``A·gamma·lam``, ``(..., rows, num_bases, columns)``, rounded once from the widest dtype of its factors.

    A is ``(..., rows, 1, columns)``, Λ ``(..., rows, num_bases, 1)``, and Γ ``(num_bases, columns)`` or broadcasts.
    """
    # without rounding there are two passes, and strips save nothing
    at_once = A.size(-3) if dtype.itemsize >= A.itemsize else _rows_at_once(A, lam)
    if at_once == A.size(-3):
        return in_dtype(times(A * gamma, lam), dtype)
    scaled = torch.empty(torch.broadcast_shapes(A.shape, lam.shape), dtype=dtype, device=A.device)
    for rows, lambdas, strip in zip(*(tensor.split(at_once, dim=-3) for tensor in (A, lam, scaled)), strict=True):
        strip.copy_(times(rows * gamma, lambdas))
    return scaled


def diagonal_gradients(grad: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of Λ and Γ from that of `scaled_basis` with the same A, Λ and Γ, which is overwritten."""
    if (at_once := _rows_at_once(A, lam)) == A.size(-3):
        return _diagonal_gradients(grad, A, lam, gamma)
    of_lam, of_gamma = [], None
    for part, rows, lambdas in zip(*(tensor.split(at_once, dim=-3) for tensor in (grad, A, lam)), strict=True):
        one, more = _diagonal_gradients(part, rows, lambdas, gamma)
        of_lam.append(one)
        of_gamma = more if of_gamma is None else of_gamma.add_(more)
    assert of_gamma is not None, "A has rows"
    return torch.cat(of_lam, dim=-2), of_gamma


def _diagonal_gradients(grad: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    product = times(grad, A)
    return (product * gamma).sum(-1), times(product, lam).sum(-3)

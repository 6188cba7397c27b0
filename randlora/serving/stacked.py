"""The updates of several adapters on the same bases, each multiplied by its own tokens: together, or in turn.

Λ and Γ of all adapters are in one tensor each, so that work in Python does not grow with their number. In all shapes
here, c is the number of blocks of A, R = r/c the rows of a block, n = num_bases, and w the columns of a block. Dense
bases are one block.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.functional import Diagonals, Pair, scratch
from randlora.functional.cost import Compute
from randlora.functional.operation import adapted_linear, chosen_forward
from randlora.functional.scratch import in_dtype, may_be_kept
from randlora.layers.diagonals import Diagonal, Values
from randlora.places import is_hooked
from randlora.state import SiteAdapter

Way = Literal["whole", "by row"]
"""How to multiply T tokens of an adapter by A and Γ. What is written for it decides which is the cheapest:

- *whole*: UA without Λ, ``r·num_bases·min_dim`` entries;
- *by row*: the tokens repeated for each row of A, ``T·r·min_dim``.
"""

AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""Entries that are written at once on a device: as many as fit in a CPU's cache, but at least one adapter's."""


class Stack(NamedTuple):
    """Λ times the scaling, and Γ, of several updates on the same bases."""

    lam: Tensor  # (updates, c, R, n), in a dtype at least as wide as A
    gamma: Tensor  # (updates, c, n, w), in the dtype of B

    @classmethod
    def of(cls, pair: Pair, diagonals: Sequence[Diagonals]) -> Stack:
        """Copy Λ and Γ of some updates, all of one shape."""
        blocks, rows, width = pair.A.shape
        lam = torch.stack([one.lam for one in diagonals])
        lam = lam.to(torch.promote_types(lam.dtype, pair.A.dtype))
        scalings = torch.tensor([one.scaling for one in diagonals], dtype=lam.dtype, device="cpu")
        lam *= scalings.to(lam.device).view(-1, 1, 1)
        gamma = torch.stack([in_dtype(one.gamma, pair.B.dtype) for one in diagonals])
        lam = lam.view(len(lam), rows, blocks, -1).transpose(1, 2)
        return cls(lam.contiguous(), _dealt(gamma, blocks, width).contiguous())


class Part(NamedTuple):
    """Some of the updates, all with the same number of tokens."""

    updates: slice
    tokens: slice
    each: int  # the number of tokens of each update
    way: Way


def stacked_update(
    x: Tensor, pair: Pair, stack: Stack, counts: Sequence[int], *, is_wide: bool, way: Way | None = None
) -> Tensor:
    """Return the product of each token, ``(tokens, in_features)`` sorted by update, with the update that it belongs to.

    ``counts`` are the numbers of tokens of the updates: fastest if equal numbers are neighbors.
    """
    if torch.is_autocast_enabled(x.device.type):  # the dtype of B already follows autocast
        with torch.autocast(x.device.type, enabled=False):
            return stacked_update(x, pair, stack, counts, is_wide=is_wide, way=way)
    blocks, rows, width = pair.A.shape
    parts = _parts(tuple(counts), (blocks, rows, stack.lam.shape[3], width), x.device.type, way)
    tokens, num_bases = x.shape[0], stack.lam.shape[3]
    basis_A = in_dtype(pair.A, x.dtype)
    if is_wide:
        flat = x.new_empty(tokens, stack.lam[0].numel())
        for part in parts:
            small = _dealt(x[part.tokens].view(-1, part.each, x.shape[1]), blocks, width).contiguous()
            terms = _small_to_terms(small, basis_A, stack.gamma[part.updates], part.way)
            own = flat[part.tokens].view(-1, part.each, terms.shape[3], blocks, num_bases).permute(0, 3, 1, 2, 4)
            torch.mul(terms, stack.lam[part.updates].unsqueeze(2), out=own)
        return pair.flat_to_large(flat, None, 1.0)
    flat = pair.large_to_flat(x)
    total = x.new_empty(tokens, width, blocks)
    for part in parts:
        given = flat[part.tokens].view(-1, part.each, pair.A.shape[1], blocks, num_bases).permute(0, 3, 1, 2, 4)
        terms = torch.mul(given, stack.lam[part.updates].unsqueeze(2), out=x.new_empty(given.shape))
        small = _terms_to_small(terms, basis_A, stack.gamma[part.updates], part.way)
        total[part.tokens].view(-1, part.each, width, blocks).copy_(small.permute(0, 2, 3, 1))
    total = total.view(tokens, -1)
    return total if total.shape[1] == pair.shape.min_dim else total[:, : pair.shape.min_dim]


def _small_to_terms(small: Tensor, basis_A: Tensor, gamma: Tensor, way: Way) -> Tensor:
    """Multiply ``(updates, c, count, w)`` by Γ and A: ``(updates, c, count, R, n)``."""
    updates, blocks, count, width = small.shape
    rows, num_bases = basis_A.shape[1], gamma.shape[2]
    if way == "by row":
        by_row = small.new_empty(updates, blocks, count, rows, width)
        torch.mul(small.unsqueeze(3), basis_A.unsqueeze(1), out=by_row)
        terms = torch.bmm(by_row.view(-1, count * rows, width), gamma.flatten(0, 1).mT)
    else:
        terms = torch.bmm(small.reshape(-1, count, width), _whole(basis_A, gamma).mT)
    return terms.view(updates, blocks, count, rows, num_bases)


def _terms_to_small(terms: Tensor, basis_A: Tensor, gamma: Tensor, way: Way) -> Tensor:
    """Multiply ``(updates, c, count, R, n)`` by A and Γ: ``(updates, c, count, w)``."""
    updates, blocks, count, rows, num_bases = terms.shape
    width = basis_A.shape[2]
    if way == "by row":
        by_row = torch.bmm(terms.view(-1, count * rows, num_bases), gamma.flatten(0, 1))
        return by_row.view(updates, blocks, count, rows, width).mul_(basis_A.unsqueeze(1)).sum(3)
    small = torch.bmm(terms.view(-1, count, rows * num_bases), _whole(basis_A, gamma))
    return small.view(updates, blocks, count, width)


def _whole(basis_A: Tensor, gamma: Tensor) -> Tensor:
    """Return UA without Λ, ``(updates·c, R·n, w)``."""
    return (basis_A.unsqueeze(2) * gamma.unsqueeze(2)).flatten(2, 3).flatten(0, 1)


@lru_cache(maxsize=4096)
def _parts(counts: tuple[int, ...], shape: tuple[int, int, int, int], device: str, way: Way | None) -> tuple[Part, ...]:
    """Return the updates in parts of equal counts, each of which fits into the memory that is written at once."""
    blocks, rows, num_bases, width = shape
    most, parts, update, token = AT_ONCE.get(device, AT_ONCE["cuda"]), [], 0, 0
    for count, equal in groupby(counts):
        chosen: Way = way or ("whole" if num_bases <= count else "by row")
        written = rows * width * blocks * (num_bases if chosen == "whole" else count)
        at_once, end = max(1, most // written), update + len(list(equal))
        while update < end:
            some = min(at_once, end - update)
            parts.append(Part(slice(update, update + some), slice(token, token + some * count), count, chosen))
            update, token = update + some, token + some * count
    return tuple(parts)


def _dealt(vectors: Tensor, blocks: int, width: int) -> Tensor:
    """Distribute entries to blocks in turn: ``(updates, rows, min_dim)`` to a view ``(updates, c, rows, w)``."""
    updates, rows, entries = vectors.shape
    filled = F.pad(vectors, (0, blocks * width - entries)) if entries < blocks * width else vectors
    return filled.view(updates, rows, width, blocks).permute(0, 3, 1, 2)


def goes_together(
    x: Tensor, diagonals: Iterable[Tensor], pair: Pair, counts: Sequence[int], *, is_wide: bool, compute: Compute
) -> bool:
    """Whether to multiply the tokens of several updates, ``counts`` of each, together instead of `one_by_one`."""
    if len(counts) == 1 or scratch.is_transformed() or may_be_kept():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in diagonals)):
        return False
    return chosen_forward(max(counts), pair, is_wide=is_wide, has_weight=False, compute=compute) != "materialized"


def one_by_one(
    x: Tensor,
    pair: Pair,
    diagonals: Sequence[Diagonals],
    counts: Sequence[int],
    *,
    is_wide: bool,
    compute: Compute = "auto",
) -> Tensor:
    """Return the result of `stacked_update`, computed one update after the other, with gradients."""
    each = zip(x.split(list(counts)), diagonals, strict=True)
    return torch.cat([adapted_linear(part, pair, one, compute=compute, is_wide=is_wide) for part, one in each])


class KeptStack(NamedTuple):
    """A copy of Λ and Γ of some adapters of one weight, and what keeps the ids and addresses that it is known by."""

    here: Mapping[str, SiteAdapter]  # all adapters of the weight
    parameters: list[nn.Parameter]  # every Λ, then every Γ, of those that were copied
    versions: list[int]
    values: list[Tensor]
    pair: Pair
    stack: Stack


def cacheable_parameters(owner: nn.Module, held: Sequence[Diagonal], names: Sequence[str]) -> list[nn.Parameter] | None:
    """Return every Λ of some adapters, then every Γ, or ``None`` if their values may be loaded or moved."""
    if any(map(is_hooked, (owner, *held))) or any(type(each._parameters) is not Values for each in held):
        return None
    parameters: list[Any] = [each._parameters[name] for each in held for name in names]
    return parameters


def kept_stack(
    kept: dict[tuple[int, int], KeptStack],
    here: Mapping[str, SiteAdapter],
    site_adapters: list[SiteAdapter],
    parameters: list[nn.Parameter],
    pair: Pair,
) -> Stack:
    """Return Λ and Γ of some adapters of a weight, in one tensor each until the parameters change."""
    key = id(here), id(pair)
    known = kept.get(key)
    if known and _versions(parameters) == known.versions and all(map(operator.is_, parameters, known.parameters)):
        return known.stack
    # torch tells when values change, except of parameters that were made in inference mode
    is_lasting = all(type(part) is nn.Parameter and not part.is_inference() for part in parameters)
    versions = _versions(parameters) if is_lasting else []  # before the values, which another thread may be changing
    with torch.inference_mode(mode=False), torch.no_grad():  # a later call may need gradients of inputs
        here_as = [parameter.to(pair.B.device) for parameter in parameters]
        each = zip(here_as[: len(site_adapters)], here_as[len(site_adapters) :], site_adapters, strict=True)
        stack = Stack.of(pair, [Diagonals(lam, gamma, site_adapter.scaling) for lam, gamma, site_adapter in each])
    if is_lasting:
        kept[key] = KeptStack(here, parameters, versions, [each.detach() for each in parameters], pair, stack)
    return stack


def _versions(parameters: list[nn.Parameter]) -> list[int]:
    """Return what changes with the values of some parameters."""
    return [*(each._version for each in parameters), *map(Tensor.data_ptr, parameters)]

"""Λ and Γ of the adapters of a `randlora.serving.routed` block, kept in one tensor each until it ends.

Each forward compares what is kept with the parameters: their identity, the address of their values, and the version
that torch counts up when values are changed in place, before they are read. Like autograd, which asks the same of the
tensors it saves, this does not see what is written through ``parameter.data``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora.functional import Diagonals, Pair
from randlora.layers.diagonals import Diagonal, Values
from randlora.places import is_hooked
from randlora.serving.stacked import Stack
from randlora.state import SiteAdapter

Find = Callable[[Any], tuple[nn.Parameter, ...]]
"""Finds what some adapters, at least two, have in a mapping by name: `operator.itemgetter`, which is quick."""

VERSION: Callable[[Tensor], int] = operator.attrgetter("_version")


class Kept(NamedTuple):
    """A copy of Λ and Γ of some adapters of one weight.

    Attributes:
        here: All adapters of the weight.
        parts: Those that the copy is of.
        parameters: Their Λ, then their Γ.
        versions: The versions and addresses of these.
        values: What they held, so that nothing else can have its address.
        pair: The bases that the copy is for.
        stack: The copy.
    """

    here: Mapping[str, SiteAdapter]
    parts: list[SiteAdapter]
    parameters: list[nn.Parameter]
    versions: list[int]
    values: list[Tensor]
    pair: Pair
    stack: Stack

    def is_of(self, parts: list[SiteAdapter], parameters: list[nn.Parameter]) -> bool:
        """Whether it holds the present values of these parameters."""
        return (
            len(parameters) == len(self.parameters)
            and all(map(operator.is_, parameters, self.parameters))
            and all(map(operator.is_, parts, self.parts))
            and _versions(parameters) == self.versions
        )


def cacheable_parameters(owner: nn.Module, held: Sequence[Diagonal], find: Find) -> list[nn.Parameter] | None:
    """Return every Λ of some adapters, then every Γ, or ``None`` if what holds them may load or move their values.

    Args:
        owner: The adapted module.
        held: Λ and Γ of one of its weights.
        find: Finds those of the adapters.
    """
    lambdas, gammas = held
    if any(map(is_hooked, (owner, lambdas, gammas))):
        return None
    if type(lambdas._parameters) is not Values or type(gammas._parameters) is not Values:
        return None
    return [*find(lambdas._parameters), *find(gammas._parameters)]


def kept_stack(
    kept: dict[tuple[int, int], Kept],
    here: Mapping[str, SiteAdapter],
    parts: list[SiteAdapter],
    parameters: list[nn.Parameter],
    pair: Pair,
) -> Stack:
    """Return Λ and Γ of some adapters of a weight in one tensor each: those kept, unless the parameters have changed.

    Args:
        kept: What is kept, by the identities of the next argument and the bases.
        here: All adapters of the weight.
        parts: Those to return, all on the same bases.
        parameters: Their Λ, then their Γ, which need no gradient.
        pair: These bases.
    """
    key = id(here), id(pair)
    known = kept.get(key)
    if known is not None and known.is_of(parts, parameters):
        return known.stack
    is_lasting = _is_lasting(parameters)
    versions = _versions(parameters) if is_lasting else []  # before the values, which another thread may be changing
    with torch.no_grad():
        here_as = [parameter.to(pair.B.device) for parameter in parameters]
        each = zip(here_as[: len(parts)], here_as[len(parts) :], parts, strict=True)
        stack = Stack.of(pair, [Diagonals(lam, gamma, part.scaling) for lam, gamma, part in each])
    if is_lasting:
        kept[key] = Kept(here, parts, parameters, versions, [each.detach() for each in parameters], pair, stack)
    return stack


def _versions(parameters: list[nn.Parameter]) -> list[int]:
    """Return what changes with the values of some parameters."""
    return [*map(VERSION, parameters), *map(Tensor.data_ptr, parameters)]


def _is_lasting(parameters: list[nn.Parameter]) -> bool:
    """Whether torch tells when values of these parameters change: not if they were made in inference mode."""
    return all(type(part) is nn.Parameter and not part.is_inference() for part in parameters)

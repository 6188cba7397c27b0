"""The choice of how each stage of a layer computes: a pure function of sizes.

A training step has three stages. Each can multiply the tokens by both factors (*factored*) or form the update first
(*materialized*). With M = max_dim, m = min_dim, K = r·num_bases and T tokens, in multiply-adds:

| stage | factored | materialized |
|---|---|---|
| forward | T·K·m·a + T·K·M·b | M·K·m·ab; the update is added to the weight, whose product is needed anyway |
| input gradient | T·K·M·b + T·K·m·a | the same again |
| gradient of Λ and Γ | T·K·M·b + T·K·m·a | T·M·m + M·K·m·ab |

a, b and ab are the shares of the dense work with `block` bases, about 1/c, 1/b and 1/(b·c). Factored, the input
gradient and that of Λ and Γ share a product with B if the input has ``min_dim`` features. For few tokens there is a
third way in all stages, *few_tokens*, which does not build ``UA`` with its ``min_dim²`` entries: the tokens are
repeated for each term and scaled, ``num_bases·min_dim`` numbers per token. A pass over memory counts as a number of
multiply-adds per entry. The fixed cost of an operator is counted only in backward, where the ways differ in it; it
decides in layers of 128 features or fewer.

Under a compiler or exporter everything is factored: the number of tokens may be a symbol, and a choice that depends on
it would be a guard on it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch

Compute = Literal["auto", "factored", "materialized"]
Way = Literal["factored", "materialized", "few_tokens"]
ALWAYS: tuple[Way, ...] = ("factored", "materialized")
"""The ways that any number of tokens can take."""


class Pass(NamedTuple):
    """The multiply-adds that take as long as a pass over one entry of memory, measured or from data sheets."""

    multiply_adds: float
    is_measured: bool


ON_CPU = Pass(40, is_measured=True)
ON_GPU = {
    torch.bfloat16: Pass(400, is_measured=False),
    torch.float16: Pass(400, is_measured=False),
    torch.float32: Pass(80, is_measured=False),  # without TF32
    torch.float64: Pass(160, is_measured=False),
}
"""From an H100's data sheet: 350 T multiply-adds a second in 16 bits, 33 T in float32 and float64, and 3.3 TB/s."""


def pass_over(device_type: str, dtype: torch.dtype) -> Pass:
    """Return the cost of a pass over memory for a device type and dtype."""
    return ON_CPU if device_type in ("cpu", "meta") else ON_GPU.get(dtype, ON_GPU[torch.float32])


MORE_OPERATORS = 5 * 2**15
"""The cost of the extra operators of few_tokens in backward, as entries that a pass reads in the same time."""
MATRIX_OPERATORS = 4 * 2**15
"""The cost of the operators for one more matrix of a stack in a stage, in the same unit."""
GATHERING_PASSES = 7
"""Further passes over the repeated tokens if each has its own Γ, which is gathered and whose gradient is summed.

Both were measured on a CPU: with 128 experts of 128 features, all at once is faster below 32 tokens an expert, with 32
experts of 512 features below 8.
"""
SMALL_WORK = 2**20
"""Multiply-adds up to which a dense product takes no longer than one in blocks.

Measured on a CPU, forward and backward of square layers in four and eight blocks: dense bases are 1.1 times faster at
16 tokens and 256², 1.2 times at one token and 512², and slower from 16 tokens on at 384².
"""
SMALL_WEIGHT = SMALL_WORK // 4
"""Entries of the largest weight for which a dense copy of block bases is kept."""


def is_small(tokens: int, entries: int) -> bool:
    """Whether a product takes at most `SMALL_WORK` multiply-adds; never if ``tokens`` is the symbol of a tracer."""
    return _is_known(tokens) and tokens * entries <= SMALL_WORK


class Sizes(NamedTuple):
    """The sizes that the cost of a layer's stages depends on.

    Attributes:
        tokens: Rows of the input.
        hidden: ``r·num_bases``.
        shares: Shares of the dense work of products with UA, with UB, and of UB @ UA.
        is_wide: Whether the input has ``min_dim`` features.
        has_weight: Whether the base layer's weight is given, so that the update can be added to it.
        entry: Multiply-adds in the time of a pass over one entry; see `pass_over`.
    """

    tokens: int
    max_dim: int
    min_dim: int
    hidden: int
    num_bases: int
    shares: tuple[float, float, float]
    is_wide: bool
    has_weight: bool
    entry: float = ON_CPU.multiply_adds

    @property
    def through_A(self) -> float:
        """Cost of multiplying the tokens by UA."""
        copies = 0 if self.shares[0] == 1 else self.entry * self.tokens * (self.min_dim + self.hidden)
        return self.tokens * self.hidden * self.min_dim * self.shares[0] + copies

    @property
    def through_B(self) -> float:
        """Cost of multiplying the tokens by UB."""
        copies = 0 if self.shares[1] == 1 else self.entry * self.tokens * (self.max_dim + self.hidden)
        return self.tokens * self.hidden * self.max_dim * self.shares[1] + copies

    @property
    def build_A(self) -> float:
        """Cost of computing UA: one product with Λ, one with Γ."""
        return 2 * self.entry * self.hidden * self.min_dim * self.shares[0]

    @property
    def update(self) -> float:
        """Cost of computing the update from UA."""
        passes = 1 if self.shares[2] == 1 else 3
        return self.max_dim * self.min_dim * (self.hidden * self.shares[2] + self.entry * passes)

    @property
    def laid_out(self) -> int:
        """Size of the tokens repeated for each term."""
        return self.tokens * self.num_bases * self.min_dim

    @property
    def through_terms(self) -> float:
        """Cost of multiplying the tokens by A term by term, without UA."""
        passes = 3 if self.shares[0] == 1 else 4
        return self.tokens * self.hidden * self.min_dim * self.shares[0] + passes * self.entry * self.laid_out

    def product(self, way: Way) -> float:
        """Cost of multiplying the tokens by the update, factored or materialized."""
        if way == "factored":
            return self.build_A + self.through_A + self.through_B
        tokens_through_update = 0.0 if self.has_weight else self.tokens * self.max_dim * self.min_dim
        return self.build_A + self.update + tokens_through_update


def forward_way(sizes: Sizes) -> Way:
    """Return the cheapest way to compute the output, beside the product with the weight."""
    costs: dict[Way, float] = {way: sizes.product(way) for way in ALWAYS}
    costs["few_tokens"] = sizes.through_terms + sizes.through_B
    return min(costs, key=costs.__getitem__)


def backward_ways(
    sizes: Sizes, *, needs_input: bool, needs_diagonals: bool, needs_weight: bool = False
) -> tuple[Way, Way]:
    """Return how to compute the gradients of the input and of Λ and Γ, chosen together because they share a product.

    The gradients of Λ and Γ can also be computed from the weight's gradient, if this is needed.
    """
    costs: dict[tuple[Way, Way], float] = {
        (x_way, diagonals_way): needs_input * sizes.product(x_way)
        + needs_diagonals
        * _diagonal_gradients(
            sizes,
            diagonals_way,
            has_hidden=needs_input and x_way == "factored" and sizes.is_wide,
            has_weight_gradient=needs_weight,
        )
        for x_way in ALWAYS
        for diagonals_way in ALWAYS
    }
    through_A, through_B = (2, 1 if sizes.is_wide else 1 + needs_input) if needs_diagonals else (1, 1)
    products = through_A * sizes.through_terms + through_B * sizes.through_B
    sums = 2 * needs_diagonals * sizes.laid_out  # over the terms for the input, over the tokens for Γ
    costs["few_tokens", "few_tokens"] = products + sizes.entry * (sums + MORE_OPERATORS)
    return min(costs, key=costs.__getitem__)


def _diagonal_gradients(sizes: Sizes, way: Way, *, has_hidden: bool, has_weight_gradient: bool) -> float:
    passes = 4 * sizes.entry * sizes.hidden * sizes.min_dim * sizes.shares[0]
    if way == "factored":
        return passes + sizes.through_A + (0.0 if has_hidden else sizes.through_B)
    product = 0.0 if has_weight_gradient else sizes.tokens * sizes.max_dim * sizes.min_dim
    return passes + product + sizes.update


class Shape(NamedTuple):
    """The part of `Sizes` that bases determine, a key to cache the choice by."""

    max_dim: int
    min_dim: int
    hidden: int
    num_bases: int
    shares: tuple[float, float, float]
    entry: float


class Shaped(Protocol):
    """An object with a `Shape`: a pair of bases."""

    @property
    def shape(self) -> Shape:
        """The sizes that the cost of its products depends on."""


@lru_cache(maxsize=4096)
def _forward(tokens: int, shape: Shape, is_wide: bool, has_weight: bool) -> Way:  # noqa: FBT001  # looked up faster
    return forward_way(Sizes(tokens, *shape[:5], is_wide, has_weight, shape.entry))


@lru_cache(maxsize=4096)
def _all_at_once(tokens: int, shape: Shape, *, is_wide: bool) -> bool:
    sizes = Sizes(tokens, *shape[:5], is_wide, has_weight=True, entry=shape.entry)
    one_by_one = min(sizes.product(way) for way in ALWAYS) + sizes.entry * MATRIX_OPERATORS
    gathering = GATHERING_PASSES * sizes.entry * sizes.laid_out
    return sizes.through_terms + gathering + sizes.through_B <= one_by_one


@lru_cache(maxsize=4096)
def _backward(
    tokens: int, shape: Shape, *, is_wide: bool, has_weight: bool, needs: tuple[bool, bool, bool]
) -> tuple[Way, Way]:
    sizes = Sizes(tokens, *shape[:5], is_wide, has_weight, shape.entry)
    return backward_ways(sizes, needs_input=needs[0], needs_weight=needs[1], needs_diagonals=needs[2])


def chosen_forward(tokens: int, pair: Shaped, *, is_wide: bool, has_weight: bool, compute: Compute) -> Way:
    """Return the cached result of `forward_way`, or ``"factored"`` without reading ``tokens`` if that is a symbol."""
    if compute != "auto":
        return compute
    return _forward(tokens, pair.shape, is_wide, has_weight) if _is_known(tokens) else "factored"


def chosen_all_at_once(counts: Sequence[int], pair: Shaped, *, is_wide: bool, compute: Compute) -> bool:
    """Whether matrices of a stack, with these numbers of tokens, are computed together, without building ``UA``.

    Otherwise they are computed one after the other, with that many times the operators.
    """
    visited = len(counts) - counts.count(0)
    if compute != "auto" or not visited:
        return False
    return _all_at_once(-(-sum(counts) // visited), pair.shape, is_wide=is_wide)


def chosen_backward(
    tokens: int, pair: Shaped, *, is_wide: bool, has_weight: bool, needs: tuple[bool, bool, bool], compute: Compute
) -> tuple[Way, Way]:
    """Return the cached result of `backward_ways`. ``needs`` is for the input, for the weight, and for Λ and Γ."""
    if compute != "auto":
        return compute, compute
    if not _is_known(tokens):
        return "factored", "factored"
    return _backward(tokens, pair.shape, is_wide=is_wide, has_weight=has_weight, needs=needs)


def _is_known(tokens: int) -> bool:
    """Whether a number of tokens is an integer rather than a tracer's symbol."""
    return type(tokens) is int and not torch.compiler.is_compiling()

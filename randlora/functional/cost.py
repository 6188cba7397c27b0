"""The choice of how each stage of a layer computes: a pure function of sizes.

A stage can multiply the tokens by both factors (*factored*), form the update first (*materialized*) or, for few tokens,
repeat the tokens for each term instead of building ``UA`` (*few_tokens*); docs/method.md has the table.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

Compute = Literal["auto", "factored", "materialized"]
Way = Literal["factored", "materialized", "few_tokens"]
ALWAYS: tuple[Way, ...] = ("factored", "materialized")  # the ways that any number of tokens can take

Shares = tuple[float, float, float]
"""The parts of the dense work of UA, UB and UB @ UA that products take: in blocks about 1/c, 1/b and 1/(b·c)."""

ON_CPU = 40.0  # the multiply-adds that take as long as a pass over one entry of memory, measured
ON_GPU = {torch.bfloat16: 400.0, torch.float16: 400.0, torch.float32: 80.0, torch.float64: 160.0}
"""From an H100's data sheet: 350 T multiply-adds a second in 16 bits, 33 T in float32 and float64, and 3.3 TB/s."""
MORE_OPERATORS = 5 * 2**15
"""The cost of the extra operators of few_tokens in backward, as entries that a pass reads in the same time."""
SMALL_WORK = 2**20
"""Multiply-adds up to which a dense product takes no longer than one in blocks, measured on a CPU with backward: for 16
tokens and 256², or one token and 512², it is 1.1 to 1.2 times faster, and slower from 16 tokens and 384² on."""
SMALL_WEIGHT = SMALL_WORK // 4  # entries of the largest weight for which a dense copy of block bases is kept


def pass_over(device_type: str, dtype: torch.dtype) -> float:
    """Return the cost of a pass over one entry of memory for a device type and dtype, in multiply-adds."""
    return ON_CPU if device_type in ("cpu", "meta") else ON_GPU.get(dtype, ON_GPU[torch.float32])


class Shape(NamedTuple):
    """What the cost of a layer's stages depends on that its bases determine."""

    max_dim: int
    min_dim: int
    hidden: int  # r·num_bases
    num_bases: int
    shares: Shares
    entry: float = ON_CPU  # multiply-adds in the time of a pass over one entry


class Sizes(NamedTuple):
    """The sizes that the cost of a layer's stages depends on."""

    tokens: int  # rows of the input
    shape: Shape
    is_wide: bool  # whether the input has min_dim features
    has_weight: bool  # whether the update can be added to a weight

    @property
    def through_A(self) -> float:
        """Cost of multiplying the tokens by UA."""
        return self._through(self.shape.min_dim, self.shape.shares[0])

    @property
    def through_B(self) -> float:
        """Cost of multiplying the tokens by UB."""
        return self._through(self.shape.max_dim, self.shape.shares[1])

    def _through(self, dim: int, share: float) -> float:
        hidden = self.shape.hidden
        copies = 0 if share == 1 else self.shape.entry * self.tokens * (dim + hidden)
        return self.tokens * hidden * dim * share + copies

    @property
    def build_A(self) -> float:
        """Cost of computing UA: one product with Λ, one with Γ."""
        return 2 * self.shape.entry * self.shape.hidden * self.shape.min_dim * self.shape.shares[0]

    @property
    def update(self) -> float:
        """Cost of computing the update from UA."""
        max_dim, min_dim, hidden, _, (*_, share), entry = self.shape
        return max_dim * min_dim * (hidden * share + entry * (1 if share == 1 else 3))

    @property
    def laid_out(self) -> int:
        """Size of the tokens repeated for each term."""
        return self.tokens * self.shape.num_bases * self.shape.min_dim

    @property
    def through_terms(self) -> float:
        """Cost of multiplying the tokens by A term by term, without UA."""
        _, min_dim, hidden, _, (share, *_), entry = self.shape
        return self.tokens * hidden * min_dim * share + (3 if share == 1 else 4) * entry * self.laid_out

    def product(self, way: Way) -> float:
        """Cost of multiplying the tokens by the update, factored or materialized."""
        if way == "factored":
            return self.build_A + self.through_A + self.through_B
        through_update = 0.0 if self.has_weight else self.tokens * self.shape.max_dim * self.shape.min_dim
        return self.build_A + self.update + through_update


@lru_cache(maxsize=4096)
def forward_way(sizes: Sizes) -> Way:
    """Return the cheapest way to compute the output, beside the product with the weight."""
    costs: dict[Way, float] = {way: sizes.product(way) for way in ALWAYS}
    costs["few_tokens"] = sizes.through_terms + sizes.through_B
    return min(costs, key=costs.__getitem__)


@lru_cache(maxsize=4096)
def backward_ways(
    sizes: Sizes, *, needs_input: bool, needs_diagonals: bool, needs_weight: bool = False
) -> tuple[Way, Way]:
    """Return how to compute the gradients of the input and of Λ and Γ, chosen together because they share products."""
    costs = _backward_costs(sizes, needs_input=needs_input, needs_diagonals=needs_diagonals, needs_weight=needs_weight)
    return min(costs, key=costs.__getitem__)


def _backward_costs(
    sizes: Sizes, *, needs_input: bool, needs_diagonals: bool, needs_weight: bool
) -> dict[tuple[Way, Way], float]:
    shape, entry = sizes.shape, sizes.shape.entry

    def of_diagonals(way: Way, *, has_hidden: bool) -> float:
        passes = 4 * entry * shape.hidden * shape.min_dim * shape.shares[0]
        if way == "factored":
            return passes + sizes.through_A + (0.0 if has_hidden else sizes.through_B)
        product = 0.0 if needs_weight else sizes.tokens * shape.max_dim * shape.min_dim
        return passes + product + sizes.update

    costs: dict[tuple[Way, Way], float] = {
        (x_way, way): needs_input * sizes.product(x_way)
        + needs_diagonals * of_diagonals(way, has_hidden=needs_input and x_way == "factored" and sizes.is_wide)
        for x_way in ALWAYS
        for way in ALWAYS
    }
    through_A, through_B = (2, 1 if sizes.is_wide else 1 + needs_input) if needs_diagonals else (1, 1)
    products = through_A * sizes.through_terms + through_B * sizes.through_B
    sums = 2 * needs_diagonals * sizes.laid_out  # over the terms for the input, over the tokens for Γ
    costs["few_tokens", "few_tokens"] = products + entry * (sums + MORE_OPERATORS)
    return costs


def multiply_adds(tokens: int, in_features: int, out_features: int, hidden: int, shares: Shares) -> float:
    """Return those of a layer in a step of training, with those of its frozen weight, for so many tokens."""
    max_dim, min_dim = max(in_features, out_features), min(in_features, out_features)
    shape = Shape(max_dim, min_dim, hidden, 1, shares, 0.0)
    sizes = Sizes(tokens, shape, is_wide=in_features == min_dim, has_weight=True)
    backward = _backward_costs(sizes, needs_input=True, needs_diagonals=True, needs_weight=False)
    return 2 * tokens * max_dim * min_dim + min(map(sizes.product, ALWAYS)) + min(backward.values())

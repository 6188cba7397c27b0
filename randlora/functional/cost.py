"""Which way each stage of a layer takes: a pure function of sizes.

A step has three stages, and each can multiply the tokens through both factors (*factored*) or form the update first
(*materialized*). With M = max_dim, m = min_dim, K = r·num_bases and T tokens, in multiply-adds:

| stage | factored | materialized |
|---|---|---|
| forward | T·K·m·a + T·K·M·b | M·K·m·ab, the update added to the weight that multiplies the tokens anyway |
| input gradient | T·K·M·b + T·K·m·a | the same again |
| gradient of Λ and Γ | T·K·M·b + T·K·m·a | T·M·m + M·K·m·ab |

a, b and ab are what `block` bases leave of a product: 1/c, 1/b and one tile in so many. Factored, the input gradient
and that of Λ and Γ share a product with B where the layer's input is its small side. For few tokens forward has a third
way, *few_tokens*, that never builds ``UA``. Passes over memory count as so many multiply-adds an entry.
"""

from typing import Literal, NamedTuple, TypeVar

Compute = Literal["auto", "factored", "materialized"]
Way = Literal["factored", "materialized", "few_tokens"]
Choice = TypeVar("Choice")

PASS = 40
"""Multiply-adds in the time that one entry takes to be read, changed and written: measured on CPUs, not on a GPU."""


class Sizes(NamedTuple):
    """What the cost of a layer's stages depends on.

    Attributes:
        tokens: Rows of the input.
        max_dim: The layer's large side.
        min_dim: The layer's small side.
        hidden: ``r·num_bases``.
        num_bases: Terms of the update.
        shares: What the kind of bases leaves of a product with UA, with UB, and of both.
        is_wide: Whether the input is on the small side.
        has_weight: Whether the base layer's weight can be read, so that the update can be added to it.
    """

    tokens: int
    max_dim: int
    min_dim: int
    hidden: int
    num_bases: int
    shares: tuple[float, float, float]
    is_wide: bool
    has_weight: bool

    @property
    def through_A(self) -> float:
        """Take the tokens through UA."""
        copies = 0 if self.shares[0] == 1 else PASS * self.tokens * (self.min_dim + self.hidden)
        return self.tokens * self.hidden * self.min_dim * self.shares[0] + copies

    @property
    def through_B(self) -> float:
        """Take the tokens through UB."""
        copies = 0 if self.shares[1] == 1 else PASS * self.tokens * (self.max_dim + self.hidden)
        return self.tokens * self.hidden * self.max_dim * self.shares[1] + copies

    @property
    def build_A(self) -> float:
        """Build UA: one product by Λ, one by Γ."""
        return 2 * PASS * self.hidden * self.min_dim * self.shares[0]

    @property
    def update(self) -> float:
        """Form the update from UA."""
        passes = 1 if self.shares[2] == 1 else 3
        return self.max_dim * self.min_dim * (self.hidden * self.shares[2] + PASS * passes)

    @property
    def tokens_through_update(self) -> float:
        """Take the tokens through an update that cannot be added to the weight, which they pass anyway."""
        return 0.0 if self.has_weight else self.tokens * self.max_dim * self.min_dim


def forward_way(sizes: Sizes, compute: Compute = "auto") -> Way:
    """Choose how the output is computed.

    Args:
        sizes: The layer's.
        compute: A way to take whatever it costs, or ``"auto"``.
    """
    if compute != "auto":
        return compute
    laid_out = sizes.tokens * sizes.num_bases * sizes.min_dim
    costs: dict[Way, float] = {
        "factored": sizes.build_A + sizes.through_A + sizes.through_B,
        "materialized": sizes.build_A + sizes.update + sizes.tokens_through_update,
    }
    if laid_out <= sizes.max_dim * sizes.min_dim:  # no temporary is larger than the weight
        few_tokens_through_A = sizes.tokens * sizes.hidden * sizes.min_dim * sizes.shares[0] + 3 * PASS * laid_out
        costs["few_tokens"] = few_tokens_through_A + sizes.through_B
    return _cheapest(costs)


def backward_ways(
    sizes: Sizes,
    *,
    needs_input: bool,
    needs_diagonals: bool,
    needs_weight: bool = False,
    has_kept: bool = False,
    compute: Compute = "auto",
) -> tuple[Way, Way]:
    """Choose how the gradients of the input, and of Λ and Γ, are computed, together because they share a product.

    Args:
        sizes: The layer's.
        needs_input: Whether the input's gradient is asked for.
        needs_diagonals: Whether those of Λ and Γ are.
        needs_weight: Whether the weight's is, from which those of Λ and Γ can be had.
        has_kept: Whether forward kept the sum of weight and update.
        compute: A way to take whatever it costs, or ``"auto"``.
    """
    if compute != "auto":
        return compute, compute
    ways: tuple[Way, ...] = ("factored", "materialized")
    costs = {
        (x_way, diagonals_way): needs_input * _input_gradient(sizes, x_way, has_kept=has_kept)
        + needs_diagonals
        * _diagonal_gradients(
            sizes,
            diagonals_way,
            has_hidden=needs_input and x_way == "factored" and sizes.is_wide,
            has_weight_gradient=needs_weight,
        )
        for x_way in ways
        for diagonals_way in ways
    }
    return _cheapest(costs)


def _cheapest(costs: dict[Choice, float]) -> Choice:
    """Do what ``min(costs, key=costs.get)`` does, which the compiler cannot where a size is a symbol to it."""
    best, *others = costs
    for other in others:
        if costs[other] < costs[best]:
            best = other
    return best


def _input_gradient(sizes: Sizes, way: Way, *, has_kept: bool) -> float:
    if way == "factored":
        return sizes.build_A + sizes.through_A + sizes.through_B
    return sizes.tokens_through_update + (0.0 if has_kept else sizes.build_A + sizes.update)


def _diagonal_gradients(sizes: Sizes, way: Way, *, has_hidden: bool, has_weight_gradient: bool) -> float:
    if way == "factored":
        return sizes.through_A + (0.0 if has_hidden else sizes.through_B)
    product = 0.0 if has_weight_gradient else sizes.tokens * sizes.max_dim * sizes.min_dim
    return product + sizes.update

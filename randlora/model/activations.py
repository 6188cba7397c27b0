"""What training keeps from forward to backward, the most that backward has at once, and the work, by formula.

Nothing is run. What a model keeps depends on its code, of which this assumes what is usual: each layer's output is kept
by what follows it, attention keeps what it computes, a gated MLP its gate, and norms that are written out in Python
keep their input in float32. tests/test_memory.py holds the sums against training that is measured.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import dropwhile
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from randlora.bases.spec import count_bases
from randlora.functional.cost import Sizes, pass_over, step_cost
from randlora.model.inject import Plan
from randlora.report import FLOAT32_BYTES
from randlora.targets.site import Site

BESIDE_A_LOGIT = 3 * FLOAT32_BYTES
"""Bytes that a loss in float32 has beside each logit at its height: the logarithm of a probability, two gradients."""
HEAD = "the head"
IN_FLIGHT = 2
"""Gradients as wide as the widest layer that backward has at once."""
LORA_RANK = 32
"""Which our benchmarks compare with; all but a few percent of LoRA's work are products with frozen weights."""


class _Product(NamedTuple):
    """The products of tokens with one weight, or with the matrices of a stack, or with a device's part of them.

    Attributes:
        rows: Tokens that each matrix is multiplied by.
        matrices: The number of matrices.
        keeps_input: Whether the weight has an update, or is trained itself.
    """

    site: Site
    rows: int
    matrices: int
    out_features: int
    in_features: int
    keeps_input: bool


@dataclass(frozen=True, eq=False)
class Activations:
    """A step of training an adapter, of as many tokens; `style` and `block` give those of a layer by its FQN."""

    plan: Plan
    dtype: torch.dtype
    tokens: int
    devices: int
    style: Callable[[str], str]
    block: Callable[[str], str]

    def _trains(self, site: Site) -> bool:
        adapter = self.plan.adapter
        return site.fqn in adapter.options or not adapter.trained.keys().isdisjoint((site.fqn, f"{site.fqn}.weight"))

    @cached_property
    def _products(self) -> dict[str, list[_Product]]:
        """The products from the first layer that is trained on, by the module that the layers are in."""
        census, found = self.plan.census, defaultdict[str, list[_Product]](list)
        routes = getattr(getattr(census.model, "config", None), "num_experts_per_tok", None)
        for site in dropwhile(lambda site: not self._trains(site), census.sites):
            kind, weight = site.layer_class.kind, site.weight
            if kind in ("embedding", "convolution") or (weight is not None and is_lazy(weight)):
                continue  # an embedding keeps ids; how large a convolution's input is, is not known
            *matrices, out_features, in_features = site.shape
            count, style = math.prod(matrices), self.style(site.fqn)
            rows = math.ceil(self.tokens * routes / count) if matrices and isinstance(routes, int) else self.tokens
            out_features = math.ceil(out_features / (self.devices if "colwise" in style else 1))
            in_features = math.ceil(in_features / (self.devices if "rowwise" in style else 1))
            product = _Product(site, rows, count, out_features, in_features, self._trains(site))
            found[HEAD if site.owner is census.head else site.fqn.rpartition(".")[0]].append(product)
        return found

    @cached_property
    def _inner(self) -> list[list[_Product]]:
        """The products without that of the head, whose output is the logits."""
        return [products for module, products in self._products.items() if module != HEAD]

    def by_block(self) -> Counter[str]:
        """Return the bytes that are kept, by block."""
        found, itemsize = Counter[str](), self.dtype.itemsize
        for *first, last in self._inner:
            between, inner = sum(each.out_features for each in first), last.in_features
            width = between + last.out_features
            width += sum({each.in_features for each in first if each.keeps_input})  # q, k and v are given one input
            if first and between != inner:  # what attention computes, or a gate, is kept for any last layer
                width += inner
            is_gated = between == 2 * inner and len(first) < 3  # not q, k and v
            if last.keeps_input and (not first or between == inner or is_gated):
                width += inner
            found[self.block(last.site.fqn)] += itemsize * last.rows * last.matrices * width
        for visit in self.plan.census.first_visits:
            weight = visit.module._parameters.get("weight")
            if weight is not None and "RMSNorm" in type(visit.module).__name__:
                found[self.block(visit.fqn)] += self.tokens * weight.numel() * max(0, FLOAT32_BYTES - itemsize)
        return found

    def logits(self) -> int:
        """Return the bytes of the logits and of what a loss makes of them."""
        weight = getattr(self.plan.census.head, "weight", None)
        words = weight.shape[0] if isinstance(weight, torch.Tensor) else 0
        beside = self._own_step(self._products.get(HEAD, []))
        return self.tokens * words * (self.dtype.itemsize + BESIDE_A_LOGIT) + beside

    def backward(self) -> int:
        """Return the most that backward has at once beside what is kept."""
        products = [product for of_module in self._inner for product in of_module]
        widths = [each.rows * each.matrices * max(each.out_features, each.in_features) for each in products]
        return IN_FLIGHT * max(widths, default=0) * self.dtype.itemsize + self._own_step(products)

    def _own_step(self, products: list[_Product]) -> int:
        """Return the most that the step of an adapted layer takes beyond that of the frozen one."""
        most, itemsize, adapter = 0, self.dtype.itemsize, self.plan.adapter
        for site, rows, _, *sides, _ in (each for each in products if self.tokens and each.site.fqn in adapter.options):
            (small, large), r = sorted(sides), adapter.options[site.fqn].r
            (c, b), hidden = adapter.bases[r].spec.blocks or (1, 1), r * count_bases(small, r)
            # two gradients in float32 of the factor UA, and that in a shorter dtype
            factor = hidden * math.ceil(small / c) * (2 * FLOAT32_BYTES + itemsize * (itemsize < FLOAT32_BYTES))
            if (c, b) == (1, 1):
                beside = min(large * small, rows * hidden)  # the update, or the tokens between both factors
            else:
                beside = min(3 * large * small, rows * (large + 2 * hidden))  # with copies in the order of blocks
            most = max(most, factor + itemsize * beside)
        return most

    def work(self, forwards: int) -> float | None:
        """Return the work of a step in the adapted layers in multiples of LoRA's, or ``None`` if there is none.

        Counted in multiply-adds, and passes over memory as on a GPU. A product with a frozen weight takes at least as
        long as a pass over it.
        """
        entry, ours, lora = pass_over("cuda", self.dtype).multiply_adds, 0.0, 0.0
        adapter, products = self.plan.adapter, [each for of_module in self._products.values() for each in of_module]
        adapted = [each for each in products if self.tokens and each.site.fqn in adapter.options]
        for site, rows, count, out_features, in_features, _ in adapted:
            r, (small, large) = adapter.options[site.fqn].r, sorted((out_features, in_features))
            n, (c, b) = count_bases(small, r), adapter.bases[r].spec.blocks or (1, 1)
            shares, is_wide = (1 / c, 1 / b, 1 / (c * math.gcd(n, b))), in_features <= out_features
            sizes = Sizes(rows, large, small, r * n, n, shares, is_wide=is_wide, has_weight=True, entry=entry)
            frozen = (forwards + 1) * max(rows, entry) * out_features * in_features
            ours += count * (frozen + step_cost(sizes, forwards=forwards))
            lora += count * (frozen + (forwards + 2) * rows * LORA_RANK * (out_features + in_features))
        return ours / lora if lora else None

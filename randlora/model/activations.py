"""What a step of training keeps from forward to backward, and its work, computed by formula for `training_memory`.

What a model keeps depends on its code. This assumes the usual: each layer's output is kept by the next operation,
attention keeps its results, a gated MLP keeps its gate, and norms written out in Python keep their input in float32.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
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
from randlora.targets.census import Site

BESIDE_A_LOGIT = 3 * FLOAT32_BYTES
"""Bytes that a loss in float32 adds per logit at its peak: the logarithm of a probability, and two gradients."""

HEAD = "the head"

IN_FLIGHT = 2
"""How many gradients as wide as the widest layer backward has at once."""

LORA_RANK = 32
"""The rank that our benchmarks compare with. All but a few percent of LoRA's work are products with frozen weights."""


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
    """A step of training an adapter with this number of tokens.

    `style` and `block` are functions of a layer's FQN, and `quantized` are the parameters that are dequantized for it.
    """

    plan: Plan
    dtype: torch.dtype
    tokens: int
    devices: int
    style: Callable[[str], str]
    block: Callable[[str], str]
    quantized: Collection[str]

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
        """The products of all layers but the head, whose output is the logits."""
        return [products for module, products in self._products.items() if module != HEAD]

    def by_block(self) -> Counter[str]:
        """Return the bytes kept from forward to backward, by block."""
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
        """Return the bytes of the logits and of the tensors that a loss computes from them."""
        weight = getattr(self.plan.census.head, "weight", None)
        words = weight.shape[0] if isinstance(weight, torch.Tensor) else 0
        beside = self._own_step(self._products.get(HEAD, []))
        return self.tokens * words * (self.dtype.itemsize + BESIDE_A_LOGIT) + beside

    def backward(self) -> int:
        """Return the most bytes that backward has at once in addition to activations."""
        products = [product for of_module in self._inner for product in of_module]
        widths = [each.rows * each.matrices * max(each.out_features, each.in_features) for each in products]
        return IN_FLIGHT * max(widths, default=0) * self.dtype.itemsize + self._own_step(products) + self._dequantized()

    def _dequantized(self) -> int:
        """Return the bytes of the largest weight that a product dequantizes, one at a time."""
        products = [each.site for of_module in self._inner for each in of_module]
        coded = [site for site in products if f"{site.fqn}.weight" in self.quantized or site.layer_class.is_quantized]
        sizes = [math.prod(site.shape) for site in coded]
        return max(sizes, default=0) * self.dtype.itemsize if self.tokens else 0

    def _own_step(self, products: list[_Product]) -> int:
        """Return the most that the step of an adapted layer takes more than a frozen one."""
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
        """Return the work of a step in the adapted layers relative to LoRA, or ``None`` if there is none.

        Work is counted in multiply-adds and passes over memory, as on a GPU. A product with a frozen weight takes at
        least as long as a pass over this weight.
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

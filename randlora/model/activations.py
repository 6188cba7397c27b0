"""What a step of training keeps from forward to backward, as sums over the layers, for `training_memory`.

What a model keeps depends on its code. This assumes the usual: each layer's output is kept by the next operation, the
last layer of a module keeps its input, a gated MLP its gate, and norms written in Python their input in float32.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from itertools import dropwhile
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from randlora.bases.spec import count_bases
from randlora.model.inject import Plan
from randlora.report import FLOAT32_BYTES
from randlora.targets.census import Site

BESIDE_A_LOGIT = 3 * FLOAT32_BYTES
"""Bytes that a loss in float32 adds per logit at its peak: the logarithm of a probability, and two gradients."""

HEAD = "the head"

IN_FLIGHT = 2
"""How many gradients as wide as the widest layer backward has at once."""


class Product(NamedTuple):
    """The product of tokens, ``rows`` for all matrices of a stack together, with the weight of a layer.

    Attributes:
        keeps_input: Whether the weight has an update, or is trained itself.
    """

    site: Site
    rows: int
    out_features: int
    in_features: int
    keeps_input: bool


def products_of(plan: Plan, tokens: int) -> dict[str, list[Product]]:
    """Return the products from the first layer that is trained on, by the module that the layers are in."""
    trained = {*plan.adapter.options, *(fqn.removesuffix(".weight") for fqn in plan.adapter.trained)}
    products = defaultdict[str, list[Product]](list)
    routes = getattr(getattr(plan.census.model, "config", None), "num_experts_per_tok", None)
    for site in dropwhile(lambda site: site.fqn not in trained, plan.census.sites):
        weight = site.weight
        if site.layer_class.kind in ("embedding", "convolution") or (weight is not None and is_lazy(weight)):
            continue  # an embedding keeps ids; how large a convolution's input is, is not known
        *matrices, out_features, in_features = site.shape
        rows = tokens * (routes if matrices and isinstance(routes, int) else math.prod(matrices))
        module = HEAD if site.owner is plan.census.head else site.fqn.rpartition(".")[0]
        products[module].append(Product(site, rows, out_features, in_features, site.fqn in trained))
    return products


def kept_by_block(
    plan: Plan, products: dict[str, list[Product]], tokens: int, dtype: torch.dtype, block: Callable[[str], str]
) -> Counter[str]:
    """Return the bytes that all layers but the head keep from forward to backward, by block."""
    kept = Counter[str]()
    for *first, last in (of_module for name, of_module in products.items() if name != HEAD):
        between = sum(each.out_features for each in first)
        width = between + last.out_features
        width += sum({each.in_features for each in first if each.keeps_input})  # q, k and v are given one input
        # what attention computes and a gate are kept for any last layer, which if trained keeps its own input too
        computes, is_gated = between not in (0, last.in_features), between == 2 * last.in_features and len(first) < 3
        width += last.in_features * (computes + (last.keeps_input and (is_gated or not computes)))
        kept[block(last.site.fqn)] += dtype.itemsize * last.rows * width
    for visit in plan.census.first_visits:
        weight = visit.module._parameters.get("weight")
        if weight is not None and "RMSNorm" in type(visit.module).__name__:
            kept[block(visit.fqn)] += tokens * weight.numel() * max(0, FLOAT32_BYTES - dtype.itemsize)
    return kept


def logits_and_backward(
    plan: Plan, products: dict[str, list[Product]], tokens: int, dtype: torch.dtype, quantized: Collection[str]
) -> tuple[int, int]:
    """Return the bytes of the logits with their loss, and the most that backward has at once beside activations."""
    weight = getattr(plan.census.head, "weight", None)
    words = weight.shape[0] if isinstance(weight, torch.Tensor) else 0
    logits = tokens * words * (dtype.itemsize + BESIDE_A_LOGIT)
    if not tokens:
        return 0, 0
    inner = [each for name, of_module in products.items() for each in of_module if name != HEAD]
    widest = max((each.rows * max(each.out_features, each.in_features) for each in inner), default=0)
    coded = [each for each, *_ in inner if f"{each.fqn}.weight" in quantized or each.layer_class.is_quantized]
    dequantized = max((math.prod(site.shape) for site in coded), default=0)  # one at a time
    backward = dtype.itemsize * (IN_FLIGHT * widest + dequantized)
    return logits + _beside(plan, products.get(HEAD, []), dtype), backward + _beside(plan, inner, dtype)


def _beside(plan: Plan, products: list[Product], dtype: torch.dtype) -> int:
    """Return the most bytes that the step of an adapted layer takes more than that of a frozen one."""
    most, options = 0, plan.adapter.options
    for site, rows, *sides, _ in (each for each in products if each.site.fqn in options):
        (small, large), r = sorted(sides), options[site.fqn].r
        (c, _), hidden = plan.adapter.bases[r].spec.blocks or (1, 1), r * count_bases(small, r)
        # the factor UA with two gradients in float32, and the update or the tokens between both factors
        factor = hidden * math.ceil(small / c) * (2 * FLOAT32_BYTES + dtype.itemsize)
        most = max(most, factor + dtype.itemsize * min(large * small, rows * hidden))
    return most

"""Whether a forward is the product with the weight, as a merge assumes, tried on a small random input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from randlora.layers.in_place import plain_class
from randlora.layers.scopes import run_forward
from randlora.layers.update import folded
from randlora.model.change import undone
from randlora.places import Plain
from randlora.targets.census import AdaptedSite

TOLERANCE = 0.02
"""How far the two may differ, as a share of the product. Results computed in 16 bits are within a quarter of it."""

TOKENS = 2, 3


def differences_from_product(sites: Iterable[AdaptedSite]) -> dict[AdaptedSite, float | None]:
    """Return `difference_from_product` of each layer whose forward is not the plain one of its kind.

    A forward that reads the weight from its attribute treats it the same after a merge. A forward that cannot be tried
    is assumed to read the attribute.
    """
    own = [site for site in sites if site.layer.is_called and not site.layer.runs_plain_forward(site.owner)]
    found = {site: difference_from_product(site) for site in own}
    return {site: each for site, each in found.items() if each is not None or not site.layer.is_read}


def product_problems(differences: Mapping[AdaptedSite, float | None]) -> list[str]:
    """Return messages about weights whose update has a different effect once merged.

    An adapter adds ``x @ delta_weight.T`` to what the forward returns. Merged, it has the same effect only where
    ``f(W + D)(x) - f(W)(x) == x @ D.T``. An adapter of a weight that the forward reads adds to what is read there.
    """
    problems = []
    for site, difference in differences.items():
        if difference is None or difference <= TOLERANCE:
            continue
        own = f"{site.fqn} has its own forward ({plain_class(site.owner).__name__}), which"
        if site.layer.is_read:
            problems.append(
                f"{own} does not read the weight from the attribute {site.layer.attribute}, so the adapter has no "
                "effect, but would have one once merged. Read the attribute there, or exclude the layer"
            )
        else:
            problems.append(
                f"{own} responds to a change of its weight with an output that differs from what the adapter adds, by "
                f"{difference:.0%} of it. Leave the adapter unmerged, or exclude the layer"
            )
    return problems


@torch.no_grad()
def difference_from_product(site: AdaptedSite) -> float | None:
    """Return how far the effect of a change of the weight differs from the product, as a share of the product.

    For a weight that the forward reads: the share of this effect that bypasses the attribute, where an adapter cannot
    act.

    Returns:
        ``None`` if this cannot be tried: the weight is quantized, sharded, offloaded or has no values, the forward
        needs more than one input, or its output is not finite or has a different shape.
    """
    owner, layer = site.owner, site.layer
    weight = layer.weight_of(owner)
    if weight is None or type(weight.data) is not Tensor or weight.is_meta or not weight.numel():
        return None
    if layer.is_quantized or not isinstance(site.place, Plain):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    out_features, in_features = layer.shape[-2:]
    wide = torch.promote_types(weight.dtype, torch.float32)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(weight.device, wide)

    x = drawn(*TOKENS, in_features).to(weight.dtype)
    change = drawn(out_features, 1) * drawn(1, in_features)
    norm = torch.linalg.vector_norm(weight, dtype=wide)
    size = torch.where((norm > 0) & norm.isfinite(), norm, out_features**0.5)
    change *= size / torch.linalg.vector_norm(change)
    changed = nn.Parameter(folded(weight, layer.in_storage_layout(change)), requires_grad=False)
    if layer.is_read:
        tried = [_outputs(site, x, *both) for both in ((weight, weight), (weight, changed), (changed, changed))]
        before, as_read, after = (torch.cat([*map(torch.flatten, outputs), x.new_empty(0)]) for outputs in tried)
        difference, whole = (after - as_read).to(wide), (after - before).to(wide)
    else:
        whole = x.to(wide) @ change.T
        tried = [_outputs(site, x, held) for held in (weight, changed)]
        if any([output.shape for output in outputs] != [whole.shape] for outputs in tried):
            return None
        ((before,), (after,)) = tried
        difference = after.to(wide) - before.to(wide) - whole
    share = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(whole))
    return share if math.isfinite(share) else None


def _outputs(site: AdaptedSite, x: Tensor, held: Any, read: Tensor | None = None) -> list[Tensor]:
    """Return the tensors that a forward returns if its module holds a weight (and code reads ``read``, if given).

    There is none if the forward needs other arguments, or a different kind of input.
    """
    owner, layer = site.owner, site.layer
    forward: Callable[..., Any] = layer.own_forward or MethodType(plain_class(owner).forward, owner)
    with undone([owner], [layer]):
        owner.eval()
        owner._parameters[layer.attribute] = held
        if read is not None:
            layer.__dict__["value"] = lambda _: read
        try:
            output = run_forward(owner, forward, x)
        except Exception:
            return []
    return [each for each in (output if isinstance(output, tuple) else [output]) if isinstance(each, Tensor)]

"""`update_norms` and `limit_norms`: how large the update of each layer is, and keeping it from growing larger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import AdapterError, ConfigError, raise_collected
from randlora.hints import is_finite, shortly
from randlora.layer_options import Factor
from randlora.model.trainable import offloaded_diagonals
from randlora.model.view import View, opened
from randlora.places import place_at
from randlora.state import Adapter, require_unmerged
from randlora.targets.options import by_target
from randlora.targets.site import AdaptedSite


def update_norms(model: nn.Module, *, name: str | None = None) -> dict[str, Tensor]:
    """Compute about the Frobenius norm of the update of each layer, without forming it.

    It is the norm that the update would have if its ``r·num_bases`` terms of rank one were orthogonal, as columns of
    random bases nearly are: ``‖ΔW‖² ≈ s² · Σ_kj Λ_kj² · ‖B_kj‖² · Σ_c A_kc² Γ_jc²``. With random Λ and Γ it is within
    about 1 % in layers of some hundred features. Training aligns the terms, the more so the smaller r is: see the page
    on training. Gradients reach Λ and Γ, so that it can be a part of a loss.
    ``randlora.delta_weight(model, fqn, name=name).norm()`` is exact, and forms the update.

    Args:
        model: A model with adapters.
        name: The adapter; may be left out if the model has only one. Its own update is meant, with factor 1 and whether
            it is active or merged or not. What several updates add up to depends on whether they are on the same
            bases, so that only `delta_weight` says it.

    Returns:
        Tensors of no dimensions by FQN, each on its layer's device, in float32, or float64 if Λ is. A stack of matrices
        has one. If the model is sharded, this is a collective: every process calls it and gets the same.

    Raises:
        AdapterError: If the model has no adapter, or none of that name, or accelerate offloads Λ and Γ. Also where
            gradients could not reach them, as under DeepSpeed's ZeRO-3, unless it is called under `torch.no_grad`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _ = randlora.inject(model, r=8)
        >>> penalty = sum(norm**2 for norm in randlora.update_norms(model).values())
        >>> penalty.item()
        0.0
    """
    doing = "compute the norms of the updates"
    with opened(model, doing) as view:
        return _norms(*_sites_of(view, name, doing))


@torch.no_grad()
def limit_norms(model: nn.Module, limit: Factor, *, name: str | None = None) -> dict[str, Tensor]:
    """Scale down Λ, in place, of each layer whose update has a norm above a limit, so that its norm is the limit.

    The norms are those of `update_norms`. Other layers keep every bit, and so does a layer whose norm is not finite.
    Call it after each step of the optimizer, whose state does not change. Nothing waits for a GPU. An optimizer that
    has its own copies of the parameters, as DeepSpeed's in half precision, would overwrite what is written.

    Args:
        model: A model with adapters.
        limit: The largest norm of the update of a layer: one number for all, or a mapping from patterns of layers to
            numbers, as `randlora.activate` takes factors. `math.inf` leaves a layer as it is.
        name: The adapter; may be left out if the model has only one. It need not be trainable.

    Returns:
        The norms before, by FQN, as of `update_norms`. If the model is sharded, this is a collective.

    Raises:
        AdapterError: If the model has no adapter, or none of that name, or adapters are merged, or if values that are
            written would be lost: Λ is offloaded by accelerate or partitioned by DeepSpeed's ZeRO-3.
        ConfigError: If the limit is no number of at least 0, or a pattern matches no layer, or a layer has none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _ = randlora.inject(model, r=8)
        >>> limits = {"0": 0.1 * model[0].weight.norm().item()}
        >>> before = randlora.limit_norms(model, limits)
    """
    doing = "limit the norms of the updates"
    with opened(model, doing) as view:
        adapter, sites = _sites_of(view, name, doing)
        require_unmerged(view.state, doing)
        limits = _limits(limit, [site.fqn for site in sites])
        lambdas = {site.fqn: site.layer.diagonals_of(site.owner, adapter.name)[0] for site in sites}
        problems = [
            f"{fqn} is partitioned by ZeRO-3, whose optimizer has copies of the values and would write them back"
            for fqn, lam in [*lambdas.items()][:1]
            if not place_at(lam).is_lasting
        ]
        raise_collected(AdapterError, problems, doing=doing)
        norms = _norms(adapter, sites)
        for fqn, norm in norms.items():
            is_above = (norm > limits[fqn]) & norm.isfinite()
            factor = torch.where(is_above, limits[fqn] / norm, 1.0)
            lam = lambdas[fqn]
            held = place_at(lam).read()
            held.mul_(factor.to(held.device))
        return norms


def _sites_of(view: View, name: str | None, doing: str) -> tuple[Adapter, list[AdaptedSite]]:
    """Return an adapter and its layers, whose Λ and Γ can be read."""
    adapter = view.state.adapter(name)
    raise_collected(AdapterError, offloaded_diagonals(view.census), doing=doing)
    return adapter, [site for site in view.census.adapted if adapter.name in site.layer.adapters]


def _norms(adapter: Adapter, sites: list[AdaptedSite]) -> dict[str, Tensor]:
    found = {}
    for site in sites:
        (update,) = site.layer.whole_updates(site.owner, {adapter.name: 1.0})
        own = site.layer.diagonals_of(site.owner, adapter.name)
        is_cut = any(
            each.requires_grad > value.requires_grad
            for each, value in zip(own, (update.lam, update.gamma), strict=True)
        )
        if is_cut and torch.is_grad_enabled():
            raise AdapterError(
                f"the norm of the update of {site.fqn} would give no gradients to its Λ and Γ, which are gathered from "
                "other processes: call update_norms under torch.no_grad(), where it cannot be a part of the loss"
            )
        found[site.fqn] = update.norm(site.layer.device_beside(site.owner))
    return found


def _limits(limit: Any, fqns: list[str]) -> dict[str, float]:
    """Return the limit of each layer."""
    given = limit if isinstance(limit, Mapping) else {"": limit}
    problems = []
    for pattern, number in given.items():
        of = f" of {pattern!r}" if isinstance(limit, Mapping) else ""
        if not isinstance(pattern, str):
            problems.append(f"the limit must have patterns of layers as keys, got {shortly(pattern)}")
        elif isinstance(number, bool) or not isinstance(number, Real) or not _is_limit(number):
            problems.append(f"the limit{of} must be a number of at least 0, got {shortly(number)}")
    if not problems:
        found, problems = by_target("limit", limit, fqns)
    raise_collected(ConfigError, problems, doing="limit the norms of the updates")
    return {fqn: float(number) for fqn, number in found.items()}


def _is_limit(number: Real) -> bool:
    return number == math.inf or (is_finite(number) and float(number) >= 0)

"""The updates of adapters: computing one, their norms, and limiting these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from randlora.config import Factor
from randlora.errors import AdapterError, ConfigError, TargetError, raise_collected
from randlora.hints import is_finite, require_types, shortly
from randlora.model.install import lost_sites, offloaded_diagonals
from randlora.model.view import View, collective, opened
from randlora.places import NOT_LASTING, place_at
from randlora.ranks import agree, run_collectives
from randlora.state import Adapter, require_unmerged
from randlora.targets.census import AdaptedSite
from randlora.targets.left_out import computed_weights
from randlora.targets.match import nearest_names
from randlora.targets.options import by_target


@collective(writes=False)
def delta_weight(model: nn.Module, fqn: str, *, name: str | None = None) -> Tensor:
    """Return the update of one layer's weight.

    Args:
        model: A model with adapters.
        fqn: The layer's fully qualified name.
        name: One adapter, with factor 1. ``None`` means the sum of the active adapters with their factors.

    Returns:
        ``(out_features, in_features)`` for every kind of layer, in float32, or in float64 if the weight is in float64.
        Of a table whose rows are trained, it is what they differ by from the table, zero elsewhere.
        If the model is sharded, this is a collective: every process calls it and gets the whole update.

    Raises:
        AdapterError: If the model has no adapter of that name, or its values cannot be read.
        TargetError: If the layer is not adapted.
    """
    require_types(delta_weight, {"fqn": fqn, "name": name})
    doing = f"compute the update of {fqn}"
    with opened(model, doing) as view:
        sites = {site.fqn: site for site in view.census.adapted}
        if fqn not in sites:
            raise TargetError(f"{fqn!r} is not adapted; the nearest adapted layers are {nearest_names(fqn, sites)}")
        site = sites[fqn]
        raise_collected(AdapterError, [*offloaded_diagonals(view.census), *computed_weights([site])], doing=doing)
        factors = site.layer.factors(view.state.active) if name is None else {view.state.adapter(name).name: 1.0}
        agree()
        return site.layer.delta_weight(site.owner, factors)


@collective(writes=False)
def update_norms(model: nn.Module, *, name: str | None = None) -> dict[str, Tensor]:
    """Return the approximate Frobenius norm of each layer's update, without forming the update.

    This is the norm that the update would have if its ``r·num_bases`` terms of rank one were orthogonal, which columns
    of random bases nearly are: ``‖ΔW‖² ≈ s² · Σ_kj Λ_kj² · ‖B_kj‖² · Σ_c A_kc² Γ_jc²``. Training aligns the terms; see
    the page on training. Gradients reach Λ and Γ, so the norms can be part of a loss. The exact norm, which forms the
    update, is ``randlora.delta_weight(model, fqn, name=name).norm()``.

    Args:
        model: A model with adapters.
        name: The adapter; may be left out if the model has only one. The norms are those of its update with factor 1,
            active, merged or not. For the norm of a sum of updates, use `delta_weight`.

    Returns:
        Tensors without dimensions by FQN, each on its layer's device, in float32, or in float64 if Λ is in float64. If
        the model is sharded, this is a collective.

    Raises:
        AdapterError: If the model has no adapter with this name, or its values cannot be read. Under DeepSpeed's
            ZeRO-3, where gradients cannot reach Λ and Γ, also unless it is called under `torch.no_grad`.
    """
    doing = "compute the norms of the updates"
    with opened(model, doing) as view:
        return _norms(*_sites_of(view, name, doing))


@collective(writes=True)
@torch.no_grad()
def limit_norms(model: nn.Module, limit: Factor, *, name: str | None = None) -> dict[str, Tensor]:
    """Scale down Λ, in place, in each layer whose update has a norm above a limit, to the limit.

    The norms are those of `update_norms`. Other layers, and layers with a norm that is not finite, keep every bit. Call
    this after each step of the optimizer. Optimizers with their own copies of the parameters, such as DeepSpeed's in
    half precision, would overwrite the new values.

    Args:
        model: A model with adapters.
        limit: The largest norm of a layer's update: one number for all layers, or a mapping from patterns of layers to
            numbers, like the factors of `randlora.activate`. `math.inf` leaves a layer as it is.
        name: The adapter; may be left out if the model has only one. It need not be trainable.

    Returns:
        The norms before the call, by FQN, as from `update_norms`. If the model is sharded, this is a collective.

    Raises:
        AdapterError: If the model has no adapter with this name, adapters are merged, or new values would be lost
            because accelerate offloads Λ or DeepSpeed's ZeRO-3 partitions it.
        ConfigError: If a limit is not a number of at least 0, a pattern matches no layer, or a layer has no limit.
    """
    doing = "limit the norms of the updates"
    with opened(model, doing) as view:
        adapter, sites = _sites_of(view, name, doing)
        require_unmerged(view.state, doing)
        limits = _limits(limit, [site.fqn for site in sites])
        lambdas = {site.fqn: site.layer.diagonals_of(site.owner, adapter.name)[0] for site in sites}
        first = next(iter(lambdas))
        if not place_at(lambdas[first]).is_lasting:
            raise AdapterError(f"cannot {doing}: {first} {NOT_LASTING}")
        norms = _norms(adapter, sites)
        held = {fqn: place_at(lam).read() for fqn, lam in lambdas.items()}
        factors = {
            fqn: torch.where((norm > limits[fqn]) & norm.isfinite(), limits[fqn] / norm, 1.0).to(held[fqn].device)
            for fqn, norm in norms.items()
        }
        agree()  # before anything is written
        for fqn, factor in factors.items():
            held[fqn].mul_(factor)
        return norms


def _sites_of(view: View, name: str | None, doing: str) -> tuple[Adapter, list[AdaptedSite]]:
    adapter = view.state.adapter(name)
    sites = [site for site in view.census.adapted if adapter.name in site.layer.adapters and not site.layer.is_rows]
    raise_collected(AdapterError, lost_sites(view.census, [adapter]), doing=doing)
    raise_collected(AdapterError, [*offloaded_diagonals(view.census), *computed_weights(sites)], doing=doing)
    return adapter, sites


def _norms(adapter: Adapter, sites: list[AdaptedSite]) -> dict[str, Tensor]:
    def norm_of(site: AdaptedSite) -> Tensor:
        (update,) = site.layer.whole_updates(site.owner, {adapter.name: 1.0})
        own = site.layer.diagonals_of(site.owner, adapter.name)
        pairs = zip(own, (update.lam, update.gamma), strict=True)
        if torch.is_grad_enabled() and any(each.requires_grad > value.requires_grad for each, value in pairs):
            advice = "which are gathered from other processes: call this under torch.no_grad()"
            raise AdapterError(f"the update of {site.fqn} would give no gradients to its Λ and Γ, {advice}")
        return update.norm(site.layer.device_beside(site.owner))

    agree()
    norms = run_collectives(partial(norm_of, site) for site in sites)
    return {site.fqn: norm for site, norm in zip(sites, norms, strict=True)}


def _limits(limit: Any, fqns: list[str]) -> dict[str, float]:
    problems, by_pattern = [], isinstance(limit, Mapping)
    for pattern, number in (limit if by_pattern else {"": limit}).items():
        of = f" of {pattern!r}" if by_pattern else ""
        is_number = isinstance(number, Real) and not isinstance(number, bool)
        if not isinstance(pattern, str):
            problems.append(f"the limit must have patterns of layers as keys, got {shortly(pattern)}")
        elif not is_number or not (number == math.inf or (is_finite(number) and float(number) >= 0)):
            problems.append(f"the limit{of} must be a number of at least 0, got {shortly(number)}")
    if not problems:
        found, problems = by_target("limit", limit, fqns)
    raise_collected(ConfigError, problems, doing="limit the norms of the updates")
    return {fqn: float(number) for fqn, number in found.items()}

"""`combine`: a new adapter whose update is a weighted sum of the updates of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.config import ALPHA_PER_RANK
from randlora.errors import AdapterError, raise_collected
from randlora.hints import shortly
from randlora.layers.weight import Update
from randlora.model.install import add, lost_parts, offloaded_diagonals
from randlora.model.switch import factor_problems
from randlora.model.view import collective, opened, opened_to_add
from randlora.places import has_values
from randlora.ranks import agree, run_collectives
from randlora.report import Report, adapter_report, next_steps
from randlora.state import Adapter
from randlora.targets.census import AdaptedSite, shapes_of, sizes
from randlora.targets.left_out import obstacles
from randlora.targets.match import shortened
from randlora.targets.options import options_by_target

ROUNDINGS = 16  # how many roundings of Λ and Γ a sum may be off and still count as exact

INSTEAD = "activate the adapters with factors, which is exact, or merge one after the other"


@collective(writes=True)
@torch.inference_mode(mode=False)  # what is made here may be trained, whatever mode the caller is in
@torch.no_grad()
def combine(model: nn.Module, adapters: Mapping[str, float], *, name: str) -> Report:
    """Add an adapter whose update is a weighted sum of the updates of others.

    The new adapter saves and loads like any other. A single adapter can represent the sum exactly only if all adapters
    share their bases and, in each layer and for each basis, their Γ (or their Λ) are multiples of one another, such as
    when only Λ was trained. A layer that only one of them changes can always be summed. To add any adapters exactly
    without a new one, use `activate` with factors.

    The new adapter takes the options of the first adapter named, and r and alpha of each layer from the first adapter
    that adapts it. It has ``train="lambda"`` only if all have it. It is neither active nor trainable. If the model is
    sharded, all processes call this together.

    Args:
        model: A model with adapters.
        adapters: The factors of the sum by the names of the adapters, as finite numbers.
        name: The name of the new adapter.

    Returns:
        A report as from `randlora.inject`.

    Raises:
        AdapterError: If an adapter is unknown or has parameters of ``train_also``, the name is taken, the adapters are
            merged, a sum is not exact, or the adapters differ in their bases, ``in_proj`` or ``experts``. The model is
            then unchanged.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, name="a")
        >>> _ = randlora.inject(model, r=4, name="b")
        >>> randlora.serving.combine(model, {"a": 0.7, "b": -0.3}, name="c").rule
        'the sum 0.7·a + -0.3·b'
    """
    with opened(model, None) as found:  # it may be inside of a wrapper
        root = found.root
    with opened_to_add(root, [name], "combine adapters into") as view:
        census, state = view.census, view.state
        if not isinstance(adapters, Mapping) or not adapters:
            raise AdapterError(f"expected a mapping from names of adapters to factors, got {shortly(adapters)}")
        raise_collected(AdapterError, factor_problems(state, adapters), doing="combine")
        sources = [state.adapters[name] for name in adapters]
        names = {source.name for source in sources}
        sites = [site for site in census.adapted if not (site.layer.is_rows or names.isdisjoint(site.layer.adapters))]
        problems = [*lost_parts(census, state, sources), *offloaded_diagonals(census)]
        problems += obstacles(census, sites, sources[0].config.dropout)
        problems += _form_problems(sites, sources)
        raise_collected(AdapterError, problems, doing="combine")
        adapter = _planned(name, sites, sources, adapters)
        agree()
        updates = run_collectives(partial(site.layer.whole_updates, site.owner, dict(adapters)) for site in sites)
        values = _values(adapter, sites, updates)
        notes = next_steps(name, is_active=False, is_trainable=True)
        shapes = shapes_of(sites, adapter.config)
        report = adapter_report(census, adapter, shapes, is_active=False, is_trainable=False, notes=notes)
        add(census, state, adapter, sites, replaced={}, active=False, trainable=False, values=values)
        return report


def _form_problems(sites: Iterable[AdaptedSite], sources: Sequence[Adapter]) -> list[str]:
    """Return messages about adapters of which not all can be summed, or that adapt layers in different ways."""
    first = sources[0]
    problems = [
        f"{source.name!r} trained {shortened([*source.trained, *source.rows])} with train_also or train_rows, which "
        "combine does not sum: activate the adapters with factors, or train without these"
        for source in sources
        if source.trained or source.rows
    ]
    bases: dict[int, tuple[Adapter, Basis]] = {r: (first, basis) for r, basis in first.bases.items()}
    for source in sources[1:]:
        for r, basis in source.bases.items():
            other, held = bases.setdefault(r, (source, basis))
            if basis.identity != held.identity:
                problems.append(f"{source.name!r} is on {basis.spec}, and {other.name!r} on {held.spec}: {INSTEAD}")
            elif other is source and not basis.spec.is_of(first.config, r):
                problems.append(f"{source.name!r} is on {basis.spec}, but {first.name!r} has no such bases: {INSTEAD}")
    for site in sites:
        here, wanted = site.layer.adapters, site.shape_with(first.config)
        site_adapters = {source.name: here[source.name] for source in sources if source.name in here}
        problems += [
            f"{name!r} adapts {site.fqn} as {sizes(site_adapter.shape)}, and one like {first.name!r} as "
            f"{sizes(wanted)}: combine adapters of equal in_proj and experts"
            for name, site_adapter in site_adapters.items()
            if site_adapter.shape != wanted
        ]
        if len(ranks := {site_adapter.options.r for site_adapter in site_adapters.values()}) > 1:
            problems.append(
                f"{' and '.join(site_adapters)} have r={' and '.join(map(str, ranks))} in {site.fqn}: {INSTEAD}"
            )
        if not next(iter(site_adapters.values())).scaling:
            problems.append(f"{next(iter(site_adapters))!r} has alpha=0 in {site.fqn}, so there is no update")
        if not all(has_values(each) for name in site_adapters for each in site.layer.diagonals_of(site.owner, name)):
            problems.append(f"{site.fqn} has no values (meta or fake): load the model first")
    return problems


def _planned(
    name: str, sites: Sequence[AdaptedSite], sources: Sequence[Adapter], adapters: Mapping[str, float]
) -> Adapter:
    """Return the new adapter, without values."""
    first = sources[0]
    options = {
        site.fqn: next(site.layer.adapters[each.name].options for each in sources if each.name in site.layer.adapters)
        for site in sites
    }
    has_default_alpha = all(alpha == ALPHA_PER_RANK * r for r, alpha in options.values())
    alphas = None if has_default_alpha else {fqn: alpha for fqn, (_, alpha) in options.items()}
    is_alone = all(each.config.train == "lambda" for each in sources)  # else Γ may be one that was trained
    config = replace(first.config, alpha=alphas, train="lambda" if is_alone else "both")
    if options.keys() != first.options.keys():
        config = replace(config, targets=list(options), exclude=None)
    used = {r for r, _ in options.values()}
    bases = {r: basis for source in reversed(sources) for r, basis in source.bases.items() if r in used}
    rule = "the sum " + " + ".join(f"{factor:g}·{name}" for name, factor in adapters.items())
    return Adapter(name, options_by_target(config, options), bases, options, rule, peft_fields=dict(first.peft_fields))


def _values(
    adapter: Adapter, sites: Iterable[AdaptedSite], updates: Iterable[Sequence[Update]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return Λ and Γ of the sum by FQN. Raises an `AdapterError` if a layer's sum is not exact or not finite."""
    found, inexact, infinite = {}, [], []
    for site, own in zip(sites, updates, strict=True):
        device = site.layer.device_beside(site.owner)
        lam, gamma, is_exact = summed(own, adapter.options[site.fqn].scaling)
        found[site.fqn] = lam.to(device), gamma.to(device)
        if not (lam.isfinite().all() and gamma.isfinite().all()):
            infinite.append(site.fqn)
        elif not is_exact:
            inexact.append(site.fqn)
    if infinite:
        raise AdapterError(
            f"the sum would not be finite in {shortened(infinite)}: check the adapters, or give smaller factors"
        )
    if inexact:
        raise AdapterError(
            f"no adapter has exactly this sum in {shortened(inexact)}, where both Λ and Γ differ: {INSTEAD}"
        )
    return found


def summed(updates: Sequence[Update], scaling: float) -> tuple[Tensor, Tensor, bool]:
    """Return Λ and Γ of the sum of updates on the same bases, in at least float32, and whether the sum is exact.

    Basis j multiplies column ``k·num_bases + j`` of B and row k of A by ``lam[k, j] · gamma[j, c]``, a matrix of rank
    one. The sum is an update if, for each basis, the sum of these matrices has rank one again. It then keeps the Γ of
    the largest term (if all other Γ are multiples of it), or its Λ likewise.
    """
    dtype = reduce(torch.promote_types, [update.lam.dtype for update in updates], torch.float32)
    at = torch.device("cpu") if updates[0].lam.device.type == "mps" else updates[0].lam.device  # it has no float64
    # both are (terms, …, bases, features)
    lam = torch.stack([update.lam.detach().to(at, torch.float64) * (update.scaling / scaling) for update in updates]).mT
    gamma = torch.stack([update.gamma.detach().to(at, torch.float64) for update in updates])
    lam_sizes, gamma_sizes = lam.norm(dim=-1, keepdim=True), gamma.norm(dim=-1, keepdim=True)
    largest = (lam_sizes * gamma_sizes).argmax(0, keepdim=True)
    one_lam, one_gamma = (each.take_along_dim(largest, 0) for each in (lam, gamma))

    by_lam, by_gamma = _shares(lam, one_lam), _shares(gamma, one_gamma)
    left_by_lam = ((lam - by_lam * one_lam).norm(dim=-1, keepdim=True) * gamma_sizes).sum(0)
    left_by_gamma = ((gamma - by_gamma * one_gamma).norm(dim=-1, keepdim=True) * lam_sizes).sum(0)
    keeps_gamma = (left_by_gamma <= left_by_lam) & one_gamma[0].any(-1, keepdim=True)  # else Γ could not be trained
    new_lam = torch.where(keeps_gamma, (by_gamma * lam).sum(0), one_lam[0])
    new_gamma = torch.where(keeps_gamma, one_gamma[0], (by_lam * gamma).sum(0))
    left = torch.where(keeps_gamma, left_by_gamma, left_by_lam)
    is_exact = left.norm() <= ROUNDINGS * torch.finfo(dtype).eps * (lam_sizes * gamma_sizes).norm()
    return new_lam.mT.contiguous().to(dtype), new_gamma.to(dtype), bool(is_exact)


def _shares(vectors: Tensor, one: Tensor) -> Tensor:
    """Return the multiple of one vector that is nearest to each."""
    squares = one.square().sum(-1, keepdim=True)
    return torch.where(squares > 0, (vectors * one).sum(-1, keepdim=True) / squares, 0.0)

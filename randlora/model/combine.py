"""`combine`: a new adapter whose update is a weighted sum of the updates of others."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec, sliced_dims, spec_for
from randlora.config import ALPHA_PER_RANK
from randlora.errors import AdapterError, ConfigError, raise_collected
from randlora.hints import is_finite, require_types, shortly
from randlora.layer_options import by_rank
from randlora.layers.combined import Combined, Method, combined
from randlora.meant import NotTheModel
from randlora.model.factors import factor_problems
from randlora.model.install import commit, lost_sites, prepare
from randlora.model.train_also import copy_dtype, lost_parameters, replacements
from randlora.model.trainable import offloaded_diagonals
from randlora.model.view import opened, opened_to_add
from randlora.modes import has_values
from randlora.placement.place import whole
from randlora.placement.ranks import agreed, in_step
from randlora.state import Adapter, ModelState
from randlora.targets.match import shortened
from randlora.targets.obstacles import obstacles
from randlora.targets.options import listed
from randlora.targets.site import AdaptedSite, shapes_of, sizes


@dataclass(frozen=True)
class CombineReport(NotTheModel):
    """What `combine` made.

    Attributes:
        name: The new adapter.
        adapters: The factors of the adapters that it was made of, by name.
        errors: The distance of its update of each layer from the sum of theirs, as a share of the norm of that sum, by
            FQN: 0 where it is exact up to the rounding of Λ and Γ.
    """

    name: str
    adapters: Mapping[str, float]
    errors: Mapping[str, float]

    @property
    def is_exact(self) -> bool:
        """Whether its update of every layer is the sum, up to the rounding of Λ and Γ."""
        return not any(self.errors.values())

    def __str__(self) -> str:
        """Return one line."""
        made = " + ".join(f"{factor:g}·{name}" for name, factor in self.adapters.items())
        fitted = {fqn: error for fqn, error in self.errors.items() if error}
        if not fitted:
            return f"{self.name} = {made}: exact in {len(self.errors)} layers"
        worst = max(fitted, key=lambda fqn: fitted[fqn])
        return (
            f"{self.name} ≈ {made}: exact in {len(self.errors) - len(fitted)} layers, fitted in {len(fitted)} with a "
            f"relative error of at most {fitted[worst]:.2g} ({worst})"
        )


@torch.inference_mode(mode=False)  # what is made here may be trained, whatever mode the caller is in
@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Mapping[str, float],
    *,
    name: str,
    method: Method = "exact",
    tolerance: float = 0.1,
    like: str | None = None,
) -> CombineReport:
    """Add an adapter whose update is a weighted sum of the updates of others, which saves and loads like any other.

    It is on the bases of one of them, ``like``, and has its options. r and alpha of a layer are those of the first
    adapter that has it, beginning with ``like``. Parameters of ``train_also`` become the model's own plus the weighted
    sum of what each adapter changed. It is neither active nor trainable.

    The sum is such an update exactly if in each layer and for each basis the Γ of the adapters are multiples of one
    another, or the Λ are, as of adapters of which only Λ was trained; and where only one of them changes a layer.
    `activate` with factors is exact for all adapters, without making a new one.

    Args:
        model: A model with adapters.
        adapters: The factors of the sum, by the names of the adapters; any finite numbers.
        name: The name of the new adapter.
        method: ``"exact"`` raises an error if a layer's sum is not exact; ``"fit"`` then takes Λ and Γ whose update is
            near the sum, by alternating least squares.
        tolerance: The largest relative error of a fitted layer.
        like: The adapter whose bases and options the new one has; ``None`` means the first of ``adapters``.

    Returns:
        A report with the error of each layer.

    Raises:
        AdapterError: If an adapter is unknown, the name is taken, the adapters are merged, a sum is not exact or not
            within the tolerance, or the adapters differ in ``in_proj`` or ``experts``. The model is then unchanged.
        ConfigError: For an unknown method, a tolerance that is no positive number, or if no config of ``like`` fits the
            layers of the others, or its bases for them cannot be drawn.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, name="a"), randlora.inject(model, r=4, name="b")
        >>> print(randlora.combine(model, {"a": 0.7, "b": -0.3}, name="c"))
        c = 0.7·a + -0.3·b: exact in 1 layers
    """
    require_types(combine, {"method": method, "like": like})
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not is_finite(tolerance) or tolerance <= 0:
        raise ConfigError(f"tolerance must be a positive number, got {shortly(tolerance)}")
    with opened(model, None) as found:  # it may be inside of a wrapper
        root = found.root
    with opened_to_add(root, [name], "combine adapters into") as view:
        census, state = view.census, view.state
        sources = _sources(state, adapters, like)
        sites = [site for site in census.adapted if any(source.name in site.layer.adapters for source in sources)]
        lost = [*lost_sites(census, sources), *lost_parameters(state, sources), *offloaded_diagonals(census)]
        unfit = obstacles(census, sites, sources[0].config.dropout)
        raise_collected(AdapterError, [*lost, *unfit, *_form_problems(state, sites, sources)], doing="combine")
        adapter, shared = _planned(state, name, sites, sources)
        for r in adapter.bases.keys() - shared.keys():
            adapter.bases[r].matrices()  # as in inject: some cannot be drawn
        with agreed(view.ranks()):
            updates = {site.fqn: site.layer.whole_updates(site.owner, dict(adapters)) for site in sites}
            copies = _copies(state, adapters, sources)
        found = {}
        for site in sites:
            part = adapter.at(site.fqn, site.shape_with(adapter.config))
            found[site.fqn] = combined(part, updates[site.fqn], method, site.layer.device_beside(site.owner))
        _require_near(found, method, tolerance)
        values = {fqn: (each.lam, each.gamma) for fqn, each in found.items()}
        adapter.bases |= shared
        adapter.trained |= {fqn: nn.Parameter(copy, requires_grad=False) for fqn, copy in copies.items()}
        replaced = replacements(census, state, copies)
        addition = prepare(state, adapter, sites, values=values, replaced=replaced, trainable=False)
        commit(census, addition, active=False)
        return CombineReport(name, dict(adapters), {fqn: each.error for fqn, each in found.items()})


def _sources(state: ModelState, adapters: object, like: str | None) -> list[Adapter]:
    """Return the adapters that are summed, the one whose options are taken first."""
    if not isinstance(adapters, Mapping) or not adapters:
        raise AdapterError(f"expected a mapping from names of adapters to factors, got {shortly(adapters)}")
    raise_collected(AdapterError, factor_problems(state, adapters), doing="combine")
    if like is not None and like not in adapters:
        raise AdapterError(f"like must be one of the adapters that are combined, {', '.join(adapters)}, got {like!r}")
    names = sorted(adapters, key=lambda name: name != like)  # the others in their order
    return [state.adapters[name] for name in names]


def _form_problems(state: ModelState, sites: Iterable[AdaptedSite], sources: Sequence[Adapter]) -> list[str]:
    """Return messages about what cannot be summed, or not into an adapter like the first."""
    first = sources[0]
    problems = [
        f"{source.name!r} adapts {site.fqn} as {sizes(part.shape)}, and one like {first.name!r} as {sizes(wanted)}: "
        "combine adapters of equal in_proj and experts"
        for site in sites
        for wanted in [site.shape_with(first.config)]
        for source in sources
        if (part := site.layer.adapters.get(source.name)) is not None and part.shape != wanted
    ]
    problems += [
        f"{site.fqn} has no values (meta or fake): load the model first"
        for site in sites
        if any(
            not has_values(each)
            for source in sources
            if source.name in site.layer.adapters
            for each in site.layer.diagonals_of(site.owner, source.name)
        )
    ]
    problems += [
        f"{source.name!r} has buffers ({shortened([*source.buffers])}), which have no sum: activate the adapters "
        "with factors, or train without these in train_also"
        for source in sources
        if source.buffers
    ]
    weights = {id(site.weight) for site in sites}
    problems += [
        f"{source.name!r} trained a copy of {fqn}, a weight that the new adapter would adapt: leave one of both out"
        for source in sources
        for fqn in source.trained
        if not (entry := state.replaced[fqn]).is_lost and id(entry.live) in weights
    ]
    return problems + [
        f"{source.name!r} trained {fqn}, whose shape has changed: leave it out"
        for source in sources
        for fqn, copy in source.trained.items()
        if not state.replaced[fqn].fits(copy)
    ]


def _planned(
    state: ModelState, name: str, sites: Sequence[AdaptedSite], sources: Sequence[Adapter]
) -> tuple[Adapter, dict[int, Basis]]:
    """Return the new adapter, without values, and those of its bases that the model has, by r.

    The adapter has others in their places that are equal, so that a call that raises does not extend the model's.
    """
    first = sources[0]
    options = {
        site.fqn: next(site.layer.adapters[each.name].options for each in sources if each.name in site.layer.adapters)
        for site in sites
    }
    has_default_alpha = all(alpha == ALPHA_PER_RANK * r for r, alpha in options.values())
    config = replace(
        first.config, alpha=None if has_default_alpha else {fqn: alpha for fqn, (_, alpha) in options.items()}
    )
    trained = dict.fromkeys(fqn for source in sources for fqn in source.trained)
    if trained.keys() != first.trained.keys():
        config = replace(config, train_also=list(trained))
    if options.keys() != first.options.keys():
        config = replace(config, targets=list(options), exclude=None)
    config = listed(config, options)
    bases, shared = {}, {}
    for r, own in by_rank(shapes_of(sites, config), options).items():
        spec, used = spec_for(config, r, own), sliced_dims(own)
        held = _held(state, sources, spec, used)
        if held is None:
            bases[r] = Basis(spec)
            bases[r].extend(*used)
            continue
        shared[r] = bases[r] = held
        if any(size > most for size, most in zip(used, held.extent, strict=True)):
            bases[r] = Basis(held.spec, held.extent)
            bases[r].extend(*used)
    rule = "combined from " + " and ".join(repr(source.name) for source in sources)
    return Adapter(name, config, bases, options, rule, peft_fields=dict(first.peft_fields)), shared


def _held(state: ModelState, sources: Sequence[Adapter], spec: BasisSpec, used: tuple[int, int]) -> Basis | None:
    """Return bases of the model for a spec: those of one of the adapters that are summed, if possible."""
    for source in sources:
        basis = source.bases.get(spec.r)
        if basis is None or not (source is sources[0] or basis.spec.is_of(sources[0].config, spec.r)):
            continue
        largest = (basis.spec.max_dim, basis.spec.min_dim) if basis.stored is None else basis.extent
        covers = all(size <= most for size, most in zip(used, largest, strict=True))
        if covers or (basis.stored is None and basis.spec.is_prefix_stable):
            return basis
    return state.bank.find(spec, used=used)


def _copies(state: ModelState, adapters: Mapping[str, float], sources: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the parameters trained with the adapters: the model's own plus the weighted sum of their changes."""
    found = {}
    for fqn in dict.fromkeys(fqn for source in sources for fqn in source.trained):
        trained = {source.name: source.trained[fqn] for source in sources if fqn in source.trained}
        own = state.replaced[fqn].original
        flat = [*in_step(partial(whole, each) for each in (own, *trained.values()))]
        dtype = functools.reduce(torch.promote_types, [each.dtype for each in flat], torch.float32)
        first, *others = [each.detach().to(device=own.device, dtype=dtype) for each in flat]
        factors = [adapters[name] for name in trained]
        total = (1 - sum(factors)) * first
        for factor, other in zip(factors, others, strict=True):
            total = total + factor * other
        found[fqn] = total.to(copy_dtype(state.replaced[fqn]))
    return found


def _require_near(found: Mapping[str, Combined], method: Method, tolerance: float) -> None:
    """Check the result of all layers; else raise `AdapterError`."""
    infinite = [fqn for fqn, each in found.items() if not (each.lam.isfinite().all() and each.gamma.isfinite().all())]
    if infinite:
        raise AdapterError(
            f"the sum would not be finite in {shortened(infinite)}: check the adapters, or give smaller factors"
        )
    far = {fqn: each.error for fqn, each in found.items() if each.error > (tolerance if method == "fit" else 0.0)}
    if far and method == "exact":
        raise AdapterError(
            f"no adapter has exactly this sum in {shortened([*far])}, because both Λ and Γ differ, or the bases do: "
            "activate the adapters with factors, which is exact, or give method='fit' for the nearest adapter"
        )
    if far:
        worst = max(far, key=lambda fqn: far[fqn])
        raise AdapterError(
            f"the nearest adapter has a relative error above tolerance={tolerance:g} in {shortened([*far])}, up to "
            f"{far[worst]:.3g} in {worst}: activate the adapters with factors, which is exact, merge them, or give a "
            "larger tolerance"
        )

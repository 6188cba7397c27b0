"""Adding one adapter to a model and removing all of them: the only code that changes a model's modules.

Everything that can fail happens before `commit` changes the first module, and unforeseen failures are undone, so a call
that raises does not change the model.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from randlora.bases.spec import Shape, sliced_dims
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError, raise_collected
from randlora.hints import shortly
from randlora.layers.base import AdapterLayer
from randlora.layers.diagonals import Gamma
from randlora.layers.in_place import adapter_layers_of, add_adapter, detach, detach_obstacle, has_attribute, set_casts
from randlora.model.calls import unwatch, watch
from randlora.model.change import all_or_nothing, set_requires_grad
from randlora.model.engines import require_averaged, tell_added, tell_changed
from randlora.model.save_guard import guard_saving, unguard_saving
from randlora.model.train_also import lost_parameters, remembered
from randlora.modes import fake_obstacle
from randlora.options import by_rank
from randlora.places import place_at
from randlora.replaced import CASTS, ReplacedParameter, RequiredGrad, held_at, whole_shape
from randlora.state import (
    ATTRIBUTE,
    Adapter,
    ModelState,
    SavePretrained,
    SiteAdapter,
    attached_state,
    require_unmerged,
)
from randlora.targets.census import Census, Site, sizes
from randlora.targets.obstacles import foreign_adapters, offloaded_with

NOWHERE: tuple[dict[str, SiteAdapter], Shape | None] = {}, None
"""The adapters and the shape of a weight that does not exist in a model."""

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    **dict.fromkeys(
        ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"), "module"
    ),
}
"""Types that wrap a whole model, and the attribute with the model."""


def unwrapped_model(model: nn.Module) -> nn.Module:
    """Return a model without torch's wrappers around it (for compiling it, or for sending gradients)."""
    while (attribute := held_at(model, WRAPPERS)) is not None:
        model = getattr(model, attribute)
    return model


class Addition(NamedTuple):
    """One adapter with all its tensors, ready to be added: each site with its adapter layer, its part, Λ and Γ."""

    state: ModelState
    adapter: Adapter
    layers: list[tuple[Site, AdapterLayer, SiteAdapter, Tensor, Tensor]]
    replaced: Mapping[str, ReplacedParameter]
    trainable: bool
    save_pretrained: SavePretrained | None


def owned_state(census: Census, doing: str) -> ModelState:
    """Return the model's state, or a new one, after checking that adapters can be added."""
    model = census.model
    if (attribute := held_at(model, WRAPPERS)) is not None:
        raise AdapterError(
            f"cannot {doing} through a {type(model).__name__}, which changes the name of every layer; call this on the "
            f"wrapped model.{attribute}"
        )
    if attached_state(model) is None and has_attribute(model, ATTRIBUTE):
        raise AdapterError(f"cannot {doing}: the model already has an attribute {ATTRIBUTE}; rename it")
    raise_collected(AdapterError, foreign_adapters(census), doing=doing)
    for held in census.parameters:
        if (reason := fake_obstacle(held.parameter)) is not None:
            raise AdapterError(f"cannot {doing}: {held.fqn} {reason}")
    state = attached_state(model) or ModelState()
    state.require_loaded(model)
    state.adopt_parameters(model)
    require_own(census, state, doing)
    unfit = [held.fqn for held in census.parameters if not held.parameter.is_leaf]
    if unfit:
        raise AdapterError(f"cannot {doing}: {unfit[0]} is not a leaf tensor and cannot be frozen; detach it")
    require_unmerged(state, doing)
    return state


def require_new_name(state: ModelState, name: str, doing: str) -> None:
    """Raise an `AdapterError` if a new adapter cannot have this name."""
    # torch.export writes the names of parameters as code
    is_name = isinstance(name, str) and name and name.isprintable() and "." not in name
    if not is_name or keyword.iskeyword(name) or name in dir(Gamma({})):
        raise AdapterError(
            f"cannot {doing} an adapter named {shortly(name)}: expected a printable name without dots, "
            "not an attribute of ParameterDict or a keyword of Python"
        )
    if name in state.adapters:
        raise AdapterError(
            f"cannot {doing} {name!r}: the model has an adapter of that name; remove it, or choose a different name"
        )


def require_own(census: Census, state: ModelState, doing: str) -> None:
    """Raise an `AdapterError` if a layer belongs to adapters of a different module, such as a copied layer."""
    for site in census.adapted:
        if site.layer.state is not state:
            raise AdapterError(
                f"cannot {doing} here: {site.fqn} has adapters that were added to a different module (a submodule, a "
                "parent or a copy of this one); call this on that module, or replace the layer"
            )


def prepare(
    state: ModelState,
    adapter: Adapter,
    sites: Iterable[Site],
    *,
    replaced: Mapping[str, ReplacedParameter],
    trainable: bool,
    save_pretrained: SavePretrained | None = None,
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Addition:
    """Create everything that an adapter needs, without changing the model.

    Λ and Γ have the adapter's initial values, or the given ``values``, by FQN. ``replaced`` are the model's own
    parameters that the adapter trains copies of, by FQN.
    """
    raise_collected(AdapterError, shared_slots(state, [*state.adapters.values(), adapter], replaced), doing="add it")
    layers = []
    for site in sites:
        layer = site.adapter_layer or site.layer_class(site.owner, state)
        part = adapter.at(site.fqn, site.shape_with(adapter.config))
        lam, gamma = (
            values[site.fqn] if values else layer.fresh_diagonals(site.owner, part.shape, part.options.r, adapter.init)
        )
        layers.append((site, layer, part, lam, gamma))
    return Addition(state, adapter, layers, replaced, trainable, save_pretrained)


def shared_slots(state: ModelState, adapters: Iterable[Adapter], fqns: Iterable[str]) -> list[str]:
    """Return messages about sharded parameters that several adapters train copies of.

    A sharded parameter takes the values of one copy after the other, so an optimizer would train the wrong copy.
    """
    problems = []
    for fqn in fqns:
        names = [repr(adapter.name) for adapter in adapters if fqn in adapter.trained]
        entry = state.replaced.get(fqn)
        if len(names) > 1 and entry is not None and place_at(entry.installed).exchanges == "values":
            problems.append(
                f"{' and '.join(names)} each train their own copy of {fqn}, which is sharded, so only one adapter can "
                "train it: load each into a separate model, or leave it out of train_also"
            )
    return problems


def commit(census: Census, addition: Addition, *, active: bool) -> None:
    """Add a prepared adapter to the model, as the only active one if ``active``, and freeze the rest."""
    state, adapter = addition.state, addition.adapter
    with all_or_nothing(census, state, [site for site, *_ in addition.layers], addition.replaced.values()):
        if not state.adapters:
            state.buffers_before = remembered(census)
            named = [(held.fqn, held.parameter) for held in census.parameters]
            state.required_grad = RequiredGrad(named)
            state.required_grad.mark(named)
            for _, parameter in named:
                set_requires_grad(parameter, False)  # noqa: FBT003
        for site, layer, part, lam, gamma in addition.layers:
            add_adapter(site.owner, layer, part, lam, gamma, trainable=addition.trainable)
        state.adapters[adapter.name] = adapter
        added_to = [(site.owner, layer, adapter.name) for site, layer, *_ in addition.layers]
        copies = [entry for entry in addition.replaced.values() if addition.trainable and not entry.is_buffer]
        require_averaged(census.model, added_to, copies)
        tell_added(census.model, state, added_to)
        if active:
            state.activate({adapter.name: 1.0})
            added = ((site.owner, layer) for site, layer, *_ in addition.layers)
            for owner, layer in (*((site.owner, site.layer) for site in census.adapted), *added):
                layer.seat(owner)
        shapes = {site.fqn: part.shape for site, _, part, *_ in addition.layers}
        for r, used in by_rank(shapes, adapter.options).items():
            adapter.bases[r].extend(*sliced_dims(used))
            state.bank.add(adapter.bases[r])
        state.replaced.update(addition.replaced)
        for fqn, entry in addition.replaced.items():
            if adapter.trained[fqn].dtype != (dtype := entry.dtype):
                for module, attribute in entry.places.values():
                    set_casts(module, {**vars(module).get(CASTS, {}), attribute: dtype})
        state.require_exchangeable(state.active, f"add {adapter.name!r}")
        state.install_parameters()
        census.model.__dict__[ATTRIBUTE] = state
        tell_changed(census.model)
        now = census.again()
        guard_saving(now, state, addition.save_pretrained)
        watch(now)


def require_detachable(census: Census, doing: str, sites: Iterable[Site] | None = None) -> None:
    """Raise an `AdapterError` unless adapters can be removed and the original classes restored."""
    sites, offloaded = list(census.adapted if sites is None else sites), offloaded_with(census)
    problems = [f"{site.fqn} {reason}" for site in sites if (reason := detach_obstacle(site.owner)) is not None]
    problems += [
        f"{site.fqn} is offloaded by accelerate together with everything in {offloaded[id(site.owner)]}, which would "
        "then miss the adapter: remove accelerate's hooks first"
        for site in sites
        if id(site.owner) in offloaded
    ]
    raise_collected(AdapterError, problems, doing=doing)


def lost_parts(census: Census, state: ModelState, adapters: Iterable[Adapter]) -> list[str]:
    """Return messages about weights and parameters of adapters that are missing or changed in the model."""
    adapters = list(adapters)
    return [*lost_sites(census, adapters), *lost_parameters(state, adapters)]


def lost_sites(census: Census, adapters: Iterable[Adapter]) -> list[str]:
    """Return messages about weights that have lost an adapter because the module was replaced or resized."""
    found = {
        type(layer).site_fqn(visit.fqn): (layer, visit.module)
        for visit in census.visits
        for layer in adapter_layers_of(visit.module).values()
    }
    problems = []
    for config, alike in groupby(adapters, key=lambda adapter: adapter.config):
        here = {fqn: (layer.adapters, _shape_now(layer, owner, config)) for fqn, (layer, owner) in found.items()}
        for name, targets in ((adapter.name, adapter.targets) for adapter in alike):
            for fqn in targets:
                parts, now = here.get(fqn, NOWHERE)
                part = parts.get(name)
                if part is None:
                    problems.append(
                        f"{fqn} no longer has adapter {name!r}: the module was replaced by a different one; change the "
                        "model before adapting it"
                    )
                elif now is not None and part.shape != now:
                    problems.append(
                        f"the shape of {fqn} was {sizes(part.shape)} when it was adapted and is {sizes(now)} now: "
                        "eject the adapter and load one with the new shape"
                    )
    return problems


def _shape_now(layer: AdapterLayer, owner: nn.Module, config: RandLoRAConfig) -> Shape | None:
    """Return the shape of an update of a weight, or ``None`` if the weight does not tell."""
    weight = layer.weight_of(owner)
    if weight is None or len(whole_shape(weight)) < 2:  # computed from others, or a flat shard of FSDP's
        return None
    return layer.shape_of(owner, config)


def unfold_all(census: Census, state: ModelState) -> tuple[str, ...]:
    """Restore the weights from before a reversible merge, if there was one, and return their FQNs."""
    merged = [site for site in census.adapted if site.layer.unmerged is not None]
    for site in merged:
        site.layer.unfold(site.owner)
    state.merged, state.merge_options, state.merge_report = {}, None, None
    for site in merged:
        site.layer.seat(site.owner)
    for guard in state.merge_guards:
        guard.remove()
    state.merge_guards = []
    state.merged_blocks = []
    return tuple(site.fqn for site in merged)


def detach_all(census: Census, state: ModelState) -> tuple[str, ...]:
    """Remove all adapters, restore ``requires_grad`` of the rest, and return the FQNs of the weights that were adapted.

    The model keeps its current values.
    """
    restored = tuple(site.fqn for site in census.adapted)
    unguard_saving(census)
    for site in census.adapted:
        detach(site.owner, site.layer)
    for module in census.modules:
        if CASTS in vars(module):
            set_casts(module, _rounded(module))
    now = census.again()
    unwatch(now)
    own = {held.fqn: held.parameter for held in now.parameters}
    for fqn, flag in state.required_grad.take(own).items():  # not for parameters added later
        set_requires_grad(own[fqn], flag)
    if state.averaging is not None:
        state.averaging.end()
    del census.model.__dict__[ATTRIBUTE]
    return restored


def _rounded(module: nn.Module) -> dict[str, torch.dtype]:
    """Round parameters to the dtypes that a module computes with, and return the dtypes of others.

    A parameter that `fully_shard` has sharded keeps its dtype.
    """
    left = {}
    for name, dtype in vars(module)[CASTS].items():
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dtype != dtype:
            if place_at(parameter).exchanges == "values":
                left[name] = dtype
            else:
                parameter.data = parameter.data.to(dtype)
    return left

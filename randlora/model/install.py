"""Adding one adapter to a model, removing all of them, and watching the calls. Only this changes a model's modules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randlora.bases.spec import Shape, sliced_dims
from randlora.config import by_rank
from randlora.errors import AdapterError, MergeError, raise_collected
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of, add_adapter, detach, detach_obstacle, set_casts
from randlora.layers.rows import SiteRows
from randlora.layers.scopes import begin_call, end_call
from randlora.model.instance_methods import guard_saving, unguard_saving, watch_conversions
from randlora.model.train_also import Table, lost_parameters, remembered
from randlora.model.view import all_or_nothing, set_requires_grad
from randlora.places import loaded_modules, place_at
from randlora.ranks import agree
from randlora.replaced import CASTS, ReplacedParameter, whole_shape
from randlora.state import ATTRIBUTE, Adapter, ModelState, SavePretrained, SiteAdapter, attached_state
from randlora.targets.census import AdaptedSite, Census, Site, shapes_of, sizes
from randlora.targets.left_out import computed_weights, offloaded_with
from randlora.targets.match import prefixes, shortened

LOST = (
    "no longer has adapter {!r}: the module was replaced by a different one, or its table tied to others; change the "
    "model before adapting it"
)

Parts = Sequence[tuple[nn.Module, AdapterLayer, str]]  # of adapters: a module, its adapter layer, the adapter's name

ENGINES: list[Engine] = []


class Engine:
    """An engine that trains models in several processes. Subclasses override what they need, and are registered."""

    def __init_subclass__(cls) -> None:
        ENGINES.append(cls())

    def require_averaged(self, root: nn.Module, parts: Parts, replaced: Sequence[ReplacedParameter]) -> None:
        """Raise an `AdapterError` unless the gradients of everything that adapters train would be averaged."""

    def added(self, root: nn.Module, state: ModelState, parts: Parts) -> None:
        """Have the gradients of a new adapter averaged."""

    def changed(self, root: nn.Module) -> None:
        """React to a change of which parameters of a model require grad, such as by a warning."""

    def is_first_copy(self, model: nn.Module) -> bool:  # noqa: ARG002  # for those that cannot tell
        """Whether this is the first of the processes that train copies of a model, according to this engine."""
        return True


def shared_slots(state: ModelState, adapters: Iterable[Adapter], fqns: Iterable[str]) -> list[str]:
    """Return messages about sharded parameters that several adapters train copies of."""
    problems = []  # the parameter takes the values of one copy after the other: an optimizer would train the wrong one
    for fqn in fqns:
        names = [repr(adapter.name) for adapter in adapters if fqn in adapter.trained]
        entry = state.replaced.get(fqn)
        if len(names) > 1 and entry is not None and place_at(entry.installed).exchanges == "values":
            problems.append(
                f"{' and '.join(names)} each train their own copy of {fqn}, which is sharded, so only one adapter can "
                "train it: load each into a separate model, or leave it out of train_also"
            )
    return problems


def add(
    census: Census,
    state: ModelState,
    adapter: Adapter,
    sites: Sequence[Site],
    *,
    replaced: Mapping[str, ReplacedParameter],
    active: bool,
    trainable: bool,
    save_pretrained: SavePretrained | None = None,
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    rows: Iterable[tuple[Table, Tensor]] = (),
) -> None:
    """Create all of an adapter, then add it to the model, as the only active one if ``active``, and freeze the rest."""
    every = [*state.adapters.values(), adapter]
    entries = {**state.replaced, **replaced}
    trained = {name for each in every for fqn in each.trained for name in entries[fqn].slots}  # of tied ones, any name
    both = {fqn for each in every for fqn in each.rows} & trained
    problems = [f"one adapter trains rows of {fqn}, and another one all of it: use two models" for fqn in sorted(both)]
    raise_collected(AdapterError, [*shared_slots(state, every, replaced), *problems], doing="add it")
    added: list[tuple[Site, AdapterLayer, SiteAdapter | SiteRows, tuple[Tensor, ...]]] = []
    shapes = shapes_of(sites, adapter.config)
    for site in sites:
        layer = site.adapter_layer or site.layer_class(site.owner, state)
        shape, r = shapes[site.fqn], adapter.options[site.fqn].r
        diagonals = values[site.fqn] if values else layer.fresh_diagonals(site.owner, shape, r, adapter.init)
        added.append((site, layer, adapter.at(site.fqn, shape), diagonals))
    added += [table.to_add(adapter, state, own) for table, own in rows]
    with all_or_nothing(census, state, [site for site, *_ in added], replaced.values()):
        if not state.adapters:
            state.buffers_before = remembered(census)
            state.required_grad = {held.fqn: held.tensor.requires_grad for held in census.parameters}
            for held in census.parameters:
                set_requires_grad(held.tensor, False)  # noqa: FBT003
        for site, layer, place, own in added:
            add_adapter(site.owner, layer, place, own, trainable=trainable)
        state.adapters[adapter.name] = adapter
        parts = [(site.owner, layer, adapter.name) for site, layer, *_ in added]
        copies = [entry for entry in replaced.values() if trainable and not entry.is_buffer]
        for engine in ENGINES:
            engine.require_averaged(census.model, parts, copies)
            engine.added(census.model, state, parts)
        if active:
            state.activate({adapter.name: 1.0})
            for owner, layer in (*((site.owner, site.layer) for site in census.adapted), *(each[:2] for each in parts)):
                layer.seat(owner)
        for r, used in by_rank(shapes, adapter.options).items():
            adapter.bases[r].extend(*sliced_dims(used))
            state.bank.add(adapter.bases[r])
        state.replaced.update(replaced)
        for fqn, entry in replaced.items():
            if adapter.trained[fqn].dtype != (dtype := entry.dtype):
                for module, attribute in entry.slots.values():
                    set_casts(module, {**vars(module).get(CASTS, {}), attribute: dtype})
        state.require_exchangeable(state.active, f"add {adapter.name!r}")
        agree()  # before copies are exchanged
        state.install_parameters()
        census.model.__dict__[ATTRIBUTE], state.places = state, None
        watch_conversions(census.model, state)
        for engine in ENGINES:
            engine.changed(census.model)
        now = census.again()
        guard_saving(now, state, save_pretrained)
        watch(now)


def require_detachable(census: Census, doing: str, sites: Iterable[Site] | None = None) -> None:
    """Raise an `AdapterError` unless adapters can be removed and the original classes restored."""
    sites = [*(census.adapted if sites is None else sites)]
    layers = [(site, site.adapter_layer) for site in sites]
    owners = [(site.fqn, each) for site, layer in layers if layer for each in layer.owners(site.owner)]
    problems = [f"{fqn} {reason}" for fqn, owner in owners if (reason := detach_obstacle(owner)) is not None]
    raise_collected(AdapterError, problems + offloaded_diagonals(census, sites), doing=doing)


def offloaded_diagonals(census: Census, sites: Iterable[Site] | None = None) -> list[str]:
    """Return messages about weights whose Λ and Γ accelerate offloads together with a whole module around them."""
    offloaded = offloaded_with(census)
    return [
        f"Λ and Γ of {site.fqn} are offloaded by accelerate together with everything in {offloaded[id(site.owner)]}: "
        "remove accelerate's hooks first, or offload without preload_module_classes"
        for site in (census.adapted if sites is None else sites)
        if id(site.owner) in offloaded
    ]


def lost_parts(census: Census, state: ModelState, adapters: Collection[Adapter]) -> list[str]:
    """Return messages about weights and parameters of adapters that are missing or changed in the model."""
    return [*lost_sites(census, adapters), *lost_parameters(state, adapters)]


def lost_sites(census: Census, adapters: Iterable[Adapter]) -> list[str]:
    """Return messages about weights that have lost an adapter because the module was replaced or resized."""
    layers: dict[int, list[AdapterLayer]] = {}
    for site in census.adapted:
        owners, parameters = site.layer.owners(site.owner), census.parameters if site.layer.is_rows else ()
        if {*owners} == {site.owner, *(held.module for held in parameters if held.tensor is site.weight)}:
            for owner in owners:
                layers.setdefault(id(owner), []).append(site.layer)
    visits = [(fqn, module, layer) for fqn, module in census.visits for layer in layers.get(id(module), ())]
    here = {type(layer).site_fqn(fqn): (layer, module) for fqn, module, layer in visits}
    problems = []
    shapes: dict[tuple[str, Shape], Shape | None] = {}  # adapters with one shape have one way to adapt a stack
    for adapter in adapters:
        for fqn in (*adapter.targets, *(fqn.removesuffix(".weight") for fqn in adapter.rows)):
            layer, held_by = here.get(fqn, (None, None))
            site_adapter = None if layer is None else layer.adapters.get(adapter.name)
            if layer is None or held_by is None or site_adapter is None:
                problems.append(f"{fqn} {LOST.format(adapter.name)}")
                continue
            if (key := (fqn, site_adapter.shape)) not in shapes:
                weight = layer.find_weight(held_by)  # without one it is computed from others, or a flat shard of FSDP's
                is_flat = weight is None or len(whole_shape(weight)) < 2
                shapes[key] = None if is_flat else layer.shape_of(held_by, adapter.config)
            if (now := shapes[key]) is not None and site_adapter.shape != now:
                problems.append(
                    f"the shape of {fqn} was {sizes(site_adapter.shape)} when it was adapted and is {sizes(now)} now: "
                    "eject the adapter and load one with the new shape"
                )
    return problems


def merged_sites(census: Census) -> list[AdaptedSite]:
    """Return the weights that are merged into reversibly, or raise a `MergeError` if one cannot be restored."""
    merged = [site for site in census.adapted if site.layer.original is not None]
    problems, loaded = computed_weights(merged), loaded_modules(census.modules)
    if offloaded := [site.fqn for site in merged if id(site.owner) in loaded]:
        advice = "call accelerate.hooks.remove_hook_from_submodules(model) first"
        problems.append(f"accelerate has offloaded the weights of {shortened(offloaded)} since the merge: {advice}")
    raise_collected(MergeError, problems, doing="unmerge")
    return merged


def restore_originals(census: Census, state: ModelState) -> tuple[str, ...]:
    """Restore the weights from before a reversible merge, if there was one, and return their FQNs."""
    merged = merged_sites(census)
    for site in merged:
        site.layer.restore_original(site.owner)
    state.merged, state.merge_options, state.merge_report = {}, None, None
    for site in merged:
        site.layer.seat(site.owner)
    for guard in state.merge_guards:
        guard.remove()
    state.merge_guards, state.exchanged = [], []
    return tuple(site.fqn for site in merged)


def detach_all(census: Census, state: ModelState) -> tuple[str, ...]:
    """Remove all adapters, restore ``requires_grad`` of the rest, and return the FQNs of what was adapted."""
    restored = tuple(site.fqn for site in census.adapted)
    unguard_saving(census)
    for site in census.adapted:
        detach(site.owner, site.layer)
    for module in census.modules:
        if CASTS in vars(module):
            set_casts(module, _rounded(module))
    now = census.again()
    for module in now.modules:
        if module._forward_pre_hooks:
            _remove(module, check_call, *CHECKS)
    _count(now)
    for held in now.parameters:
        if held.fqn in state.required_grad:  # else it was added later
            set_requires_grad(held.tensor, state.required_grad[held.fqn])
    if state.averaging is not None:
        state.averaging.end()
    del census.model.__dict__[ATTRIBUTE]
    watch_conversions(census.model, None)
    return restored


def _rounded(module: nn.Module) -> dict[str, torch.dtype]:
    """Round parameters to the dtypes that a module computes with, and return those of others, which are sharded."""
    left = {}
    for name, dtype in vars(module)[CASTS].items():
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dtype != dtype:
            if place_at(parameter).exchanges == "values":
                left[name] = dtype
            else:
                parameter.data = parameter.data.to(dtype)
    return left


ARGUMENT = "adapter_names"  # PEFT's for a call; models of transformers accept any argument and ignore this one
NUMBER = int.from_bytes(b"randlora", "big")  # of counting hooks; with torch's, compiled code would not be shared

CHECKS: dict[Callable[[nn.Module, Any], None], Callable[[nn.Module], bool]] = {}
"""Forward pre-hooks that check calls of modules that contain adapted ones, each with which of them it is for."""


def check_call(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001  # a hook's signature
    """Raise an `AdapterError` if a model has lost adapted modules, or a call names adapters, which it would ignore."""
    state = None if torch.compiler.is_compiling() else attached_state(root)
    if state is not None and not _has_adapted(root, state.places):
        layers = Counter(layer for module in root.modules() for layer in adapter_layers_of(module).values())
        own = [layer for layer, modules in layers.items() if layer.state is state and modules >= len(layer.tied)]
        named = [each for layer in own for each in layer.adapters.items()]
        here = {(name, site_adapter.fqn) for name, site_adapter in named}  # under any name now
        wanted = [(name, fqn) for name, adapter in state.adapters.items() for fqn in (*adapter.targets, *adapter.rows)]
        lost = [each for each in wanted if each not in here]
        acting = [] if state.is_disabled else state.active_unmerged  # `routed` checks when it begins
        problems = [f"{fqn} {LOST.format(name)}" for name, fqn in lost if name in acting]
        raise_collected(AdapterError, problems, doing="run the model")
        state.places = None if lost else _places(root)
    if ARGUMENT in kwargs:
        raise AdapterError(f"{ARGUMENT} has no effect: call the model in `with randlora.serving.routed(model, names):`")


def _has_adapted(root: nn.Module, places: Any) -> bool:
    """Whether a model has adapted modules in these places, if known. Every forward asks, so it takes microseconds."""
    try:
        for path, names in places.items():
            modules: Any = root._modules
            for name in path:
                modules = modules[name]._modules
            for name in names:
                modules[name].randlora  # noqa: B018
    except (AttributeError, KeyError):
        return False
    return True


def _places(root: nn.Module) -> dict[tuple[str, ...], list[str]]:
    places = defaultdict[tuple[str, ...], list[str]](list)
    for *path, name in (fqn.split(".") for fqn, module in root.named_modules() if fqn and adapter_layers_of(module)):
        places[tuple(path)].append(name)
    return places


def watch(census: Census) -> None:
    """Watch the calls of a model with adapters, and of those modules in it for which a check is registered."""
    root = census.model
    if check_call not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(check_call, with_kwargs=True, prepend=True)
    for module in census.around_adapted:
        for check, where in CHECKS.items():
            if where(module) and check not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(check)
    _count(census)


def _count(census: Census) -> None:
    """Count the calls of the modules around those whose weights code reads as something else; see `layers.scopes`."""
    read = {id(owner) for site in census.adapted if site.layer.is_read for owner in site.layer.owners(site.owner)}
    read |= {id(module) for module in census.modules if CASTS in vars(module)}
    around = {name for fqn, module in census.visits if id(module) in read for name in prefixes(fqn)[:-1]}
    inside = {id(module) for fqn, module in census.visits if fqn in around}
    # their own calls too where the forward is not ours: beside a copy that is cast, or set on the module
    readers = [module for module in census.modules if id(module) in read]
    inside |= {id(module) for module in readers if not {CASTS, "forward"}.isdisjoint(vars(module))}
    if around or census.adapted:
        inside.add(id(census.model))
    for module in census.modules:
        if id(module) in inside and NUMBER not in module._forward_hooks:
            module._forward_pre_hooks[NUMBER], module._forward_hooks[NUMBER] = begin_call, end_call
            module._forward_hooks_always_called[NUMBER] = True
        elif id(module) not in inside and module._forward_hooks:
            _remove(module, begin_call, end_call)


def _remove(module: nn.Module, *hooks: Any) -> None:
    """Remove functions from the hooks of a module, which may be a copy, of which no handle is known."""
    for held in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in held.items() if hook in hooks]:
            del held[number]
            for options in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                options.pop(number, None)

"""Adding one adapter to a model and taking all of them off: the only code that changes what a model holds.

Whatever can fail happens before `commit` changes the first module, so a call that raises leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from randlora.bases.spec import sliced_dims
from randlora.errors import AdapterError, raise_collected
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of, add_adapter, detach, detach_obstacle
from randlora.state import ATTRIBUTE, Adapter, ModelState, ReplacedParameter, attached_state, require_unmerged
from randlora.targets.site import Site
from randlora.targets.walk import Census

WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
"""Types that wrap a whole model, and the attribute that holds it."""


@dataclass(frozen=True, eq=False)
class Addition:
    """One adapter, ready to be added: every tensor is made, and the model not touched yet.

    Attributes:
        state: The state the model carries, or will.
        adapter: The adapter.
        layers: Each site with its adapter layer and its Λ and Γ.
        replaced: The model's own parameters that the adapter trains copies of, by FQN.
        trainable: Whether the adapter's parameters require grad.
    """

    state: ModelState
    adapter: Adapter
    layers: tuple[tuple[Site, AdapterLayer, Tensor, Tensor], ...]
    replaced: Mapping[str, ReplacedParameter] = field(default_factory=dict)
    trainable: bool = True


def owned_state(census: Census, name: str, doing: str) -> ModelState | None:
    """Return the state a model carries, having checked that an adapter of this name may be added.

    Args:
        census: The module that adapters are, or will be, kept on.
        name: The new adapter's name.
        doing: The call, for errors.

    Raises:
        AdapterError: When the name cannot be used or is taken, the adapters are merged, or a part of the model or what
            it is part of carries adapters already.
    """
    model = census.model
    if (attribute := WRAPPERS.get(type(model).__qualname__)) is not None:
        raise AdapterError(
            f"cannot {doing} through a {type(model).__name__}, which gives every layer another name: "
            f"call this on model.{attribute}, which it wraps"
        )
    state = attached_state(model)
    if state is not None:
        state.adopt_parameters()
    if not isinstance(name, str) or not name or "." in name or name in dir(nn.ParameterDict()):
        raise AdapterError(
            f"cannot {doing} an adapter named {name!r}: expected a word without dots that torch does not use"
        )
    require_own(census, state, doing)
    unfit = [held.fqn for held in census.parameters if not held.parameter.is_leaf]
    if unfit:
        raise AdapterError(
            f"cannot {doing}: {unfit[0]} was computed from other tensors and cannot be frozen; detach it"
        )
    if state is not None:
        require_unmerged(state, doing)
        if name in state.adapters:
            raise AdapterError(
                f"cannot {doing} {name!r}: the model has an adapter of that name; remove it, or choose another name"
            )
    return state


def require_own(census: Census, state: ModelState | None, doing: str) -> None:
    """Check that all adapted layers belong to the adapters that the model keeps.

    Raises:
        AdapterError: When a layer belongs to others, as a copy of an adapted layer that was put into the model does.
    """
    for site in census.adapted:
        if site.layer.state is not state:
            raise AdapterError(
                f"cannot {doing} here: {site.fqn} belongs to adapters kept on another module, as one that is a part of "
                "this one, one around it, or a copy; call this on that module, or take the layer out"
            )


def or_if_first(state: ModelState | None, *, wanted: bool | None) -> bool:
    """Resolve an option whose ``None`` means: if the adapter is the model's first."""
    return state is None if wanted is None else wanted


def prepare(
    state: ModelState | None,
    adapter: Adapter,
    sites: Iterable[Site],
    *,
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    replaced: Mapping[str, ReplacedParameter] | None = None,
    trainable: bool = True,
) -> Addition:
    """Make everything an adapter needs, without touching the model.

    Args:
        state: The state the model carries already, if any.
        adapter: The adapter, with its trained parameters.
        sites: The weights it goes on.
        values: Λ and Γ by the site's FQN; without them the adapter starts by changing nothing.
        replaced: The model's own parameters that the adapter trains copies of.
        trainable: Whether the adapter's parameters require grad.
    """
    state = ModelState() if state is None else state
    layers = []
    for site in sites:
        layer = site.adapter_layer or site.layer_class(site.owner, state)
        lam, gamma = values[site.fqn] if values else layer.fresh_diagonals(site.owner, adapter.config.r)
        layers.append((site, layer, lam, gamma))
    return Addition(state, adapter, tuple(layers), replaced or {}, trainable)


def commit(census: Census, addition: Addition, *, active: bool) -> None:
    """Add a prepared adapter to the model and freeze the rest.

    Args:
        census: The module that carries the adapters.
        addition: What `prepare` made.
        active: Whether the adapter becomes the only active one.
    """
    state, adapter = addition.state, addition.adapter
    if not state.adapters:
        state.required_grad = {held.fqn: held.parameter.requires_grad for held in census.parameters}
        for held in census.parameters:
            held.parameter.requires_grad_(False)  # noqa: FBT003
    for site, layer, lam, gamma in addition.layers:
        add_adapter(site.owner, layer, adapter, lam, gamma, trainable=addition.trainable)
    if active:
        for other in state.adapters.values():
            other.weight = None
        adapter.weight = 1.0
    adapter.basis.extend(*sliced_dims(layer.shape for _, layer, *_ in addition.layers))
    state.bank.add(adapter.basis)
    state.adapters[adapter.name] = adapter
    state.replaced.update(addition.replaced)
    state.install_parameters()
    census.model.__dict__[ATTRIBUTE] = state


def require_detachable(census: Census, doing: str, sites: Iterable[Site] | None = None) -> None:
    """Check that adapted modules can be given their own classes back.

    Raises:
        AdapterError: When something else changed the class of one meanwhile.
    """
    problems = [
        f"{site.fqn} {reason}"
        for site in (census.adapted if sites is None else sites)
        if (reason := detach_obstacle(site.owner)) is not None
    ]
    raise_collected(AdapterError, problems, doing=doing)


def lost_sites(census: Census, adapters: Iterable[Adapter]) -> list[str]:
    """Return which weights adapters are no longer on, as where another module was put in an adapted one's place."""
    layers = {
        type(layer).site_fqn(visit.fqn): layer
        for visit in census.visits
        for layer in adapter_layers_of(visit.module).values()
    }
    return [
        f"{fqn} carries adapter {adapter.name!r} no longer: another module was put in its place; adapt the model after "
        "it is changed"
        for adapter in adapters
        for fqn in adapter.targets
        if fqn not in layers or adapter.name not in layers[fqn].adapters
    ]


def detach_all(census: Census, state: ModelState) -> tuple[str, ...]:
    """Take every adapter off and let each parameter require grad as it did before the first came.

    The model keeps the values it holds at this moment.

    Returns:
        FQNs of the weights that were adapted.
    """
    restored = tuple(site.fqn for site in census.adapted)
    for site in census.adapted:
        detach(site.owner, site.layer)
    for held in Census(census.model, census.visits).parameters:
        if held.fqn in state.required_grad:  # and not what was added since
            held.parameter.requires_grad_(state.required_grad[held.fqn])
    del census.model.__dict__[ATTRIBUTE]
    return restored

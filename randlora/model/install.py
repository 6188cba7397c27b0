"""Adding one adapter to a model and taking all of them off: the only code that changes which modules a model holds.

Whatever can fail happens before `commit` changes the first module, so a call that raises leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer
from randlora.state import ATTRIBUTE, Adapter, ModelState, ReplacedParameter, attached_state, require_unmerged
from randlora.targets.select import Target, used_dims
from randlora.targets.walk import named_parameters, walk

WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
"""Types that wrap a whole model, and the attribute that holds it."""


@dataclass(frozen=True, eq=False)
class Addition:
    """One adapter, ready to be added: every tensor made, every layer wrapped, nothing hung in the model yet.

    Attributes:
        state: The state the model carries, or will.
        adapter: The adapter.
        layers: Each target with its adapter layer and its Λ and Γ.
        replaced: The model's own parameters that the adapter trains copies of, by FQN.
        trainable: Whether the adapter's parameters require grad.
    """

    state: ModelState
    adapter: Adapter
    layers: tuple[tuple[Target, AdapterLayer, Tensor, Tensor], ...]
    replaced: Mapping[str, ReplacedParameter] = field(default_factory=dict)
    trainable: bool = True


def owned_state(model: nn.Module, name: str, doing: str) -> ModelState | None:
    """Return the state a model carries, having checked that an adapter of this name may be added.

    Args:
        model: The module that adapters are, or will be, kept on.
        name: The new adapter's name.
        doing: The call, for errors.

    Raises:
        AdapterError: When the name cannot be used or is taken, the adapters are merged, or a part of the model or what
            it is part of carries adapters already.
    """
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
    for visit in walk(model):
        if visit.adapter is not None and visit.adapter.state is not state:
            raise AdapterError(
                f"cannot {doing} here: {visit.fqn} belongs to adapters kept on another module, a part of this one or "
                "one around it; call this on that module"
            )
    if state is not None:
        require_unmerged(state, doing)
        if name in state.adapters:
            raise AdapterError(
                f"cannot {doing} {name!r}: the model has an adapter of that name; remove it, or choose another name"
            )
    return state


def or_if_first(state: ModelState | None, *, wanted: bool | None) -> bool:
    """Resolve an option whose ``None`` means: if the adapter is the model's first."""
    return state is None if wanted is None else wanted


def prepare(
    state: ModelState | None,
    adapter: Adapter,
    targets: tuple[Target, ...],
    *,
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    replaced: Mapping[str, ReplacedParameter] | None = None,
    trainable: bool = True,
) -> Addition:
    """Make everything an adapter needs, without touching the model.

    Args:
        state: The state the model carries already, if any.
        adapter: The adapter, with its trained parameters.
        targets: The layers it goes round.
        values: Λ and Γ by the target's FQN; without them the adapter starts by changing nothing.
        replaced: The model's own parameters that the adapter trains copies of.
        trainable: Whether the adapter's parameters require grad.
    """
    state = ModelState() if state is None else state
    layers = []
    for target in targets:
        layer = target.adapter or target.layer_class(target.module, state)
        lam, gamma = values[target.fqn] if values else layer.fresh_parameters(adapter.config.r)
        layers.append((target, layer, lam, gamma))
    return Addition(state, adapter, tuple(layers), replaced or {}, trainable)


def commit(model: nn.Module, addition: Addition, *, active: bool) -> None:
    """Hang a prepared adapter in the model and freeze the rest.

    Args:
        model: The module that carries the adapters.
        addition: What `prepare` made.
        active: Whether the adapter becomes the only active one.
    """
    state, adapter = addition.state, addition.adapter
    if not state.adapters:
        state.frozen = frozenset(fqn for fqn, _, _, parameter in named_parameters(model) if parameter.requires_grad)
        for _, _, _, parameter in named_parameters(model):
            parameter.requires_grad_(False)  # noqa: FBT003
    for target, layer, lam, gamma in addition.layers:
        layer.add(adapter, lam, gamma, trainable=addition.trainable)
        target.replace(layer)
    if active:
        for other in state.adapters.values():
            other.weight = None
        adapter.weight = 1.0
    adapter.basis.extend(*used_dims(target for target, *_ in addition.layers))
    state.bank.add(adapter.basis)
    state.adapters[adapter.name] = adapter
    state.replaced.update(addition.replaced)
    state.install_parameters()
    model.__dict__[ATTRIBUTE] = state


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Go through a model's adapter layers with their FQNs, each layer once."""
    seen: set[int] = set()
    for visit in walk(model):
        if visit.adapter is not None and id(visit.adapter) not in seen:
            seen.add(id(visit.adapter))
            yield visit.fqn, visit.adapter


def unwrap(model: nn.Module, *, only_empty: bool = False) -> tuple[str, ...]:
    """Hang the base layers back in the place of their adapter layers.

    Args:
        model: The module that carries the adapters.
        only_empty: Leave layers alone that still belong to an adapter.

    Returns:
        FQNs of the layers given back.
    """
    restored: dict[str, None] = {}
    for visit in list(walk(model)):
        if visit.adapter is not None and not (only_empty and visit.adapter.adapters):
            visit.parent._modules[visit.attribute] = visit.module
            restored[visit.fqn] = None
    return tuple(restored)


def detach(model: nn.Module, state: ModelState) -> tuple[str, ...]:
    """Take every adapter off and let each parameter require grad as it did before the first came.

    The model keeps the values it holds at this moment.

    Returns:
        FQNs of the layers given back.
    """
    restored = unwrap(model)
    for fqn, _, _, parameter in named_parameters(model):
        if fqn in state.frozen or fqn in state.replaced:  # and not what was added since
            parameter.requires_grad_(fqn in state.frozen)
    del model.__dict__[ATTRIBUTE]
    return restored

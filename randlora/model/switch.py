"""The adapters of a model: which there are, which are active, switching all of them off, taking one away."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import get_args

from torch import Tensor, nn

from randlora.bases.spec import BasisSpec
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError, ConfigError, TargetError, raise_collected
from randlora.functional import Compute
from randlora.layers.in_place import drop_adapter
from randlora.model.inject import eject
from randlora.model.install import require_detachable, require_own
from randlora.state import Adapter, ModelState, adapted_root, is_adapted, require_unmerged
from randlora.targets.match import nearest_names
from randlora.targets.walk import Census


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model.

    Attributes:
        name: Its name.
        config: Its options.
        spec: Its bases.
        targets: FQNs of its layers.
        train_also: FQNs of the parameters trained beside it.
        weight: Factor of its delta while it is active, else ``None``.
        is_trainable: Whether any of its parameters requires grad.
        is_merged: Whether it is folded into the weights for now.
    """

    name: str
    config: RandLoRAConfig
    spec: BasisSpec
    targets: tuple[str, ...]
    train_also: tuple[str, ...]
    weight: float | None
    is_trainable: bool
    is_merged: bool

    @property
    def is_active(self) -> bool:
        """Whether its delta is added."""
        return self.weight is not None


def adapters(model: nn.Module) -> list[AdapterInfo]:
    """List a model's adapters, in the order they were added; a plain model has none."""
    if not is_adapted(model):
        return []
    root, state = adapted_root(model)
    census = Census.of(root)
    return [
        AdapterInfo(
            name=adapter.name,
            config=adapter.config,
            spec=adapter.basis.spec,
            targets=adapter.targets,
            train_also=tuple(adapter.trained),
            weight=adapter.weight,
            is_trainable=any(parameter.requires_grad for parameter in adapter_parameters(census, adapter)),
            is_merged=state.is_merged and adapter.is_active,
        )
        for adapter in state.adapters.values()
    ]


def activate(
    model: nn.Module, names: str | Iterable[str] | Mapping[str, float], *, trainable: bool | None = None
) -> None:
    """Choose which adapters act, in place; all others are switched off.

    Args:
        model: A model that carries adapters.
        names: One name; several, whose deltas add; or names with weights, whose deltas are added with these factors.
        trainable: Let the parameters of these adapters require grad, or not, and leave all others as they are. ``None``
            changes no flag: what acts and what is trained are separate matters.

    Raises:
        AdapterError: For a name the model does not have, a weight that is not finite, adapters that train the same
            parameter beside them, or while the adapters are merged.
    """
    root, state = adapted_root(model)
    require_unmerged(state, "activate")
    census = Census.of(root)
    require_own(census, state, "activate")
    weights = _weights(names)
    raise_collected(AdapterError, _activation_problems(state, weights), doing="activate")
    for adapter in state.adapters.values():
        adapter.weight = weights.get(adapter.name)
    state.install_parameters()
    if trainable is not None:
        for name in weights:
            for parameter in adapter_parameters(census, state.adapters[name]):
                parameter.requires_grad_(trainable)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off inside a ``with`` block: the model computes what it did before any came.

    Nests, and gives back the state it found, whatever happens inside.

    Raises:
        AdapterError: When the model carries no adapter, or its adapters are merged.
    """
    root, state = adapted_root(model)
    require_unmerged(state, "disable")
    require_own(Census.of(root), state, "disable the adapters")
    state.disabled += 1
    state.install_parameters()
    try:
        yield
    finally:
        state.disabled = max(0, state.disabled - 1)  # blocks may overlap, and ejecting inside of one ends all
        state.install_parameters()


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter off, in place; no other adapter's output changes. Removing the last one ejects.

    Args:
        model: A model that carries adapters.
        name: The adapter to remove.

    Raises:
        AdapterError: When the model has no such adapter, or its adapters are merged.
    """
    root, state = adapted_root(model)
    require_unmerged(state, "remove")
    state.adapter(name)
    if len(state.adapters) == 1:
        eject(root)
        return
    census = Census.of(root)
    require_own(census, state, "remove")
    sites = [site for site in census.adapted if name in site.layer.adapters]
    require_detachable(census, f"remove {name!r}", sites)
    del state.adapters[name]
    for site in sites:
        drop_adapter(site.owner, site.layer, name)
    state.forget_unused()


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Go through what an optimizer is to train: Λ and Γ of the trainable adapters, and what ``train_also`` named.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-3)

    Raises:
        AdapterError: When the model carries no adapter.
    """
    root, state = adapted_root(model)
    census = Census.of(root)
    for adapter in state.adapters.values():
        yield from (parameter for parameter in adapter_parameters(census, adapter) if parameter.requires_grad)


def delta_weight(model: nn.Module, fqn: str, *, name: str | None = None) -> Tensor:
    """Compute the update that adapters make to one layer's weight.

    Args:
        model: A model that carries adapters.
        fqn: The layer's fully qualified name.
        name: One adapter, taken with weight 1; ``None`` means the active ones with their weights.

    Returns:
        ``(out_features, in_features)``, whatever layout the layer stores, in float32, or float64 where the weight is.

    Raises:
        AdapterError: When the model carries no adapter, or none of that name.
        TargetError: When the layer is not adapted.
    """
    root, state = adapted_root(model)
    sites = {site.fqn: site for site in Census.of(root).adapted}
    if fqn not in sites:
        raise TargetError(f"{fqn!r} is not adapted; the nearest adapted layers are {nearest_names(fqn, sites)}")
    weights = state.active if name is None else {state.adapter(name).name: 1.0}
    site = sites[fqn]
    return site.layer.delta_weight(site.owner, weights)


def adapter_parameters(census: Census, adapter: Adapter) -> Iterator[nn.Parameter]:
    """Yield the parameters of one adapter: Λ and Γ of each weight, then those trained beside it."""
    for site in census.adapted:
        if adapter.name in site.layer.adapters:
            yield from site.layer.diagonals_of(site.owner, adapter.name)
    yield from adapter.trained.values()


def _weights(names: str | Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    if isinstance(names, str):
        return {names: 1.0}
    if isinstance(names, Mapping):
        return dict(names)
    listed = list(names)
    if len(set(listed)) < len(listed):
        raise AdapterError(f"each adapter can be named once, got {listed}: give weights to count one several times")
    return dict.fromkeys(listed, 1.0)


def _activation_problems(state: ModelState, weights: Mapping[str, float]) -> list[str]:
    known = ", ".join(state.adapters)
    unknown = [name for name in weights if name not in state.adapters]
    problems = [f"the model has no adapter named {name!r}: it has {known}" for name in unknown]
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            problems.append(f"the weight of {name!r} must be a finite number, got {weight!r}")
    trained: dict[str, list[str]] = {}
    for name in weights.keys() & state.adapters.keys():
        for fqn in state.adapters[name].trained:
            trained.setdefault(fqn, []).append(name)
    problems += [
        f"{' and '.join(sorted(names))} each trained a {fqn} of their own, and the model has room for one"
        for fqn, names in trained.items()
        if len(names) > 1
    ]
    return problems


def set_compute(model: nn.Module, compute: Compute = "auto") -> None:
    """Choose how the layers of a model compute. It changes speed, memory and the last bits of results, nothing else.

    Args:
        model: A model that carries adapters.
        compute: ``"factored"`` multiplies the tokens through both factors of the update, ``"materialized"`` forms the
            update first, ``"auto"`` takes for each stage of each call what its sizes make cheaper (see
            `randlora.functional.cost`) and factors in a compiled or exported program, which may serve any.

    Raises:
        AdapterError: When the model carries no adapters.
        ConfigError: For another word.

    Example:
        >>> import torch, randlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = randlora.inject(model, r=8, targets="all-linear")
        >>> randlora.set_compute(model, "materialized")
    """
    if compute not in get_args(Compute):
        raise ConfigError(f"compute must be one of {', '.join(get_args(Compute))}, got {compute!r}")
    _, state = adapted_root(model)
    state.compute = compute

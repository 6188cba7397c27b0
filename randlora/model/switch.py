"""Choosing which adapters of a model act and with which factors; removing adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any

from torch import nn

from randlora.blocks import BLOCKS
from randlora.config import LARGEST_FACTOR, Factor
from randlora.errors import AdapterError, raise_collected
from randlora.functional import Compute
from randlora.hints import is_finite, listed, require_types, shortly
from randlora.layers.in_place import drop_adapter
from randlora.model.inject import eject
from randlora.model.install import ENGINES, require_detachable, shared_slots
from randlora.model.instance_methods import watch_conversions
from randlora.model.view import all_or_nothing, collective, opened, require_own, together
from randlora.ranks import agree
from randlora.replaced import whole_shape
from randlora.state import CHANGING, ModelState, adapted_root, require_unmerged, require_unused
from randlora.targets.census import Census
from randlora.targets.options import by_target, one_or_all


@collective(writes=True)
def activate(model: nn.Module, names: str | Iterable[str] | Mapping[str, Factor]) -> None:
    """Activate adapters, in place, and deactivate all others.

    `set_trainable` sets which adapters are trained. If an adapter has the factor 0 in a layer, the layer computes as
    without it, at no cost. Parameters of ``train_also`` and ``train_rows`` have no factor: those of an active adapter
    are used. If the model is sharded, all processes call this together.

    Args:
        model: A model with adapters.
        names: One name; several names, whose updates are summed; or a mapping from names to factors of the updates. A
            factor may be a mapping from patterns of layers to numbers, such as ``{"decoder": 0.5, ".*": 1.0}``. A
            pattern is an FQN or a suffix of FQNs, of layers or of modules around them, or else a regex matched with
            ``fullmatch``. The first that matches a layer applies, and each layer must have one.

    Raises:
        AdapterError: For an unknown name or factor, adapters that train the same parameter or row, or if
            ``names`` does not include the merged adapters with the factors that they were merged with.

    Warns:
        UserWarning: If parameters require grad now but did not when the `DistributedDataParallel` around the model was
            created: it would not average their gradients over the processes.
    """
    with opened(model, "activate", writes=True) as view:
        state, census = view.state, view.census
        weights = _resolved_factors(state, names)
        if any(weights.get(name) != weight for name, weight in state.merged.items()):
            require_unmerged(state, "activate others")
        raise_collected(AdapterError, _activation_problems(state, weights), doing="activate")
        named = [name for name in state.adapters if name in weights]
        if state.is_merged and state.would_exchange(named):
            require_unmerged(state, "activate adapters with train_also")  # which may be of a weight that is merged into
        state.require_exchangeable(named, "activate")
        agree()  # before copies are exchanged
        state.activate(weights)
        for site in census.adapted:
            site.layer.seat(site.owner)
        if not state.is_merged:
            state.install_parameters()
        for engine in ENGINES:
            engine.changed(view.root)


def disabled(model: nn.Module) -> AbstractContextManager[Any]:
    """Disable all adapters inside a ``with`` block, so that the model computes as without adapters.

    Blocks can be nested. The previous state is restored on exit, even after an exception. If you copy the model inside
    the block, the adapters stay inactive in the copy. If the model is sharded, all processes enter the block together.

    Raises:
        AdapterError: If the model has no adapter, or its adapters are merged. On exit, if accelerate has offloaded
            copies of parameters inside the block: the adapters stay disabled until its hooks are removed.
    """

    def checked(census: Census, state: ModelState) -> object:
        require_unmerged(state, "disable")
        require_own(census, state, "disable the adapters")
        state.require_exchangeable([], "disable the adapters")
        return object()

    return without_active(model, checked)


@contextmanager
def without_active(model: nn.Module, checked: Callable[[Census, ModelState], object]) -> Iterator[object]:
    """Run a block, which ``checked`` returns, without the active adapters, and end it even after an interrupt."""
    block: object = None

    def end() -> None:
        if block is None:  # it was refused
            return
        BLOCKS.set(tuple(each for each in BLOCKS.get() if each is not block))
        with CHANGING:
            state.ended.append(block)
            state.adopt_parameters(root)  # which refuses where the model's own values would be loaded over the copies

    try:
        with together(model, writes=True), opened(model, None) as view:
            root, state = view.root, view.state
            block = checked(view.census, state)
            agree()  # before copies are exchanged
            # without copies to exchange it is one assignment; to keep what could be undone takes far longer
            with all_or_nothing(view.census, state) if state.replaced else nullcontext():
                state.open_block(block)
                state.install_parameters()
        BLOCKS.set((*BLOCKS.get(), block))
        yield block
    finally:
        try:
            end()
        except BaseException:  # an interrupt, after which nothing else would
            end()
            raise


@collective(writes=True)
def remove(model: nn.Module, name: str) -> None:
    """Remove one adapter, in place, without changing the output of others. Removing the last one is `eject`.

    If the model is sharded, all processes call this together.

    Raises:
        AdapterError: If the model has no such adapter, its adapters are merged, or an open block of
            `randlora.serving.routed` names it.
    """
    with opened(model, "remove an adapter", writes=True) as view:
        state, census = view.state, view.census
        name = state.adapter(name).name
        doing = f"remove {name!r}"
        require_unmerged(state, doing)
        require_unused(state, name, doing)
        if len(state.adapters) == 1:
            eject(view.root)
            return
        state.require_exchangeable([other for other in state.active if other != name], doing)
        sites = [site for site in census.adapted if name in site.layer.adapters]
        require_detachable(census, doing, sites)
        agree()  # before copies are exchanged
        del state.adapters[name]
        for site in sites:
            drop_adapter(site.owner, site.layer, name)
        state.forget_unused()
        watch_conversions(view.root, state)


def _activation_problems(state: ModelState, names: Collection[str]) -> list[str]:
    """Return messages about copies of parameters that these adapters trained and cannot use, or not together."""
    adapters = [adapter for name, adapter in state.adapters.items() if name in names]
    trained: dict[str, list[str]] = {}
    problems = []
    for adapter in adapters:
        for fqn, rows in adapter.rows.items():
            for row in rows:
                trained.setdefault(f"row {row} of {fqn}", []).append(adapter.name)
        for fqn, copy in adapter.trained.items():
            trained.setdefault(fqn, []).append(adapter.name)
            if (was := whole_shape(copy)) != (now := whole_shape(state.replaced[fqn].original)):
                problems.append(
                    f"{adapter.name!r} trained {fqn} of shape {was}, and the model has {now} now: load an adapter with "
                    "the new shape"
                )
    problems += shared_slots(state, [*state.adapters.values()], trained)
    return problems + [
        f"{' and '.join(sorted(several))} each trained their own copy of {fqn}: only one of them can be active"
        for fqn, several in trained.items()
        if len(several) > 1
    ]


def set_compute(model: nn.Module, compute: Compute = "auto") -> None:
    """Set how the layers of a model compute. This changes only speed, memory and rounding.

    Args:
        model: A model with adapters.
        compute: ``"factored"`` multiplies the tokens by both factors of the update, ``"materialized"`` computes the
            update first, and ``"auto"`` chooses the cheaper way for the sizes of each call, except that compiled and
            exported programs, which may run with any sizes, are factored.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For any other value.
    """
    require_types(set_compute, {"compute": compute})
    _, state = adapted_root(model)
    state.compute = compute


def _resolved_factors(state: ModelState, names: Any) -> dict[str, Factor]:
    named = listed(names)
    raise_collected(AdapterError, state.unknown(named), doing="activate")  # which may have no hash
    if not isinstance(names, Mapping) and len(set(named)) < len(named):
        raise AdapterError(f"each adapter can be named once, got {named}: give a factor, as in {{'a': 2.0}}, instead")
    given: dict[str, Any] = dict(names if isinstance(names, Mapping) else dict.fromkeys(named, 1.0))
    raise_collected(AdapterError, factor_problems(state, given, by_layer=True), doing="activate")
    factors, problems = dict[str, Factor](), list[str]()
    for name, factor in given.items():
        fqns = state.adapters[name].targets
        numbers, unmet = by_target(f"names[{name!r}]", factor, fqns)
        problems += unmet
        if not unmet:
            factors[name] = one_or_all({fqn: float(numbers[fqn]) for fqn in fqns})
    raise_collected(AdapterError, problems, doing="activate")
    return factors


def factor_problems(state: ModelState, factors: Mapping[str, Any], *, by_layer: bool = False) -> list[str]:
    """Return messages about unknown names, and factors that are no numbers or, ``by_layer``, mappings to numbers."""
    problems, numbers = state.unknown(factors), dict[str, Any]()
    for name, factor in factors.items():
        of = f"the factor of {name!r}"
        if not (by_layer and isinstance(factor, Mapping)):
            numbers[of] = factor
            continue
        for pattern, number in factor.items():
            if isinstance(pattern, str):
                numbers[f"{of} in {pattern!r}"] = number
            else:
                problems.append(f"{of} must have patterns of layers as keys, got {shortly(pattern)}")
    for of, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real) or not is_finite(number):
            problems.append(f"{of} must be a finite number, got {shortly(number)}")
        elif abs(float(number)) > LARGEST_FACTOR:
            problems.append(f"{of} must be at most {LARGEST_FACTOR:g} in size, got {shortly(number)}")
    return problems

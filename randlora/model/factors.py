"""The factors that adapters are activated with, in all layers or in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from randlora.config import LARGEST_FACTOR
from randlora.errors import AdapterError, raise_collected
from randlora.hints import is_finite, shortly
from randlora.layer_options import Factor
from randlora.state import ModelState
from randlora.targets.options import by_target, meant_by, one_or_all


def resolved_factors(state: ModelState, names: object, layers: object) -> dict[str, Factor]:
    """Return the factor of each named adapter: one for all its layers, or one for each by FQN.

    Args:
        state: The state of the model.
        names: Names, or a mapping from names to factors, of whatever type was given; see `randlora.activate`.
        layers: The layers to which to restrict them, of whatever type was given.

    Raises:
        AdapterError: If they are no such thing, or name an adapter or a layer that there is not.
    """
    given = _by_name(names)
    raise_collected(AdapterError, factor_problems(state, given, by_layer=True), doing="activate")
    targets = {name: state.adapters[name].targets for name in given}
    inside = _inside(layers, [*dict.fromkeys(fqn for own in targets.values() for fqn in own)])
    found: dict[str, Factor] = {}
    problems = []
    for name, factor in given.items():
        numbers, unmet = _numbers(name, factor, targets[name])
        problems += unmet
        if inside.isdisjoint(targets[name]):
            problems.append(f"{name!r} adapts none of the layers that layers= names: leave it out")
        elif not unmet:
            found[name] = one_or_all({fqn: float(numbers[fqn]) * (fqn in inside) for fqn in targets[name]})
    raise_collected(AdapterError, problems, doing="activate")
    return found


def _numbers(name: str, factor: Factor, fqns: Sequence[str]) -> tuple[Mapping[str, float], list[str]]:
    """Return an adapter's factor of each layer, and messages about its patterns."""
    if isinstance(factor, Mapping) and factor.keys() == {*fqns}:  # as `randlora.adapters` returns them
        return factor, []
    return by_target(f"names[{name!r}]", factor, fqns)


def _inside(layers: Any, fqns: Sequence[str]) -> set[str]:
    """Return those of some layers that patterns name, of whatever type was given; all of them for ``None``."""
    if layers is None or not fqns:
        return {*fqns}
    listed = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if isinstance(layers, Mapping):
        raise AdapterError("layers takes names alone: give numbers as factors, as in {'a': {'decoder': 0.5, '.*': 1}}")
    if strange := [pattern for pattern in listed if not isinstance(pattern, str)]:
        raise AdapterError(f"expected layers to be names or patterns of layers, got {shortly(strange[0])}")
    if not listed:
        raise AdapterError("layers is empty: name those in which the adapters act, or use randlora.disabled(model)")
    meant = {pattern: meant_by(pattern, fqns) for pattern in listed}
    problems = [f"layers: {pattern!r} {unmet}" for pattern, (_, unmet) in meant.items() if unmet]
    raise_collected(AdapterError, problems, doing="activate")
    return {fqn for own, _ in meant.values() for fqn in own}


def factor_problems(state: ModelState, factors: Mapping[str, Any], *, by_layer: bool = False) -> list[str]:
    """Return messages about names that no adapter has, and about factors that are no finite numbers.

    With ``by_layer``, a factor may be a mapping from patterns to numbers.
    """
    problems = state.unknown(factors)
    for name, factor in factors.items():
        of = f"the factor of {name!r}"
        if not (by_layer and isinstance(factor, Mapping)):
            problems += _number_problems(of, factor)
            continue
        for pattern, number in factor.items():
            if not isinstance(pattern, str):
                problems.append(f"{of} must have patterns of layers as keys, got {shortly(pattern)}")
            else:
                problems += _number_problems(f"{of} in {pattern!r}", number)
    return problems


def _number_problems(what: str, number: float) -> list[str]:
    if isinstance(number, bool) or not isinstance(number, Real) or not is_finite(number):
        return [f"{what} must be a finite number, got {shortly(number)}"]
    if abs(number) > LARGEST_FACTOR:
        return [f"{what} must be at most {LARGEST_FACTOR:g} in size, got {shortly(number)}"]
    return []


def _by_name(names: Any) -> dict[str, Any]:
    """Return the given factor of each name, which is 1 if only names were given."""
    if isinstance(names, str):
        return {names: 1.0}
    listed = list(names) if isinstance(names, Iterable) else [names]
    if strange := [name for name in listed if not isinstance(name, str)]:
        raise AdapterError(f"expected names of adapters, or a mapping from names to factors, got {shortly(strange[0])}")
    if isinstance(names, Mapping):
        return dict(names)
    if len(set(listed)) < len(listed):
        raise AdapterError(f"each adapter can be named once, got {listed}: give a factor, as in {{'a': 2.0}}, instead")
    return dict.fromkeys(listed, 1.0)

"""The factors that adapters are activated with, in all layers or in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    patterns = _patterns(layers)
    found: dict[str, Factor] = {}
    problems, unmet = [], dict[str, list[str]]()
    for name, factor in given.items():
        fqns = state.adapters[name].targets
        numbers, more = by_target(f"names[{name!r}]", factor, fqns)
        problems += more
        if patterns is not None:
            meant = {pattern: meant_by(pattern, fqns) for pattern in patterns}
            for pattern, (own, why) in meant.items():
                unmet.setdefault(pattern, []).extend([] if own else [why])
            inside = {fqn for own, _ in meant.values() for fqn in own}
            numbers = {fqn: number if fqn in inside else 0.0 for fqn, number in numbers.items()}
            if not inside:
                problems.append(f"{name!r} has no layer that layers={[*patterns]} names")
        if numbers:
            found[name] = one_or_all(numbers)
    problems += [f"layers: {pattern!r} {why[0]}" for pattern, why in unmet.items() if len(why) == len(given)]
    raise_collected(AdapterError, problems, doing="activate")
    return found


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


def _patterns(layers: Any) -> list[str] | None:
    """Return the patterns of layers, or ``None`` for all."""
    if layers is None:
        return None
    listed = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if strange := [pattern for pattern in listed if not isinstance(pattern, str)]:
        raise AdapterError(f"expected layers to be names or patterns of layers, got {shortly(strange[0])}")
    if not listed:
        raise AdapterError("layers is empty: name those in which the adapters act, or use randlora.disabled(model)")
    return listed

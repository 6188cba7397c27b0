"""The options that may differ between layers: from patterns to the layers of an adapter, and as files list them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from randlora.bases.spec import Shape
from randlora.config import ALPHA_PER_RANK, RandLoRAConfig
from randlora.layer_options import LayerOptions, by_rank
from randlora.options import NO_REGEX
from randlora.targets.match import nearest_names, prefixes, shortened

SMALL_RANK = 1024
"""An r that costs little, whatever the layers."""


def resolve(config: RandLoRAConfig, fqns: Sequence[str]) -> tuple[dict[str, LayerOptions], list[str]]:
    """Return r and alpha of each target, and a message for each target or pattern without a match or without effect.

    There are no options if there is a message.
    """
    ranks, problems = by_target("r", config.r, fqns)
    alphas, more = by_target("alpha", config.alpha, fqns)
    problems += more
    return ({} if problems else {fqn: _options(ranks[fqn], alphas[fqn]) for fqn in fqns}), problems


def useless_options(shapes: Mapping[str, Shape], options: Mapping[str, LayerOptions]) -> list[str]:
    """Return a message for each alpha that trains nothing or backwards, and each r that no layer is as wide as."""
    widest = {r: max(max(shape[-2:]) for shape in own) for r, own in by_rank(shapes, options).items()}
    return [
        f"r={r} is larger than its layers, which are at most {wide} wide: above the smaller side of a layer it adds no "
        f"rank; give an r of at most {wide}"
        for r, wide in widest.items()
        if r > max(wide, SMALL_RANK)
    ] + [
        f"alpha={alpha:g} must be positive, because the update is scaled by alpha / r: leave it out for 20·r"
        for alpha in dict.fromkeys(own.alpha for own in options.values())
        if alpha <= 0
    ]


def ranks_of_others(config: RandLoRAConfig, fqns: Sequence[str]) -> dict[str, int]:
    """Return the r that weights which are no targets would have, by the last pattern if none matches."""
    found, _ = by_target("r", config.r, fqns)
    last = [*config.r.values()][-1] if isinstance(config.r, Mapping) else config.r
    return {fqn: found.get(fqn, last) for fqn in fqns}


def listed(config: RandLoRAConfig, options: Mapping[str, LayerOptions]) -> RandLoRAConfig:
    """Return a config that gives each target its options by FQN, or as one number if all targets have the same."""
    ranks = {fqn: r for fqn, (r, _) in options.items()}
    alphas = {fqn: alpha for fqn, (_, alpha) in options.items()}
    return replace(
        config,
        r=one_or_all(ranks),
        alpha=one_or_all(alphas) if isinstance(config.alpha, Mapping) else config.alpha,
    )


def options_listed(config: RandLoRAConfig, fqns: Iterable[str]) -> dict[str, LayerOptions]:
    """Return r and alpha of each target of a config that `listed` returned; a `KeyError` if one has none."""
    ranks, alphas = config.r, config.alpha
    return {
        fqn: _options(
            ranks[fqn] if isinstance(ranks, Mapping) else ranks,
            alphas[fqn] if isinstance(alphas, Mapping) else alphas,
        )
        for fqn in fqns
    }


def _options(r: int, alpha: float | None) -> LayerOptions:
    return LayerOptions(r, ALPHA_PER_RANK * r if alpha is None else float(alpha))


def one_or_all(values: Mapping[str, Any]) -> Any:
    """Return the only value, or the mapping with longer names first, because a name is a suffix of longer ones only."""
    if len({*values.values()}) == 1:
        return next(iter(values.values()))
    return {fqn: values[fqn] for fqn in sorted(values, key=lambda fqn: (-len(fqn), fqn))}


def by_target(name: str, option: Any, fqns: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the value of one option for each target, and a message for each target or pattern that has a problem."""
    if not isinstance(option, Mapping):
        return dict.fromkeys(fqns, option), []
    found: dict[str, Any] = {}
    earlier: dict[str, frozenset[str]] = {}
    problems = []
    for pattern, value in option.items():
        meant, unmet = meant_by(pattern, fqns)
        if unmet:
            problems.append(f"{name}={{{pattern!r}: …}} {unmet}")
        own = frozenset(meant)
        wider = [other for other, taken in earlier.items() if taken > own and option[other] != value]
        if meant and wider:
            problems.append(
                f"{name}={{{pattern!r}: …}} matches only what {wider[0]!r} took: put it before {wider[0]!r}"
            )
        earlier[pattern] = own
        for fqn in meant:
            found.setdefault(fqn, value)
    if left := [fqn for fqn in fqns if fqn not in found]:
        problems.append(f"{name}= has no pattern for {shortened(left)}: add '.*' as the last, for all others")
    return found, problems


def meant_by(pattern: str, fqns: Sequence[str]) -> tuple[list[str], str]:
    """Return the targets that have a name, or are inside a module that has it, or else match it as a regex.

    The second is empty, or says why there are none, as a phrase that follows the pattern.
    """
    if named := [fqn for fqn in fqns if f".{pattern}." in f".{fqn}."]:
        return named, ""
    try:
        matching = [fqn for fqn in fqns if re.fullmatch(pattern, fqn)]
    except NO_REGEX as error:
        return [], f"is no name of a target, and no regular expression: {error}"
    if matching:
        return matching, ""
    near = nearest_names(pattern, [name for fqn in fqns for name in prefixes(fqn)], common=fqns)
    return [], f"matches no target; the nearest names are {near}"

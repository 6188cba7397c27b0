"""The options of an adapter: reading them from arguments, what equals a LoRA's, and the values in each layer."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from randlora.bases.spec import Shape, count_bases, count_trainable
from randlora.config import (
    ALPHA_PER_RANK,
    LARGEST_FACTOR,
    LARGEST_RANK,
    NO_REGEX,
    OPTIONS,
    LayerOptions,
    RandLoRAConfig,
    Train,
    by_rank,
)
from randlora.errors import ConfigError, named, raise_collected, spelled
from randlora.hints import CALLS, require_types, shortly
from randlora.targets.census import Site
from randlora.targets.match import nearest_names, prefixes, shortened

SMALL_RANK = 1024  # an r that costs little, whatever the layers

# with block bases, r is a multiple of this if possible: blocks divide r, and a prime r would allow few
BLOCK_STEP = 8
# the same if each layer has one basis, where the numbers of blocks in A and B may have no common divisor: 15 and 8
LONE_BLOCK_STEP = 120
# how far such a multiple may miss the wanted number of parameters, as a share of it, and any r, as a factor
NEAR, OUT_OF_REACH = 0.1, 1.5

# Adam's first step with the default alpha, as a share of Γ's initial value, 1 / min_dim; the same for Λ alone
FIRST_STEP, LONE_FIRST_STEP = 0.3, 0.5
LARGEST_RATE = 1e-2  # to try first


def resolve(config: RandLoRAConfig, fqns: Sequence[str]) -> tuple[dict[str, LayerOptions], list[str]]:
    """Return r and alpha of each target, or else messages about patterns and targets without a match or effect."""
    (ranks, problems), (alphas, more) = by_target("r", config.r, fqns), by_target("alpha", config.alpha, fqns)
    return {} if problems or more else _options(ranks, alphas, fqns), problems + more


def useless_options(shapes: Mapping[str, Shape], options: Mapping[str, LayerOptions], train: Train) -> list[str]:
    """Return a message for each alpha that is not positive, and for each r that is wider than all layers."""
    widest = {r: max(max(shape[-2:]) for shape in own) for r, own in by_rank(shapes, options).items()}
    return [
        f"{spelled('r', r)} is larger than its layers, which are at most {wide} wide: give an r of at most {wide}"
        for r, wide in widest.items()
        if train == "both" and r > max(wide, SMALL_RANK)
    ] + [
        f"{named('alpha')} must be positive, got {alpha:g}: the update is scaled by alpha / r; leave it out for 20·r"
        for alpha in dict.fromkeys(own.alpha for own in options.values())
        if alpha <= 0
    ]


def options_by_target(config: RandLoRAConfig, options: Mapping[str, LayerOptions]) -> RandLoRAConfig:
    """Return a config with options by FQN for each target, or as one number if all targets have the same."""
    alpha = config.alpha
    if isinstance(alpha, Mapping):
        alpha = one_or_all({fqn: layer.alpha for fqn, layer in options.items()})
    return replace(config, r=one_or_all({fqn: layer.r for fqn, layer in options.items()}), alpha=alpha)


def options_listed(config: RandLoRAConfig, fqns: Iterable[str]) -> dict[str, LayerOptions]:
    """Return r and alpha of each target of a config from `options_by_target`; a `KeyError` if it has none."""
    fqns = list(fqns)
    ranks: Mapping[str, int] = config.r if isinstance(config.r, Mapping) else dict.fromkeys(fqns, config.r)
    alphas = config.alpha if isinstance(config.alpha, Mapping) else dict.fromkeys(fqns, config.alpha)
    return _options(ranks, alphas, fqns)


def _options(ranks: Mapping[str, int], alphas: Mapping[str, Any], fqns: Iterable[str]) -> dict[str, LayerOptions]:
    pairs = ((fqn, ranks[fqn], alphas[fqn]) for fqn in fqns)
    return {fqn: LayerOptions(r, ALPHA_PER_RANK * r if alpha is None else float(alpha)) for fqn, r, alpha in pairs}


def one_or_all(values: Mapping[str, Any]) -> Any:
    """Return the only value, or the mapping with longer names first, because a name may be a suffix of a longer one."""
    if len({*values.values()}) == 1:
        return next(iter(values.values()))
    return {fqn: values[fqn] for fqn in sorted(values, key=lambda fqn: (-len(fqn), fqn))}


def by_target(name: str, option: Any, fqns: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the value of one option for each target, and a message for each target or pattern that has a problem."""
    if not isinstance(option, Mapping):
        return dict.fromkeys(fqns, option), []
    if option.keys() == {*fqns}:  # as `randlora.adapters` and `randlora.update_norms` return them
        return {**option}, []
    by_part: dict[str, list[str]] = {}
    for fqn in fqns:
        for part in set(fqn.split(".")):
            by_part.setdefault(part, []).append(fqn)
    found: dict[str, Any] = {}
    takers: dict[str, list[tuple[str, frozenset[str]]]] = {}
    problems = []
    for pattern, value in option.items():
        what, (matched, unmet) = f"{named(name)}={{{pattern!r}: …}}", _matching(pattern, fqns, by_part)
        if unmet:
            problems.append(f"{what} {unmet}")
            continue
        own = frozenset(matched)
        if wider := [other for other, taken in takers.get(matched[0], ()) if taken > own and option[other] != value]:
            problems.append(f"{what} matches only what {wider[0]!r} took: put it before {wider[0]!r}")
        for fqn in matched:
            takers.setdefault(fqn, []).append((pattern, own))
            found.setdefault(fqn, value)
    if left := [fqn for fqn in fqns if fqn not in found]:
        problems.append(f"{name}= has no pattern for {shortened(left)}: add '.*' as the last, for all others")
    return found, problems


def _matching(pattern: str, fqns: Sequence[str], by_part: Mapping[str, Sequence[str]]) -> tuple[list[str], str]:
    """Return the targets of this name, or in a module of it, or else of this regex; or why there are none."""
    likely = min((by_part.get(part, ()) for part in pattern.split(".")), key=len)
    if named := [fqn for fqn in likely if f".{pattern}." in f".{fqn}."]:
        return named, ""
    try:
        matching = [fqn for fqn in fqns if re.fullmatch(pattern, fqn)]
    except NO_REGEX as error:
        return [], f"is neither the name of a target nor a regular expression: {error}"
    if matching:
        return matching, ""
    near = nearest_names(pattern, [name for fqn in fqns for name in prefixes(fqn)])
    return [], f"matches no target; the nearest names are {near}"


def lora_parameters(sites: Iterable[Site]) -> int:
    """Return the number of parameters of a LoRA of rank 1: ``in + out`` for each matrix of a weight."""
    return sum(math.prod(site.shape[:-2]) * sum(site.shape[-2:]) for site in sites)


def r_like_lora(sites: Collection[Site], lora_r: int, config: RandLoRAConfig) -> int:
    """Return the r with the number of parameters nearest to a LoRA on the same weights, or raise a `ConfigError`."""
    of_rank_one = lora_parameters(sites)
    wanted = lora_r * of_rank_one
    shapes = Counter(site.shape_with(config) for site in sites)

    def size(r: int) -> int:
        return sum(count * count_trainable(shape, r, config.train) for shape, count in shapes.items())

    widest = max(min(shape[-2:]) for shape in shapes)  # above which Λ and Γ add no rank, and below which Λ alone loses
    matrices = sum(count * math.prod(shape[:-2]) for shape, count in shapes.items())
    least, most = (1, widest) if config.train == "both" else (widest, LARGEST_RANK)

    def ends(step: int) -> tuple[int, int]:
        return math.ceil(least / step) * step, max(step, most // step * step)

    def nearest(step: int) -> int:
        first, last = ends(step)
        if config.train == "lambda":  # of which each matrix trains r numbers
            return max(first, min(last, round(wanted / matrices / step) * step))
        return min(range(first, last + 1, step), key=lambda r: abs(size(r) - wanted))

    divided_by = math.lcm(*config.blocks or (1,))
    found = nearest(divided_by)
    if not 1 / OUT_OF_REACH <= size(found) / wanted <= OUT_OF_REACH:
        (fewest, first), (many, last) = sorted((size(r) / of_rank_one, r) for r in ends(divided_by))
        raise ConfigError(
            f"{spelled('like_lora', lora_r)} is out of reach: on these layers RandLoRA has as many parameters as a "
            f"LoRA of rank {fewest:.2g} to {many:.2g}, with r from {first} to {last}"
        )
    step = BLOCK_STEP if config.train == "both" else LONE_BLOCK_STEP
    if config.basis == "block" and config.blocks is None and most >= step:
        multiple = nearest(step)
        return multiple if abs(size(multiple) - wanted) <= NEAR * wanted else found
    return found


def first_learning_rate(scaling: float, min_dim: int, lambda_rank: float | None = None) -> float:
    """Return the learning rate to try first, ``0.3 / min_dim * sqrt(20 / scaling)`` but at most 1e-2; see its page.

    For Λ alone, as large as a LoRA of ``lambda_rank``, ``0.5 / max(1, lambda_rank)`` takes the place of 0.3.
    """
    step = FIRST_STEP if lambda_rank is None else LONE_FIRST_STEP / max(1.0, lambda_rank)
    size = abs(scaling) / ALPHA_PER_RANK
    return min(step / min_dim / math.sqrt(size), LARGEST_RATE) if size else LARGEST_RATE


def equivalent_alpha(
    lora_r: int, lora_alpha: float, r: int = 32, *, shape: tuple[int, int] | None = None, use_rslora: bool = False
) -> float:
    """Return the alpha with which the first step of Adam is as large as with LoRA at the same learning rate.

    The size is the root mean square of the entries of the update. For LoRA with PEFT's initial values it is
    ``scaling · lr · sqrt(lora_r / (3 · in_features))``. Here it is ``alpha / r · lr · sqrt(num_bases · r)`` times the
    initial value of Λ or Γ, with either ``init`` of `inject`. For layers with ``in_features <= out_features`` that are
    large compared to ``r``, this gives ``alpha / r = lora_alpha / lora_r · sqrt(lora_r / 3)``.

    Args:
        lora_r: The rank of LoRA.
        lora_alpha: The alpha of LoRA, whose update is scaled by ``lora_alpha / lora_r``.
        r: The rank of one random basis.
        shape: ``(out_features, in_features)`` of a layer. ``None`` means any layer with
            ``in_features <= out_features``. In other layers, the first step is then too large by a factor of
            ``sqrt(in_features / out_features)``.
        use_rslora: Whether LoRA's update is scaled by ``lora_alpha / sqrt(lora_r)`` instead, as in PEFT.

    Returns:
        The alpha for ``inject(model, r=r, alpha=...)``.

    Raises:
        ConfigError: For invalid values.

    Examples:
        >>> round(randlora.equivalent_alpha(lora_r=32, lora_alpha=64, r=32), 2)
        209.02
    """
    require_types(equivalent_alpha, locals())
    numbers = {"lora_r": lora_r, "r": r, "lora_alpha": lora_alpha}
    numbers |= {f"shape[{index}]": size for index, size in enumerate(shape or ())}
    largest = {"lora_alpha": LARGEST_FACTOR}
    problems = [
        f"{name} must be a positive number of at most {largest.get(name, LARGEST_RANK):.8g}, got {shortly(value)}"
        for name, value in numbers.items()
        if not 0 < value <= largest.get(name, LARGEST_RANK)
    ]
    raise_collected(ConfigError, problems, doing="compute an equivalent alpha")
    scaling = lora_alpha / (math.sqrt(lora_r) if use_rslora else lora_r)
    if shape is None:
        return r * scaling * math.sqrt(lora_r / 3)
    lora_size = scaling * math.sqrt(lora_r / (3 * shape[1]))
    return r * lora_size * min(shape) / math.sqrt(count_bases(min(shape), r) * r)


def one_config(arguments: Mapping[str, Any]) -> RandLoRAConfig:
    """Return the config among the arguments of `inject`, or one made of its options. ``like_lora`` is applied later."""
    config, r, like_lora = (arguments.get(name) for name in ("config", "r", "like_lora"))
    if isinstance(r, RandLoRAConfig):
        raise ConfigError("r is a RandLoRAConfig: give it by name, randlora.inject(model, config=config)")
    for option, value in (("r", r), ("config", config)):
        if type(value).__module__.startswith("peft."):
            call = CALLS["LoraConfig"]
            raise ConfigError(f"{option} is a {type(value).__name__} of PEFT: give its options by name, {call}")
    given = {name: arguments[name] for name in OPTIONS if name in arguments and (name != "r" or r is not None)}
    if like_lora is not None:
        if r is not None or config is not None:
            other = spelled("r") if config is None else "config=, which has an r"
            raise ConfigError(f"give {spelled('like_lora')} or {other}, not both")
        if not (type(like_lora) is int and 0 < like_lora <= LARGEST_RANK):
            got = shortly(like_lora)
            raise ConfigError(f"{named('like_lora')} must be the rank of a LoRA, a positive integer, got {got}")
        blocks: Any = given.get("blocks")
        are_counts = isinstance(blocks, tuple | list) and all(type(count) is int and count > 0 for count in blocks)
        given["r"] = math.lcm(*blocks) if are_counts else 1  # of which the r that is chosen later is a multiple
        if given["r"] > LARGEST_RANK:
            needs = f"{named('like_lora')} needs an r that both blocks divide"
            raise ConfigError(f"{needs}, and there is none up to {LARGEST_RANK}")
    built = RandLoRAConfig(**given)
    if config is None:
        return built
    if not isinstance(config, RandLoRAConfig):
        raise ConfigError(f"config must be a RandLoRAConfig, got {type(config).__name__}: give options by name instead")
    if r is not None or built != RandLoRAConfig():
        raise ConfigError("give either config= or single options: dataclasses.replace(config, r=16) changes one")
    return config

"""From a pattern to the layers it means, and what cannot be adapted, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from randlora.bases.spec import drawn_dims, sliced_dims
from randlora.config import Pattern, RandLoRAConfig
from randlora.errors import TargetError, raise_collected
from randlora.layers.base import AdapterLayer
from randlora.layers.registry import find_layer
from randlora.targets.match import matches, nearest_names, prefixes, unmatched
from randlora.targets.presets import HEAD_NAMES, TARGET_PRESETS
from randlora.targets.walk import Visit, named_parameters, walk

ALL_LINEAR = "all-linear"
LISTED = 5


@dataclass(frozen=True, eq=False)
class Target:
    """A layer to adapt.

    Attributes:
        fqn: Its fully qualified name; the first one, where it is used in several places.
        module: The layer itself, without adapters.
        layer_class: The adapter layer that serves it.
        places: Where it hangs: parents and attributes' names.
        adapter: The adapter layer already round it, if any.
    """

    fqn: str
    module: nn.Module
    layer_class: type[AdapterLayer]
    places: tuple[tuple[nn.Module, str], ...]
    adapter: AdapterLayer | None

    @property
    def in_features(self) -> int:
        """Width of its input."""
        return self.layer_class.features(self.module)[0]

    @property
    def out_features(self) -> int:
        """Width of its output."""
        return self.layer_class.features(self.module)[1]

    def replace(self, module: nn.Module) -> None:
        """Hang ``module`` in every place of this layer."""
        for parent, attribute in self.places:
            parent._modules[attribute] = module


@dataclass(frozen=True)
class Selection:
    """What a pattern came to.

    Attributes:
        targets: The layers, in the model's order.
        rule: The rule that chose them, in words.
        skipped: Linear layers that ``"all-linear"`` passes over, with the reason, by FQN.
    """

    targets: tuple[Target, ...]
    rule: str
    skipped: dict[str, str]


@runtime_checkable
class HasOutputEmbeddings(Protocol):
    """A transformers model, as far as the walker cares."""

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output head."""


def find_targets(model: nn.Module, pattern: Pattern | None = None, exclude: Pattern | None = None) -> list[Target]:
    """Find the layers a pattern means, without touching anything.

    Args:
        model: Any module.
        pattern: As `RandLoRAConfig.targets`.
        exclude: As `RandLoRAConfig.exclude`.

    Returns:
        One target per layer, in the model's order.

    Raises:
        ConfigError: When a pattern is none.
        TargetError: When a pattern or a name matches nothing, or what it matches cannot be adapted.
    """
    checked = RandLoRAConfig(targets=pattern, exclude=exclude)
    return list(select(model, checked.targets, checked.exclude).targets)


def select(model: nn.Module, pattern: Pattern | None, exclude: Pattern | None) -> Selection:
    """Find the layers a pattern means, and say which rule applied; arguments and errors as in `find_targets`."""
    visits = list(walk(model))
    if not visits and find_layer(model) is not None:
        raise TargetError(
            f"the model itself is a {type(model).__name__}, and a layer cannot be replaced inside itself: "
            "wrap it, as in torch.nn.Sequential(layer), and adapt that"
        )
    pattern, rule, must_match = _resolve(model, pattern)
    if pattern == ALL_LINEAR:
        chosen, skipped = _all_linear(model, visits)
    else:
        chosen, skipped = _matching(visits, pattern, rule, must_match=must_match), {}
    if exclude is not None:
        chosen = _without(chosen, visits, exclude)
        rule += ", without the excluded"
    if not chosen:
        raise TargetError(f"{rule} leaves no layer to adapt: give targets= that match one")
    return Selection(tuple(_targets(chosen, visits)), rule, skipped)


def max_dims(targets: Iterable[Target]) -> tuple[int, int]:
    """Return ``(max_dim, min_dim)`` of the bases that PEFT would draw for these targets."""
    return drawn_dims((target.out_features, target.in_features) for target in targets)


def used_dims(targets: Iterable[Target]) -> tuple[int, int]:
    """Return ``(max_dim, min_dim)`` that these targets slice."""
    return sliced_dims((target.out_features, target.in_features) for target in targets)


def obstacles(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Say why targets cannot be adapted: no weight of their own that serves, or a weight that something else shares."""
    problems = []
    holders: dict[object, list[tuple[str, nn.Module]]] = {}
    for fqn, module, _, parameter in named_parameters(model):
        if not is_lazy(parameter):
            holders.setdefault(_identity(parameter), []).append((fqn, module))
    for target in targets:
        weight = target.module._parameters.get("weight")
        if is_parametrized(target.module) or weight is None:
            problems.append(f"{target.fqn} computes its weight from other parameters: remove the parametrization first")
        elif is_lazy(weight):
            problems.append(f"{target.fqn} has no shape yet: run one forward pass first")
        elif (reason := target.layer_class.obstacle(target.module)) is not None:
            problems.append(f"{target.fqn} {reason}")
        else:
            others = [fqn for fqn, module in holders[_identity(weight)] if module is not target.module]
            if others:
                problems.append(
                    f"the weight of {target.fqn} is tied to {', '.join(others)}: untie it, or leave the layer out"
                )
    return problems


def _identity(parameter: Tensor) -> object:
    """What two parameters over the same memory have in common."""
    is_plain = type(parameter.data) is Tensor and not parameter.is_meta and parameter.numel() > 0
    return (parameter.device, parameter.data_ptr()) if is_plain else id(parameter)


def _resolve(model: nn.Module, pattern: Pattern | None) -> tuple[Pattern, str, bool]:
    """Return the pattern that applies, its name in words, and whether each of its entries must match."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if pattern is None and model_type in TARGET_PRESETS:
        preset = TARGET_PRESETS[model_type]
        names = preset if isinstance(preset, str) else ", ".join(preset)
        return preset, f"the preset of model_type {model_type!r} ({names})", False
    if pattern is None or pattern == ALL_LINEAR:
        return ALL_LINEAR, "all linear layers but the output head", True
    if callable(pattern):
        return pattern, f"the callable {getattr(pattern, '__name__', type(pattern).__name__)}", True
    if isinstance(pattern, str):
        return pattern, f"the regex '{pattern}'", True
    return tuple(pattern), f"the names {', '.join(pattern)}", True


def _matching(visits: Sequence[Visit], pattern: Pattern, rule: str, *, must_match: bool) -> list[Visit]:
    """Take the linear layers that a pattern matches; refuse what has a weight matrix and is none."""
    found = [visit for visit in visits if matches(pattern, visit.fqn, visit.module)]
    chosen = [visit for visit in found if isinstance(find_layer(visit.module), type)]
    problems = [reason for visit in found if (reason := _refusal(visit)) is not None]
    known = [visit.fqn for visit in visits if isinstance(find_layer(visit.module), type)]
    if must_match and not problems:
        problems += [
            f"{entry!r} matches no linear layer; the nearest names are {nearest_names(entry, known)}"
            for entry in unmatched(pattern, [visit.fqn for visit in chosen])
        ]
    if not chosen and not problems:
        problems.append(f"{rule} matches no linear layer; the model has {_listed(known)}")
    raise_collected(TargetError, problems, doing="find the targets")
    return chosen


def _refusal(visit: Visit) -> str | None:
    """Why a matched module cannot be adapted; ``None`` for linear layers, containers and modules without a matrix."""
    entry = find_layer(visit.module)
    if isinstance(entry, str):
        return f"{visit.fqn} ({type(visit.module).__name__}) cannot be adapted: {entry}"
    parameters = [parameter for parameter in visit.module._parameters.values() if parameter is not None]
    if entry is None and any(is_lazy(parameter) or parameter.ndim >= 2 for parameter in parameters):
        kind = type(visit.module).__name__
        return f"{visit.fqn} is a {kind}, and only linear layers can be adapted: narrow the pattern to leave it out"
    return None


def _all_linear(model: nn.Module, visits: Sequence[Visit]) -> tuple[list[Visit], dict[str, str]]:
    head = model.get_output_embeddings() if isinstance(model, HasOutputEmbeddings) else None
    linear = [(visit, entry) for visit in visits if (entry := find_layer(visit.module)) is not None]
    heads = {id(visit.module) for visit, _ in linear if _is_head(visit, head)}
    skipped = {visit.fqn: entry for visit, entry in linear if isinstance(entry, str)}
    skipped |= {visit.fqn: "the output head" for visit, entry in linear if id(visit.module) in heads}
    return [visit for visit, _ in linear if visit.fqn not in skipped], skipped


def _is_head(visit: Visit, head: nn.Module | None) -> bool:
    named_so = visit.fqn.split(".")[0] in HEAD_NAMES
    return named_so or (head is not None and (visit.module is head or visit.adapter is head))


def _without(chosen: list[Visit], visits: Sequence[Visit], exclude: Pattern) -> list[Visit]:
    """Leave out the layers that ``exclude`` matches under any of their names; a name in a list means all inside too."""
    linear = [visit for visit in visits if find_layer(visit.module) is not None]
    by_name = not callable(exclude) and not isinstance(exclude, str)
    known = {name for visit in linear for name in (prefixes(visit.fqn) if by_name else [visit.fqn])}
    problems = [
        f"exclude={entry!r} matches no linear layer; the nearest names are {nearest_names(entry, known)}"
        for entry in unmatched(exclude, known)
    ]
    raise_collected(TargetError, problems, doing="find the targets")
    excluded = {
        id(visit.module)
        for visit in linear
        if any(matches(exclude, name, visit.module) for name in (prefixes(visit.fqn) if by_name else [visit.fqn]))
    }
    return [visit for visit in chosen if id(visit.module) not in excluded]


def _targets(chosen: Sequence[Visit], visits: Sequence[Visit]) -> Iterator[Target]:
    """Make one target a layer, whichever of its names were matched."""
    wanted = {id(visit.module) for visit in chosen}
    places: dict[int, list[Visit]] = {}
    for visit in visits:
        if id(visit.module) in wanted:
            places.setdefault(id(visit.module), []).append(visit)
    for found in places.values():
        first = found[0]
        layer_class = find_layer(first.module)
        assert isinstance(layer_class, type), "only linear layers are chosen"
        hung = {(id(visit.parent), visit.attribute): (visit.parent, visit.attribute) for visit in found}
        yield Target(first.fqn, first.module, layer_class, tuple(hung.values()), first.adapter)


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none at all"
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")

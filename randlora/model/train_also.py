"""Parameters trained beside an adapter: a new head, biases, norms.

The model's own values stay untouched. Each adapter trains a copy, which the model reads while that adapter is active.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from randlora.state import ModelState, ReplacedParameter
from randlora.targets.match import matches_name, nearest_names, prefixes, unmatched
from randlora.targets.select import Target
from randlora.targets.walk import is_quantized, named_parameters, walk


def select_parameters(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """Find the parameters that a regex or a list of names means: those matched, and those inside a matched module.

    Args:
        model: The model, adapted or not.
        names: As `RandLoRAConfig.train_also`.

    Returns:
        FQNs, one per parameter: its first, where it is tied.
    """
    first_names: dict[int, str] = {}
    found: dict[str, None] = {}
    for fqn, _, _, parameter in named_parameters(model):
        first = first_names.setdefault(id(parameter), fqn)
        if any(matches_name(names, prefix) for prefix in prefixes(fqn)):
            found[first] = None
    return list(found)


def train_also_problems(model: nn.Module, names: str | Sequence[str], targets: Iterable[Target]) -> list[str]:
    """Say what is wrong with ``train_also``: names that match nothing, weights that are adapted or codes, integers."""
    places = {fqn: (module, attribute, parameter) for fqn, module, attribute, parameter in named_parameters(model)}
    known = {prefix for fqn in places for prefix in prefixes(fqn)}
    problems = [
        f"train_also={entry!r} matches no module or parameter; the nearest names are {nearest_names(entry, known)}"
        for entry in unmatched(names, known)
    ]
    problems += [
        f"train_also takes in {fqn}, whose running statistics an adapter cannot carry: name its parameters one by one"
        for fqn, module in _matched_modules(model, names)
        if any(name not in module._non_persistent_buffers_set for name in module._buffers)
    ]
    adapted = {id(target.module._parameters.get("weight")) for target in targets}
    for fqn in select_parameters(model, names):
        module, attribute, parameter = places[fqn]
        if id(parameter) in adapted:
            problems.append(
                f"train_also takes in {fqn}, the weight that the adapter already trains: name its bias alone"
            )
        elif attribute == "weight" and is_quantized(module):
            problems.append(
                f"train_also takes in {fqn}, which is codes ({type(module).__name__}) and cannot be trained: leave it "
                "out and name a bias alone, or load the model with this layer not quantized, as with "
                "llm_int8_skip_modules of a BitsAndBytesConfig"
            )
        elif not parameter.is_floating_point():
            problems.append(f"train_also takes in {fqn}, which holds {parameter.dtype} and cannot be trained")
    return problems


def _matched_modules(model: nn.Module, names: str | Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules that are matched, or inside one that is."""
    for visit in walk(model):
        if any(matches_name(names, prefix) for prefix in prefixes(visit.fqn)):
            yield visit.fqn, visit.module


def replacements(model: nn.Module, state: ModelState, fqns: Iterable[str]) -> dict[str, ReplacedParameter]:
    """Look up the model's own parameters of these names and their places, whatever is installed there now."""
    listed = list(named_parameters(model))
    by_fqn = {fqn: parameter for fqn, _, _, parameter in listed}
    found = {}
    for fqn in fqns:
        places = tuple((module, attribute) for _, module, attribute, held in listed if held is by_fqn[fqn])
        found[fqn] = state.replaced.get(fqn) or ReplacedParameter(places, by_fqn[fqn], by_fqn[fqn])
    return found


def own_copies(replaced: dict[str, ReplacedParameter], *, trainable: bool) -> dict[str, nn.Parameter]:
    """Copy the model's own values for an adapter to train."""
    return {
        fqn: nn.Parameter(entry.original.detach().clone(), requires_grad=trainable) for fqn, entry in replaced.items()
    }

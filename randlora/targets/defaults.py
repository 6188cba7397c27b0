"""The layers adapted where no targets are given: those of a preset, else attention's, by names that models share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from randlora.config import Pattern
from randlora.targets.left_out import LINEAR_KINDS
from randlora.targets.match import matches
from randlora.targets.presets import DIFFUSERS_NAMES, LANGUAGE_MODEL, TARGET_PRESETS, TRANSFORMERS_NAMES
from randlora.targets.ties import tied_names
from randlora.targets.walk import Census, Visit


def default_targets(census: Census) -> tuple[Pattern, str] | None:
    """Return the pattern of the layers adapted by default, and what it selects; ``None`` if no attention is found.

    Neither is it found where none of the layers can be adapted, because each is tied to another, or is not called, so
    that an adapter would have no effect.

    Only models of transformers (which have a ``config.model_type``) and of diffusers have a default: elsewhere, a layer
    named ``value`` may be anything.
    """
    default = _by_names(census)
    if default is None:
        return None
    keys = {visit.key for visit in census.candidates if matches(default[0], visit.fqn, visit.module) and visit.entry}
    tied = tied_names(census, [site for site in census.sites if site.key in keys])
    return None if keys and census.uncalled.keys() | tied.keys() >= keys else default


def _by_names(census: Census) -> tuple[Pattern, str] | None:
    model_type = getattr(getattr(census.model, "config", None), "model_type", None)
    if model_type in TARGET_PRESETS:
        preset = TARGET_PRESETS[model_type]
        names = preset if isinstance(preset, str) else ", ".join(preset)
        return preset, f"the preset of model_type {model_type!r} ({names})"
    if isinstance(model_type, str):
        what = "the query and value projections"
        visits: Sequence[Visit] = [visit for visit in census.visits if LANGUAGE_MODEL in visit.fqn.split(".")]
        if visits:
            return _named(visits, TRANSFORMERS_NAMES, f"{what} of {LANGUAGE_MODEL}")
        return _named(census.visits, TRANSFORMERS_NAMES, what)
    if _is_of_diffusers(census.model):
        visits = [visit for visit in census.visits if "time" not in visit.fqn]  # some embed it by attention
        return _named(visits, DIFFUSERS_NAMES, "the attention projections")
    return None


def is_linear(visit: Visit) -> bool:
    """Whether a module or weight is, or looks like, a linear layer or a projection of attention."""
    entry = visit.entry
    return isinstance(entry, str) or (entry is not None and entry.kind in LINEAR_KINDS)


def _is_of_diffusers(model: nn.Module) -> bool:
    """Whether a model's class derives from one of diffusers, whose configs name no type."""
    return any(base.__module__.partition(".")[0] == "diffusers" for base in type(model).__mro__)


def _named(visits: Iterable[Visit], names: Sequence[str], what: str) -> tuple[Pattern, str] | None:
    """Return the pattern and the rule of the linear layers that have one of some names, or lie in a module that has."""
    found = {visit.fqn: visit.fqn.split(".")[-2:] for visit in visits if is_linear(visit)}
    chosen = {fqn for fqn, ending in found.items() if not set(names).isdisjoint(ending)}
    if not chosen:
        return None
    present = [name for name in names if any(name in found[fqn] for fqn in chosen)]
    return lambda fqn, _module: fqn in chosen, f"{what} ({', '.join(present)})"

"""Adapters that have no effect because nothing has trained them: a note on each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from randlora.modes import has_values
from randlora.places import is_whole, place_at, values_within
from randlora.state import Adapter, ModelState
from randlora.targets.walk import Census


def untrained_note(
    state: ModelState,
    adapter: Adapter,
    diagonals: Iterable[tuple[Tensor, Tensor]],
    trained: Mapping[str, Tensor],
) -> list[str]:
    """Return a note if an adapter's update is exactly zero in all layers and its parameters are those of the base.

    Args:
        state: The state of the model.
        adapter: The adapter.
        diagonals: Its Λ and Γ in each layer, with all their values.
        trained: The parameters trained with it by FQN, with all their values.
    """
    if any(lam.any() and gamma.any() for lam, gamma in diagonals):
        return []
    if not all(_equals(state.replaced[fqn].original, trained[fqn]) for fqn in adapter.parameters):
        return []
    also = ", and what train_also names is as in the base" if adapter.parameters else ""
    cause = "an optimizer that was made before inject does not know its parameters"
    zero = f"the update of {adapter.name!r} is exactly zero in all layers{also}"
    return [f"{zero}: nothing has trained it; {cause}, make one of randlora.trainable_parameters(model)"]


def untrained_notes(census: Census, state: ModelState, adapters: Iterable[Adapter]) -> list[str]:
    """Return a note on each adapter of a model that has no effect, except where only parts of its values are here."""
    notes = []
    for adapter in adapters:
        sites = [site for site in census.adapted if adapter.name in site.layer.adapters]
        diagonals = [site.layer.diagonals_of(site.owner, adapter.name) for site in sites]
        flat = [*(each for pair in diagonals for each in pair), *adapter.parameters.values()]
        if all(_is_whole(each) for each in flat):
            notes += untrained_note(state, adapter, diagonals, adapter.trained)
    return notes


def _is_whole(tensor: Tensor) -> bool:
    return has_values(tensor) and is_whole(tensor)


def _equals(own: Tensor, copy: Tensor) -> bool:
    """Whether a whole copy has the values of the model's own parameter, as far as this process has them."""
    place = place_at(own)
    if not has_values(own) or not place.is_lasting:
        return False
    if place.part is not None:
        own, copy = place.read(), values_within(copy, place.part)
    return torch.equal(own.detach().to(device=copy.device, dtype=copy.dtype), copy.detach())

"""`rename`: another name for an adapter."""

from __future__ import annotations

from torch import nn

from randlora.errors import AdapterError, raise_collected
from randlora.model.install import require_new_name
from randlora.model.trainable import offloaded_diagonals
from randlora.model.view import opened
from randlora.places import is_whole
from randlora.state import require_unmerged, require_unused
from randlora.targets.site import AdaptedSite


def rename(model: nn.Module, name: str, to: str) -> None:
    """Give an adapter another name, in place. Nothing else changes: its place, whether it is active, what it trains.

    Parameters remain the same objects, so an optimizer goes on, and compiled programs compile nothing. State dicts have
    them under the new name.

    Args:
        model: A model with adapters.
        name: The adapter to rename.
        to: Its new name.

    Raises:
        AdapterError: If the model has no such adapter, the new name is invalid or taken, the adapters are merged, a
            block of `randlora.serving.routed` is open, or Λ and Γ are sharded by `fully_shard`, which knows them by
            name, or offloaded by accelerate.
    """
    with opened(model, "rename an adapter", writes=True) as view:
        state = view.state
        adapter = state.adapter(name)
        doing = f"rename {adapter.name!r}"
        require_new_name(state, to, f"{doing} to")
        require_unmerged(state, doing)
        require_unused(state, None, doing)  # which goes by names
        sites = [site for site in view.census.adapted if name in site.layer.adapters]
        sharded = [
            f"Λ and Γ of {site.fqn} are sharded, and fully_shard knows them by name: rename before it is called"
            for site in sites
            if not all(is_whole(each) for each in site.layer.diagonals_of(site.owner, name))
        ]
        raise_collected(AdapterError, [*sharded, *offloaded_diagonals(view.census)], doing=doing)
        adapter.name = to
        renamed = {each.name: each for each in state.adapters.values()}
        state.adapters.clear()
        state.adapters |= renamed
        for site in sites:
            _rename_at(site, name, to)
        if state.averaging is not None:
            state.averaging.rename({site.layer for site in sites}, name, to)


def _rename_at(site: AdaptedSite, name: str, to: str) -> None:
    """Give an adapter of a weight, whose own name is the new one already, that name here too, in the same place."""
    for part in site.layer.parameter_names():
        held = site.owner._modules[part]
        assert isinstance(held, nn.ParameterDict), "the weight is adapted"
        for known, parameter in [*held._parameters.items()]:  # all of them, so that their order stays
            del held[known]
            held[to if known == name else known] = parameter
    renamed = {part.adapter.name: part for part in site.layer.adapters.values()}
    site.layer.adapters.clear()
    site.layer.adapters |= renamed
    site.layer.seat(site.owner)

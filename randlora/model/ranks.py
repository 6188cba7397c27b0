"""Which processes hold an adapted model together."""

from __future__ import annotations

from torch import nn

from randlora.places import ranks_of, settle
from randlora.ranks import Ranks
from randlora.state import ModelState, adapted_root
from randlora.targets.walk import Census


def ranks_holding(census: Census, state: ModelState, *, is_written: bool = False) -> Ranks | None:
    """Return the processes that hold an adapted model together; ``None`` if each holds all of it.

    They are those that any of its parameters is sharded over. Whether Λ and Γ are depends on whether the adapter was
    added before the model was sharded, on which what a call does must not depend.

    Args:
        census: The module that has the adapters, with its parameters as they are at rest.
        state: Its state.
        is_written: See `ranks_of`.

    Raises:
        AdapterError: If parameters are sharded over processes that no mesh has all of.
    """
    own = [held.parameter for held in census.parameters]
    added = [site.owner.get_submodule(name) for site in census.adapted for name in site.layer.parameter_names()]
    diagonals = (diagonal for each in added for diagonal in each.parameters())
    copies = (copy for adapter in state.adapters.values() for copy in adapter.trained.values())
    return ranks_of([*own, *diagonals, *copies], is_written=is_written)


def is_held_together(model: nn.Module) -> bool:
    """Whether several processes hold an adapted model together, so that each has to call what reads or writes it."""
    settle(model)  # after a forward, whole copies may be in the places of shards
    root, state = adapted_root(model)
    return ranks_holding(Census.of(root), state) is not None

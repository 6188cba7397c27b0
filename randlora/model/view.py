"""How a verb begins and ends: one thread at a time opens an adapted model, and a verb that raises changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import nn

from randlora.model.change import all_or_nothing
from randlora.model.engines import ranks_holding
from randlora.model.install import owned_state, require_new_name, require_own
from randlora.places import settle
from randlora.ranks import Ranks
from randlora.state import CHANGING, ModelState, adapted_root
from randlora.targets.census import Census


@dataclass(frozen=True)
class View:
    """An adapted model while a verb looks at it or changes it.

    Attributes:
        root: The module with the adapters: the model itself, or a module inside it, such as in a wrapper.
        state: Its adapters.
        census: Its modules and parameters.
    """

    root: nn.Module
    state: ModelState
    census: Census

    def ranks(self, *, is_written: bool = False) -> Ranks | None:
        """Return the processes that together hold the model; see `ranks_holding`."""
        return ranks_holding(self.census, self.state, is_written=is_written)


@contextmanager
def opened(model: nn.Module, doing: str | None, *, writes: bool = False) -> Iterator[View]:
    """Open an adapted model for one verb, while other threads that want to change a model wait.

    Args:
        model: A model with adapters, or a wrapper around it.
        doing: What the caller is about to do with all layers, for messages, such as ``"merge"``. ``None`` if the layers
            may belong to any module.
        writes: Whether the block changes the model. If it raises, every change is undone.

    Raises:
        AdapterError: If the model has no adapter, or a layer has adapters that were added to another module.
    """
    with CHANGING:
        settle(model)  # after a forward, whole copies may be in the places of shards
        root, state = adapted_root(model)
        view = View(root, state, Census.of(root))
        if doing is not None:
            require_own(view.census, state, doing)
        with all_or_nothing(view.census, state) if writes else nullcontext():
            yield view


@contextmanager
def opened_to_add(model: nn.Module, names: Iterable[str], doing: str) -> Iterator[View]:
    """Open a model, adapted or not, for a verb that adds adapters of these names.

    The view has the model without a wrapper around it, and possibly a state that is not attached yet.
    """
    with CHANGING:
        settle(model)
        census = Census.of(model)
        state = owned_state(census, doing)
        for name in names:
            require_new_name(state, name, doing)
        yield View(model, state, census)

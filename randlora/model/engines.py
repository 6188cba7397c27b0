"""Engines that train a model in several processes, and which processes together hold a model.

A feature registers an `Engine`, which is told what an adapter trains. Without one, nothing is known of other processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from randlora.layers.base import AdapterLayer
from randlora.places import ranks_of, settle
from randlora.ranks import Ranks
from randlora.replaced import ReplacedParameter
from randlora.state import ModelState, adapted_root
from randlora.targets.census import Census

Parts = Sequence[tuple[nn.Module, AdapterLayer, str]]
"""Adapters of weights: for each, the module, its adapter layer, and the adapter's name."""


class Engine:
    """An engine that trains models in several processes. Register subclasses, which override what they need."""

    def require_averaged(self, root: nn.Module, parts: Parts, replaced: Iterable[ReplacedParameter]) -> None:
        """Raise an `AdapterError` unless the gradients of everything that adapters train would be averaged."""

    def added(self, root: nn.Module, state: ModelState, parts: Parts) -> None:
        """Have the gradients of a new adapter averaged."""

    def changed(self, root: nn.Module) -> None:
        """React to a change of which parameters of a model require grad, such as by a warning."""

    def is_first_copy(self, model: nn.Module) -> bool:  # noqa: ARG002  # for those that cannot tell
        """Whether this is the first of the processes that train copies of a model, according to this engine."""
        return True


ENGINES: list[Engine] = []


def register_engine(kind: type[Engine]) -> type[Engine]:
    """Add an engine; a decorator of its class."""
    ENGINES.append(kind())
    return kind


def require_averaged(root: nn.Module, parts: Parts, replaced: Iterable[ReplacedParameter]) -> None:
    """Raise an `AdapterError` unless every engine would average the gradients of everything that adapters train."""
    replaced = list(replaced)
    for engine in ENGINES:
        engine.require_averaged(root, parts, replaced)


def tell_added(root: nn.Module, state: ModelState, parts: Parts) -> None:
    """Tell every engine that an adapter was added."""
    for engine in ENGINES:
        engine.added(root, state, parts)


def tell_changed(root: nn.Module) -> None:
    """Tell every engine that different parameters of a model may require grad now."""
    for engine in ENGINES:
        engine.changed(root)


def is_first_copy(model: nn.Module) -> bool:
    """Whether this is the first of the processes that train copies of a model, according to all engines."""
    return all(engine.is_first_copy(model) for engine in ENGINES)


def ranks_holding(census: Census, state: ModelState, *, is_written: bool = False) -> Ranks | None:
    """Return the processes that together hold an adapted model; ``None`` if each holds all of it.

    These are all processes over which any of its parameters is sharded. Λ and Γ are sharded only if the adapter was
    added before the model was sharded, and calls must not depend on that.

    Args:
        census: The module that has the adapters, with its parameters as they are at rest.
        state: Its state.
        is_written: See `ranks_of`.

    Raises:
        AdapterError: If no mesh has all processes over which parameters are sharded.
    """
    own = [held.parameter for held in census.parameters]
    added = [site.owner.get_submodule(name) for site in census.adapted for name in site.layer.parameter_names()]
    diagonals = (diagonal for each in added for diagonal in each.parameters())
    copies = (copy for adapter in state.adapters.values() for copy in adapter.trained.values())
    return ranks_of([*own, *diagonals, *copies], is_written=is_written)


def is_held_together(model: nn.Module) -> bool:
    """Whether several processes together hold an adapted model, so that all must call functions on it."""
    settle(model)  # after a forward, whole copies may be in the places of shards
    root, state = adapted_root(model)
    return ranks_holding(Census.of(root), state) is not None

"""Engines that train a model in several processes, and verbs of the processes that together hold a model.

A feature registers an `Engine`, which is told what an adapter trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from torch import nn

from randlora.layers.base import AdapterLayer
from randlora.places import ranks_of, settle
from randlora.ranks import Ranks, raise_on_every_rank
from randlora.replaced import ReplacedParameter
from randlora.state import CHANGING, ModelState

Given = ParamSpec("Given")
Result = TypeVar("Result")

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


def ranks_holding(model: nn.Module, *, is_written: bool = False) -> Ranks | None:
    """Return the processes that together hold a model, whose parameters are as they are at rest; else ``None``.

    These are all processes over which any of its parameters is sharded. Λ and Γ are sharded only if the adapter was
    added before the model was sharded, and calls must not depend on that. ``is_written`` is as for `ranks_of`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return ranks_of(model.parameters(), is_written=is_written)


def is_held_together(model: nn.Module, *, is_written: bool = False) -> bool:
    """Whether several processes together hold an adapted model, so that all must call functions on it.

    ``is_written`` is as for `ranks_of`: then a model of ZeRO-3 counts that is whole on this process now.
    """
    settle(model)  # after a forward, whole copies may be in the places of shards
    return ranks_holding(model, is_written=is_written) is not None


@contextmanager
def together(model: Any, *, writes: bool) -> Iterator[None]:
    """Raise an error in all processes that together hold a model if the block raised one in any of them.

    See `randlora.ranks.raise_on_every_rank`. A verb that changes a model (``writes``), or that reads values which other
    processes hold, runs in such a block as a whole, so that an error at its very beginning does not leave others
    waiting.
    """
    ranks, unsettled = None, None
    if isinstance(model, nn.Module):  # the caller refuses others
        try:
            with CHANGING:
                settle(model)
        except Exception as error:  # raised when it is known by whom
            unsettled = error
        ranks = ranks_holding(model, is_written=writes)
    with raise_on_every_rank(ranks):
        if unsettled is not None:
            raise unsettled
        yield


def collective(*, writes: bool) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Return a decorator that has a function of a model, its first argument, run in a block of `together`."""

    def decorate(verb: Callable[Given, Result]) -> Callable[Given, Result]:
        @wraps(verb)
        def run_together(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            with together(args[0] if args else kwargs.get("model"), writes=writes):
                return verb(*args, **kwargs)

        return run_together

    return decorate

"""`routed`: each row of a batch through its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from randlora.blocks import open_elsewhere
from randlora.errors import AdapterError, raise_collected
from randlora.hints import shortly
from randlora.model.install import lost_sites, require_own
from randlora.model.switch import without_active
from randlora.model.trainable import adapter_parameters, offloaded_diagonals
from randlora.model.uncompiled import uncompiled
from randlora.places import is_whole
from randlora.serving.entries import Entries
from randlora.serving.run import RowByRow
from randlora.state import ModelState, adapted_root, require_unmerged
from randlora.targets.walk import Census

ELSEWHERE = "another thread, or task, routes through this model: wait for it, or gather the rows into one batch"


def routed(
    model: nn.Module, names: Sequence[str | None] | Sequence[Sequence[str | None]]
) -> AbstractContextManager[None]:
    """Run each row of a batch through its own adapter inside a ``with`` block, whichever adapters are active.

    A linear layer computes the base for the whole batch once, and adapters on the same bases share the product with
    them. Convolutions, attention and experts run once for each adapter, with its rows. Gradients are those of single
    adapters; call ``backward`` inside of the block if parts of the model are checkpointed.

    Inside transformers' ``generate`` every row may become several, as for beams. Blocks can be nested, also with those
    of `randlora.disabled`: the innermost counts.

    Args:
        model: A model with adapters.
        names: The adapter of each row, ``None`` for the base alone; or for each row the adapters of its tokens, where
            several sequences are packed into one row.

    Raises:
        AdapterError: If a name is unknown, or an adapter cannot be routed: it trained parameters besides its own with
            ``train_also``, the adapters are merged, or another thread routes through this model. In the block, if a
            call of the model has another number of rows, or a layer does not tell its rows.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, name="a"), randlora.inject(model, r=4, name="b", seed=1)
        >>> with randlora.serving.routed(model, ["a", "b", None]):
        ...     y = model(torch.randn(3, 8))
    """

    def checked(census: Census, state: ModelState) -> RowByRow:
        require_unmerged(state, "route")
        require_own(census, state, "route")
        routing = _routing(names)
        raise_collected(AdapterError, _problems(state, routing), doing="route")
        used = [state.adapters[name] for name in routing.adapters]
        raise_collected(AdapterError, [*lost_sites(census, used), *offloaded_diagonals(census)], doing="route")
        state.require_exchangeable([], "route")
        parameters = [*adapter_parameters(census, *used)]
        routing.keeps = all(map(is_whole, {type(part): part for part in parameters}.values()))
        return routing

    return _watching(model, without_active(model, checked))


@contextmanager
def _watching(model: nn.Module, block: AbstractContextManager[object]) -> Iterator[None]:
    """Watch the calls of a model in a block, in which compiled code runs uncompiled."""
    with block as routing, uncompiled():
        assert isinstance(routing, RowByRow), "it was made for this"
        root, state = adapted_root(model)
        entries = Entries(root, state, routing)
        try:
            yield
        finally:
            entries.close()


def _routing(names: object) -> RowByRow:
    """Return the routing for some names, of whatever type was given."""
    expected = "expected the name of an adapter, or None, for each row, or a sequence of those for each"
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise AdapterError(f"{expected}, got {shortly(names)}")
    rows = [row for row in names if row is not None and not isinstance(row, str)]
    if strange := [row for row in rows if not isinstance(row, Sequence) or not row]:
        raise AdapterError(f"{expected}, got {shortly(strange[0])}")
    if rows and len(rows) < len(names):
        raise AdapterError(f"{expected}, got both in {shortly(names)}")
    if len(set(map(len, rows))) > 1:
        raise AdapterError(f"the rows of names for tokens have {sorted(set(map(len, rows)))} names: pad them with None")
    if strange := [name for row in rows for name in row if name is not None and not isinstance(name, str)]:
        raise AdapterError(f"{expected}, got {shortly(strange[0])}")
    return RowByRow(names)


def _problems(state: ModelState, routing: RowByRow) -> list[str]:
    problems = state.unknown(routing.adapters)
    problems += [
        f"{name!r} trained {', '.join(state.adapters[name].trained)} with train_also, of which the model has one for "
        "all rows: activate it alone"
        for name in routing.adapters
        if name in state.adapters and state.adapters[name].trained
    ]
    if open_elsewhere(state.disabled):
        problems.append(ELSEWHERE)
    return problems

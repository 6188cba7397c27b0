"""`check_rows`: whether rows are where `routed` expects them, found out by a second forward of a rolled batch."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer
from randlora.serving.routed import WITHOUT_ROWS, block_of, routing_of
from randlora.serving.routing import Layout
from randlora.serving.run import RowByRow


@torch.no_grad()
def check_rows(model: nn.Module, names: Sequence[str | None], *args: Any, **kwargs: Any) -> None:
    """Check that each layer finds the rows of a batch where `routed` expects them. For a model of your own.

    `routed` follows rows in the first call with inputs of some shapes, and expects them in the same places in later
    calls. This runs the model twice, in evaluation mode: first as given, and then with the batch and the names rolled
    by one row. In each layer the outputs of the rows must have moved with them. Rows must differ from one another.

    Both forwards draw the same random numbers and are given copies of the arguments, including caches. Afterwards modes
    and random states are as before; what the forward changes in the model itself stays. It takes memory for the outputs
    of all adapted layers. If the model is sharded, all processes call this together.

    Args:
        model: A model with adapters.
        names: The adapter of each row, as for `routed`; at least two different ones.
        *args: What you would pass to the model.
        **kwargs: What you would pass to the model by keyword.

    Raises:
        AdapterError: If the rows of a layer moved differently, which names the first such layer, or `routed` refuses
            the names, the model or the call.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, name="a")
        >>> randlora.serving.check_rows(model, ["a", None, None], torch.randn(3, 8))
    """
    first, second = routing_of(names), routing_of([*names[-1:], *names[:-1]])
    if first.is_uniform:
        raise AdapterError("cannot check rows that all have the same adapter: name at least two, or None for the base")
    outputs: list[tuple[str, Tensor]] = []
    first.watch = lambda *given: outputs.append(_by_row(first, 0, *given))
    # modes alone: parameters that `fully_shard` made whole must not be put back
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        _forward(model, first, args, kwargs, 0)
        second.expect(first)
        expected = iter(outputs)
        second.watch = lambda *given: _compare(_by_row(second, 1, *given), next(expected, None))
        _forward(model, second, args, kwargs, 1)
    finally:
        for module, training in modes:
            module.training = training


def _forward(model: nn.Module, routing: RowByRow, args: Any, kwargs: Any, shift: int) -> None:
    """Run a model with copies of its arguments in which the rows are rolled."""
    args, kwargs = _copied(args, kwargs, len(routing.index), shift)
    device = next((each.device for each in model.parameters() if each.device.type not in ("cpu", "meta")), None)
    fork = {"devices": []} if device is None else {"devices": [device.index], "device_type": device.type}
    with torch.random.fork_rng(**fork), block_of(model, routing):
        model(*args, **kwargs)


def _copied(args: Any, kwargs: Any, rows: int, shift: int) -> Any:
    """Return copies of arguments, in which each tensor with the rows of the batch is rolled, inside of caches too."""
    copies: dict[int, tuple[Any, Any]] = {}  # each with the original, whose id no other object gets meanwhile
    excluded = {id(kwargs.get(name)) for name in WITHOUT_ROWS}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if isinstance(value, Tensor):
                has_rows = value.dim() and value.shape[0] == rows and id(value) not in excluded
                copies[id(value)] = value, value.roll(shift, 0) if has_rows else value.clone()
            elif isinstance(value, torch.Generator):
                copies[id(value)] = value, value.clone_state()
            elif isinstance(value, nn.Module | type | FunctionType):
                copies[id(value)] = value, value  # both forwards are given it as it is
            return id(value) if id(value) in copies else None

    class Unpickler(pickle.Unpickler):  # noqa: S301  # of what was pickled just before
        def persistent_load(self, key: int) -> Any:
            return copies[key][1]

    Pickler(file := io.BytesIO()).dump((args, kwargs))
    file.seek(0)
    return Unpickler(file).load()


def _by_row(
    routing: RowByRow, shift: int, layer: AdapterLayer, value: Tensor, layout: Layout, axis: int
) -> tuple[str, Tensor]:
    """Return the FQN of a layer and the entries of its output, sorted by what was their row before the batch rolled."""
    fqn = next(layer.adapters[name].fqn for name in routing.adapters if name in layer.adapters)
    end = axis + layout.rows.dim()
    rows = (layout.rows - shift) % len(routing.index)
    order = rows.expand(value.shape[axis:end]).flatten().argsort(stable=True)
    entries = value.detach().flatten(axis, end - 1).movedim(axis, 0)
    return fqn, entries[order.to(value.device)]


def _compare(found: tuple[str, Tensor], expected: tuple[str, Tensor] | None) -> None:
    """Raise an `AdapterError` unless a layer's output is the same in both forwards, row for row."""
    fqn, output = found
    if expected is None or expected[0] != fqn:
        problem = "was not called there in the forward before"
    elif expected[1].shape != output.shape:
        problem = "had a different shape in the forward before"
    else:
        largest = expected[1].abs().amax() if output.numel() else output.new_zeros(())
        tolerance = torch.finfo(output.dtype).eps ** 0.5 * largest
        if torch.allclose(output, expected[1], rtol=0, atol=float(tolerance), equal_nan=True):
            return
        problem = "has rows in different places than routed expects"
    raise AdapterError(
        f"{fqn} {problem}, after the batch and the names were rolled by one row: exclude the layer when the adapter is "
        "made, or open a block of routed for each call, unless the model draws different noise for each row"
    )

"""The entries of a merged model's state dict, each with a function that computes its value when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora.layers.base import AdapterLayer
from randlora.layers.cast import cast
from randlora.layers.in_place import plain_class
from randlora.layers.quantized import QuantizedLayer
from randlora.layers.update import Into
from randlora.model.mergeable import require_finite
from randlora.places import lent, place_of, ranks_of, whole
from randlora.ranks import raise_on_every_rank, run_collectives
from randlora.state import ModelState
from randlora.targets.site import Site
from randlora.targets.walk import Census


class Share(Enum):
    """What a process does for a merged weight whose values several processes hold; they all gather together.

    Attributes:
        PART: Computes its own part; then all parts are gathered. Parts of a product may round otherwise than all of it.
        WHOLE: Computes all of it from what is gathered, with the bits of one process.
        NONE: Computes nothing, and drops what is gathered.
    """

    PART = "part"
    WHOLE = "whole"
    NONE = "none"


class Entry(NamedTuple):
    """One entry of the state dict, and a function that returns its value now, or ``None`` if it was not computed."""

    fqn: str
    read: Callable[[Share], Tensor | None]


def entries_of(census: Census, state: ModelState, into: Into) -> Iterator[Entry]:
    """Go through a model in the order of its state dict."""
    for prefix, module in modules_of(census):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                fqn = f"{prefix}{attribute}"
                read = _reader(census, module, attribute, fqn, state, into)
                yield Entry(fqn, partial(_rounded, module, attribute, read))
        for attribute, _ in saved_buffers(module):
            yield Entry(f"{prefix}{attribute}", _reading(partial(_held, module, attribute)))


def _rounded(module: nn.Module, attribute: str, read: Callable[[Share], Tensor | None], share: Share) -> Tensor | None:
    """Return the value of a parameter in the dtype that its module computes with."""
    return None if (value := read(share)) is None else cast(module, attribute, value)


def modules_of(census: Census) -> list[tuple[str, nn.Module]]:
    """Return all modules at each of their places, with what their names begin with."""
    return [("", census.model), *((f"{visit.fqn}.", visit.module) for visit in census.visits)]


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a state dict has."""
    for attribute, buffer in module._buffers.items():
        if buffer is not None and attribute not in module._non_persistent_buffers_set:
            yield attribute, buffer


def _reader(
    census: Census, module: nn.Module, attribute: str, fqn: str, state: ModelState, into: Into
) -> Callable[[Share], Tensor | None]:
    """Return a function that returns the value of one parameter now."""
    site = census.sites_by_key.get((id(module), attribute))
    if site is not None and (site.adapter_layer is not None or issubclass(site.layer_class, QuantizedLayer)):
        return partial(_weight, fqn, site, state, into)
    beside = census.sites_by_key.get((id(module), "weight")) if attribute == "bias" else None
    if beside is not None and issubclass(beside.layer_class, QuantizedLayer):
        return _reading(partial(_bias, beside, state, into))
    return _reading(partial(_held, module, attribute))


def _reading(read: Callable[[], Tensor]) -> Callable[[Share], Tensor]:
    """Return a function that reads a value which is not computed, whatever the share."""
    return lambda _: read()


def _weight(fqn: str, site: Site, state: ModelState, into: Into, share: Share) -> Tensor | None:
    """Return a weight plus the updates of the active adapters, dequantized."""
    layer = _layer(site, state)
    if not state.is_merged and (factors := layer.factors(state.active)):
        if share is Share.NONE:
            run_collectives(partial(_dropped, each) for each in _gathered_for(layer, site.owner, factors))
            return None
        if share is Share.PART or isinstance(layer, QuantizedLayer):
            return require_finite(fqn, _from_parts(layer, site.owner, factors, into))
        updates, own = run_collectives([
            partial(layer.whole_updates, site.owner, factors),
            partial(_held, site.owner, layer.attribute),
        ])
        return require_finite(fqn, layer.with_updates(own, updates))
    if isinstance(layer, QuantizedLayer) and plain_class(site.owner) is not nn.Linear:  # which a merge may make it
        return layer.written_out(site.owner).to(_plain_dtype(layer, site.owner, into))
    return _held(site.owner, layer.attribute)


def _from_parts(layer: AdapterLayer, owner: nn.Module, factors: dict[str, float], into: Into) -> Tensor:
    """Return a merged weight of which each process computes the part that it holds."""
    place = place_of(owner, layer.attribute)
    if place.part is None:
        return layer.merged(owner, factors, into).weight
    with raise_on_every_rank(ranks_of(owner.parameters())):  # or the others would wait for this process's part
        merged = layer.merged(owner, factors, into).weight
    stored = place.stored(merged)
    assert stored is not None, "it is a part of the weight"
    return whole(stored)


def _gathered_for(layer: AdapterLayer, owner: nn.Module, factors: dict[str, float]) -> Iterator[Tensor]:
    """Yield what `_weight` gathers to compute all of a weight, in its order."""
    for update in layer.updates(owner, factors):
        yield from (update.lam, update.gamma)
    if not isinstance(layer, QuantizedLayer) and (weight := layer.weight_of(owner)) is not None:
        yield weight


def _dropped(parameter: Tensor) -> None:
    whole(parameter)


def _bias(site: Site, state: ModelState, into: Into) -> Tensor:
    """Return the bias of a quantized layer in the dtype of its dequantized weight."""
    layer = _layer(site, state)
    assert isinstance(layer, QuantizedLayer), "_reader() asks"
    bias = _held(site.owner, "bias")
    return bias if plain_class(site.owner) is nn.Linear else bias.to(_plain_dtype(layer, site.owner, into))


def _layer(site: Site, state: ModelState) -> AdapterLayer:
    return site.adapter_layer or site.layer_class(site.owner, state)


def _plain_dtype(layer: QuantizedLayer, owner: nn.Module, into: Into) -> torch.dtype:
    return into.dtype or layer.compute_dtype(owner) or torch.float32


def _held(module: nn.Module, attribute: str) -> Tensor:
    """Return the value of a parameter or buffer, wherever it is."""
    tensors: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
    values = place_of(module, attribute).whole().detach()
    return values if lent(tensors[attribute]) is None else values.clone()  # its memory is freed as the block ends

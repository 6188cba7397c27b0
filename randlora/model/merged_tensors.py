"""`merged_tensors`: what the state dict of the merged model would have, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.errors import ConfigError, MergeError, raise_collected
from randlora.hints import shortly
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import plain_class
from randlora.layers.quantized import QuantizedLayer
from randlora.layers.update import Into
from randlora.model.install import WRAPPERS, lost_sites, require_own
from randlora.model.mergeable import model_dtype, require_finite, weight_problems
from randlora.model.probe import differences_from_product, product_problems
from randlora.model.train_also import lost_parameters
from randlora.placement.dtensor import is_dtensor, reshard
from randlora.placement.offloaded import offloaded
from randlora.placement.place import place_of, whole
from randlora.placement.ranks import agreed, ranks_of
from randlora.replaced import held_at
from randlora.state import ATTRIBUTE, CHANGING, ModelState, adapted_root
from randlora.targets.site import Site
from randlora.targets.ties import tie_problems
from randlora.targets.walk import Census, is_quantized

NOT_HERE = "has no values here (meta, offloaded or sharded): load or gather it first"


class _Entry(NamedTuple):
    """One entry of the state dict, and a function that returns its value now."""

    fqn: str
    read: Callable[[], Tensor]


def merged_tensors(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over names and values of the merged model's state dict, without merging the model.

    This is what an inference engine loads at every step of reinforcement learning: ``load_weights`` of vLLM and SGLang
    takes such an iterator, and ``load_state_dict`` a dict of it. The model, its adapters and the optimizer do not
    change. Each merged weight has the bits that `merge` would give it, is computed when it is asked for, and is not
    kept here. If the adapters are merged reversibly when this is called, it is the weight that the model has. Other
    tensors share the memory of the model, as in ``state_dict``: do not write to them.

    Each tensor of a model that is sharded, as by `fully_shard`, is gathered in turn: every process iterates, and all
    get all values. Each tensor that accelerate offloads, to RAM or disk, is loaded in turn.

    Args:
        model: A model with adapters, or a wrapper of torch around one, whose own names do not appear.
        dtype: The dtype of all floating tensors. ``None`` means that of each parameter; for dequantized weights, the
            dtype that `merge` would choose.

    Returns:
        Names and values, in the order of ``state_dict``: parameters, also those trained by ``train_also``, and
        persistent buffers. A tied parameter is yielded under each of its names, as ``state_dict`` has it. Quantized
        layers, adapted or not, are yielded as the plain layers that they stand for. What a module writes into a state
        dict by code of its own, such as ``get_extra_state``, is not included.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For a dtype that is not floating.
        MergeError: When it is called, if no adapter is active, the adapters are disabled, an adapted module was
            replaced, or a value is not here. Later, if a merged weight is not finite, or the adapters were merged,
            disabled, switched or removed between two tensors.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = randlora.inject(model, r=4)
        >>> [name for name, tensor in randlora.merged_tensors(model)]
        ['0.weight', '0.bias']
    """
    reshard(model)
    root, state = adapted_root(model)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype must be a floating dtype or None, got {shortly(dtype)}")
    with CHANGING:
        _require_mergeable(Census.of(root), state)
        census = Census.of(_unwrapped(model))
        into = Into("dequantize", dtype or model_dtype(census))
        entries = [*_entries(census, state, into)]
        raise_collected(MergeError, _value_problems(census, state), doing="yield the merged tensors")
    return _in_turn(root, state, entries, dtype)


def _in_turn(
    root: nn.Module, state: ModelState, entries: Sequence[_Entry], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Compute one value after the other, and hold none of them."""

    def as_now() -> tuple[object, ...]:
        return root.__dict__.get(ATTRIBUTE), state.active, dict(state.merged), state.is_disabled

    at_first = as_now()

    def value(entry: _Entry) -> Tensor:
        with CHANGING, torch.no_grad():
            reshard(root)
            if as_now() != at_first:
                raise MergeError(
                    f"the adapters were merged, disabled, switched or removed before {entry.fqn} was yielded, so the "
                    "tensors would be of two models: take all of them first, then change the adapters"
                )
            found = entry.read()
            return found if dtype is None or not found.is_floating_point() else found.to(dtype)

    for entry in entries:
        yield entry.fqn, value(entry)


def _entries(census: Census, state: ModelState, into: Into) -> Iterator[_Entry]:
    """Go through a model in the order of its state dict."""
    for prefix, module in _modules(census):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                fqn = f"{prefix}{attribute}"
                yield _Entry(fqn, _reader(census, module, attribute, fqn, state, into))
        for attribute, _ in _saved_buffers(module):
            yield _Entry(f"{prefix}{attribute}", partial(_held, module, attribute))


def _reader(
    census: Census, module: nn.Module, attribute: str, fqn: str, state: ModelState, into: Into
) -> Callable[[], Tensor]:
    """Return a function that returns the value of one parameter now."""
    site = census.sites_by_key.get((id(module), attribute))
    if site is not None and (site.adapter_layer is not None or issubclass(site.layer_class, QuantizedLayer)):
        return partial(_weight, fqn, site, state, into)
    beside = census.sites_by_key.get((id(module), "weight")) if attribute == "bias" else None
    if beside is not None and issubclass(beside.layer_class, QuantizedLayer):
        return partial(_bias, beside, state, into)
    return partial(_held, module, attribute)


def _weight(fqn: str, site: Site, state: ModelState, into: Into) -> Tensor:
    """Return a weight plus the updates of the active adapters, dequantized."""
    layer = _layer(site, state)
    if not state.is_merged and (factors := layer.factors(state.active)):
        with agreed(ranks_of(site.owner.parameters())):  # or the others would wait for this process's part
            merged = layer.merged(site.owner, factors, into).weight
        place = place_of(site.owner, layer.attribute)
        if place is not None and place.part is not None:
            stored = place.stored(merged)
            assert stored is not None, "it is a part of the weight"
            merged = whole(stored)
        return require_finite(fqn, merged)
    if isinstance(layer, QuantizedLayer) and plain_class(site.owner) is not nn.Linear:  # which a merge may make it
        return layer.written_out(site.owner).to(_plain_dtype(layer, site.owner, into))
    return _held(site.owner, layer.attribute)


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
    """Return the value of a parameter or buffer as it is, loaded if accelerate offloads it."""
    tensors: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
    found: Tensor = tensors[attribute].detach()
    if found.is_meta and (place := offloaded(module, attribute)) is not None:
        return place.read()
    return whole(found)


def _require_mergeable(census: Census, state: ModelState) -> None:
    """Check that the active adapters can be merged, or are; else raise the errors of `merge`."""
    require_own(census, state, "yield the merged tensors")
    active = [state.adapters[name] for name in state.active]
    problems = []
    if state.is_disabled:
        problems.append("the adapters are disabled: call this outside of randlora.disabled(model)")
    if not active:
        problems.append(f"no adapter is active: activate one of {', '.join(state.adapters)}")
    if state.is_merged and state.on_top:
        problems.append(f"{', '.join(state.on_top)} is active and not merged, as others are: merge it too")
    if not state.is_merged:
        sites = [site for site in census.adapted if site.layer.factors(state.active)]
        problems += [*lost_sites(census, active), *lost_parameters(state, active), *tie_problems(census, sites)]
        problems += [*weight_problems(sites, Into()), *product_problems(differences_from_product(sites))]
    raise_collected(MergeError, problems, doing="yield the merged tensors")


def _value_problems(census: Census, state: ModelState) -> list[str]:
    """Return messages about values that are not here, and codes that no adapter layer can dequantize."""
    problems = []
    for held in census.parameters:
        site = census.sites_by_key.get((id(held.module), held.attribute))
        is_known = site is not None and issubclass(site.layer_class, QuantizedLayer)
        is_codes = held.attribute == "weight" and is_quantized(held.module)
        if not _is_here(held.module, held.attribute, held.parameter) or (is_codes and held.parameter.is_meta):
            layer = None if site is None or state.is_merged else site.adapter_layer
            if layer is None or not layer.factors(state.active):  # else `weight_problems` has said so
                problems.append(f"{held.fqn} {NOT_HERE}")
        elif is_codes and not is_known:
            kind = plain_class(held.module).__name__
            problems.append(f"{held.fqn} is quantized, and the codes of a {kind} cannot be dequantized here")
    for prefix, module in _modules(census):
        problems += [
            f"{prefix}{attribute} {NOT_HERE}"
            for attribute, buffer in _saved_buffers(module)
            if not _is_here(module, attribute, buffer)
        ]
    return problems


def _is_here(module: nn.Module, attribute: str, tensor: Tensor) -> bool:
    """Whether a parameter or buffer has values, or accelerate can load them."""
    if is_lazy(tensor):
        return False
    if tensor.is_meta:
        return offloaded(module, attribute) is not None
    return type(tensor.data) is Tensor or is_dtensor(tensor)


def _modules(census: Census) -> list[tuple[str, nn.Module]]:
    """Return all modules at each of their places, with what their names begin with."""
    return [("", census.model), *((f"{visit.fqn}.", visit.module) for visit in census.visits)]


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a state dict has."""
    for attribute, buffer in module._buffers.items():
        if buffer is not None and attribute not in module._non_persistent_buffers_set:
            yield attribute, buffer


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without the wrappers of torch around it."""
    while (attribute := held_at(model, WRAPPERS)) is not None:
        model = getattr(model, attribute)
    return model

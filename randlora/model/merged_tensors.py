"""`merged_tensors`: the state dict of the merged model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.errors import ConfigError, MergeError, raise_collected
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import plain_class
from randlora.layers.scopes import cast
from randlora.layers.weight import Into
from randlora.model.install import lost_parts
from randlora.model.mergeable import (
    differences_from_product,
    model_dtype,
    option_problems,
    product_problems,
    replaced_problems,
    require_finite,
    state_problems,
    weight_problems,
)
from randlora.model.view import WRAPPERS, collective, opened, require_own
from randlora.places import place_of, settle, whole, whole_only_inside, why_incomplete
from randlora.ranks import Ranks, agree, agreeing, raise_on_every_rank, run_collectives
from randlora.replaced import table_of, unwrapped, whole_shape
from randlora.state import ATTRIBUTE, CHANGING, ModelState
from randlora.targets.census import Census, Site, is_quantized, saved_buffers
from randlora.targets.left_out import tie_problems

Result = TypeVar("Result")

NOT_HERE = "has no values here (meta, offloaded or sharded): load or gather it first"


@collective(writes=False)
def merged_tensors(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over the names and values of the merged model's state dict, without merging the model.

    ``load_weights`` of vLLM and SGLang takes such an iterator, and ``load_state_dict`` a dict of it. Each merged weight
    has the same bits as from `merge`. It is computed when the iterator reaches it, and not kept. Other tensors share
    memory with the model, as in ``state_dict``, so do not write to them.

    If the model is sharded, such as by `fully_shard`, each tensor is gathered in turn: every process must iterate, and
    all get all values. Tensors that accelerate offloads to RAM or disk are loaded in turn.

    Args:
        model: A model with adapters, or a torch wrapper around one, which adds nothing to the names.
        dtype: The dtype of all floating tensors. ``None`` means the dtype of each parameter; for dequantized weights,
            the dtype that `merge` would choose.

    Returns:
        Names and values of parameters and persistent buffers, in the order of ``state_dict``. Quantized layers, adapted
        or not, are yielded as plain layers. What modules add by code, such as ``get_extra_state``, is not included.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For a dtype that is not floating.
        MergeError: At the call, as for `merge`, or if a value is not here. During iteration, if a merged weight is not
            finite, or the adapters changed between two tensors.
    """
    found = MergedTensors.of(model, dtype, doing="yield the merged tensors")
    return found.each(lambda fqn, tensor: (fqn, tensor), Share.PART)


class StateDictEntry(NamedTuple):
    """One entry of the state dict: a parameter or buffer of a module."""

    fqn: str
    module: nn.Module
    attribute: str


def _entries(census: Census) -> list[StateDictEntry]:
    """Return the entries of a model in the order of its state dict, where a quantized layer counts as a plain one."""
    entries = []
    for prefix, module in census.prefixed:
        if (site := quantized_site(census, module)) is not None:  # its codes may have other names
            names = ["weight"] if site.layer_class.bias_of(module) is None else ["weight", "bias"]
        else:
            names = [name for name, parameter in module._parameters.items() if parameter is not None]
            names += [name for name, _ in saved_buffers(module)]
        entries += [StateDictEntry(f"{prefix}{name}", module, name) for name in names]
    return entries


def quantized_site(census: Census, module: nn.Module) -> Site | None:
    """Return the site of a module whose weight is quantized, else ``None``."""
    site = census.sites_by_key.get((id(module), "weight"))
    return site if site is not None and site.layer_class.is_quantized else None


class Share(Enum):
    """What a process does for a merged weight that is sharded. All processes take part in gathering."""

    PART = "part"  # computes its own part, which may round differently; then all parts are gathered
    WHOLE = "whole"  # computes the whole weight from gathered values, with the same bits as on one process
    NONE = "none"  # computes nothing, and drops the gathered values


@dataclass(frozen=True, eq=False)
class MergedTensors:
    """The tensors of a merged model, checked but not computed yet."""

    root: nn.Module  # which has the adapters
    state: ModelState
    census: Census  # of the model given, without wrappers around it
    ranks: Ranks | None  # which all iterate
    entries: list[StateDictEntry]
    dtype: torch.dtype | None  # of all floating tensors
    into: Into

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None, *, doing: str) -> MergedTensors:
        """Check that a model can be merged and has all values."""
        raise_collected(ConfigError, option_problems("dequantize", dtype), doing=doing)
        with opened(model, None) as view:
            root, state, census = view.root, view.state, Census.of(unwrapped(model, WRAPPERS))
            if (problem := why_incomplete(model)) is not None:
                raise MergeError(f"cannot {doing}: {problem}")
            _require_mergeable(view.census, state, doing)
            raise_collected(MergeError, _value_problems(census), doing=doing)
            into = Into("dequantize", dtype or model_dtype(census))
            return cls(root, state, census, agreeing(), _entries(census), dtype, into)

    def each(self, take: Callable[[str, Tensor], Result], share: Share) -> Iterator[Result]:
        """Compute one value after the other, keep none, and yield the result of a function for each."""
        at_first = self._as_now()
        for entry in self.entries:
            taken: list[Result] = []
            with raise_on_every_rank(self.ranks), CHANGING, torch.no_grad():
                settle(self.root)
                if self._as_now() != at_first:
                    raise MergeError(
                        f"the adapters were merged, disabled, switched or removed before {entry.fqn} was yielded, so "
                        "the tensors would be from two different models: take all of them first, then change the "
                        "adapters"
                    )
                agree()
                if (found := self._value(entry, share)) is not None and share is not Share.NONE:
                    taken.append(take(entry.fqn, self._in_dtype(found)))
                del found  # before the next one is gathered
            while taken:
                yield taken.pop()

    def on_meta(self, entry: StateDictEntry) -> Tensor:
        """Return a tensor without values, of the shape and the dtype in which an entry is yielded."""
        _, module, attribute = entry
        held: Any = table_of(module, attribute).get(attribute)
        if (site := quantized_site(self.census, module)) is None:
            shape, dtype = whole_shape(held), held.dtype
        else:
            shape = tuple(site.shape if attribute == "weight" else site.shape[:1])
            is_plain = plain_class(module) is nn.Linear  # as a merge may make it
            dtype = held.dtype if is_plain else self._plain_dtype(self._layer(site), module)
        return self._in_dtype(cast(module, attribute, torch.empty(shape, dtype=dtype, device="meta")))

    def _in_dtype(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def _as_now(self) -> tuple[object, ...]:
        state = self.state
        return self.root.__dict__.get(ATTRIBUTE), state.active, dict(state.merged), state.is_disabled

    def _value(self, entry: StateDictEntry, share: Share) -> Tensor | None:
        """Return a value in the dtype that its module computes with, or ``None`` if a different process computes it."""
        fqn, module, attribute = entry
        site, quantized = self.census.sites_by_key.get((id(module), attribute)), quantized_site(self.census, module)
        if site is not None and (site.adapter_layer is not None or site.layer_class.is_quantized):
            value = self._weight(fqn, site, share)
        elif quantized is not None and attribute == "bias":
            layer = self._layer(quantized)
            bias = _held(module, "bias") if "bias" in module._parameters else layer.bias_of(module)
            assert bias is not None, "it is an entry"
            value = bias if plain_class(module) is nn.Linear else bias.to(self._plain_dtype(layer, module))
        else:
            value = _held(module, attribute)
        return None if value is None else cast(module, attribute, value)

    def _weight(self, fqn: str, site: Site, share: Share) -> Tensor | None:
        layer, owner = self._layer(site), site.owner
        if not self.state.is_merged and (factors := layer.factors(self.state.active)):
            if share is Share.PART or (layer.is_quantized and share is Share.WHOLE):
                place, merged = layer.place_in(owner), layer.compute_merged(owner, factors, self.into).weight
                if place.part is not None:
                    stored = place.stored(merged)
                    assert stored is not None, "it is a part of the weight"
                    agree()  # or the others would wait for this process's part
                    merged = whole(stored)
                return require_finite(fqn, merged)
            if layer.is_quantized:  # every process has all codes
                layer.whole_updates(owner, factors)
                return None
            updates, own = run_collectives([
                partial(layer.whole_updates, owner, factors),
                partial(_held, owner, layer.attribute),
            ])
            return None if share is Share.NONE else require_finite(fqn, layer.with_updates(own, updates))
        if layer.is_quantized and plain_class(owner) is not nn.Linear:  # which a merge may make it
            return layer.written_out(owner).to(self._plain_dtype(layer, owner))
        return _held(owner, layer.attribute)

    def _layer(self, site: Site) -> AdapterLayer:
        return site.adapter_layer or site.layer_class(site.owner, self.state)

    def _plain_dtype(self, layer: AdapterLayer, owner: nn.Module) -> torch.dtype:
        return self.into.dtype or layer.compute_dtype(owner) or torch.float32


def _held(module: nn.Module, attribute: str) -> Tensor:
    values = place_of(module, attribute).whole().detach()
    # the memory of what is whole only inside a block is freed as the block ends
    return values if whole_only_inside(table_of(module, attribute)[attribute]) is None else values.clone()


def _require_mergeable(census: Census, state: ModelState, doing: str) -> None:
    require_own(census, state, doing)
    problems = replaced_problems(state)
    if state.is_merged and state.active_unmerged:
        problems.append(f"{', '.join(state.active_unmerged)} is active and not merged, as others are: merge it too")
    elif not state.is_merged:
        active = [state.adapters[name] for name in state.active]
        sites = [site for site in census.adapted if site.layer.factors(state.active)]
        problems += state_problems(state, sites, state.active, reversible=True, call="call this")
        problems += [*lost_parts(census, state, active), *tie_problems(census, sites)]
        problems += [*weight_problems(sites, None), *product_problems(differences_from_product(sites))]
    raise_collected(MergeError, problems, doing=doing)


def _value_problems(census: Census) -> list[str]:
    problems = []
    for held in census.parameters:
        site = census.sites_by_key.get((id(held.module), held.attribute))
        is_codes = held.attribute == "weight" and is_quantized(held.module)
        if not _is_here(held.module, held.attribute, held.tensor) or (is_codes and held.tensor.is_meta):
            problems.append(f"{held.fqn} {NOT_HERE}")
        elif is_codes and (site is None or not site.layer_class.is_quantized):
            problems.append(f"{held.fqn} {_unreadable(held.module)}")
    problems += [f"{site.fqn} {_unreadable(site.owner)}" for site in census.sites if site.layer_class.is_forward_only]
    return problems + [
        f"{prefix}{attribute} {NOT_HERE}"
        for prefix, module in census.prefixed
        for attribute, buffer in saved_buffers(module)
        if not _is_here(module, attribute, buffer)
    ]


def _unreadable(module: nn.Module) -> str:
    return (
        f"is quantized, and the codes of a {plain_class(module).__name__} cannot be dequantized here: merge the "
        "adapter into the checkpoint that the model was quantized from, with randlora.files.merge"
    )


def _is_here(module: nn.Module, attribute: str, tensor: Tensor) -> bool:
    return not is_lazy(tensor) and place_of(module, attribute).is_complete

"""Parameters that adapters train in addition to Λ and Γ, such as a new head, biases or norms, and their buffers.

Each adapter has a copy, which the model uses while the adapter is active. The model's own values do not change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from randlora.errors import AdapterError, spelled
from randlora.layers.in_place import can_cast, plain_class
from randlora.layers.rows import RowsAdapter
from randlora.places import has_values, is_whole, place_at, values_within
from randlora.replaced import ReplacedParameter
from randlora.state import Adapter, ModelState, attached_state
from randlora.targets.census import Census, Held, Site, is_quantized, sizes
from randlora.targets.match import matches_name, prefixes, shortened, suggestion, unmatched

HALF_RISKS = {
    torch.float16: "Adam's eps is 0 there, and values become NaN within some steps",
    torch.bfloat16: "steps below about 1/256 of a value are lost",
}
"""What goes wrong when parameters are trained in a dtype of 16 bits."""

MOST_NUMBERS = 65_536
"""The size of the largest buffer whose changes are noticed. Statistics are small; masks and tables may be large."""

REMEDY = "keep these modules in eval() while training, or name them in train_also, with which they are saved"


def select_parameters(census: Census, names: str | Sequence[str]) -> list[str]:
    """Return the FQNs of the parameters that a regex or a list of names matches, directly or through a module."""
    return _first_names(census.parameters, lambda fqn: any(matches_name(names, prefix) for prefix in prefixes(fqn)))


def select_buffers(census: Census, names: str | Sequence[str]) -> list[str]:
    """Return the FQNs of the buffers in modules that a regex or a list of names matches, or with an FQN in a list."""
    listed = () if isinstance(names, str) else names
    return _first_names(
        census.buffers, lambda fqn: fqn in listed or any(matches_name(names, prefix) for prefix in prefixes(fqn)[:-1])
    )


def _first_names(tensors: Iterable[Held], is_meant: Callable[[str], bool]) -> list[str]:
    """Return the names of the tensors of which any name is meant, the first of each that is tied."""
    first_names: dict[int, str] = {}
    names = [(held.fqn, first_names.setdefault(id(held.tensor), held.fqn)) for held in tensors]
    return list(dict.fromkeys(first for fqn, first in names if is_meant(fqn)))


def train_also_problems(
    census: Census, names: str | Sequence[str], selected: Iterable[str], sites: Iterable[Site]
) -> list[str]:
    """Return problems with ``train_also``: names without a match, and selected parameters that cannot be trained."""
    held_by, buffers = {held.fqn: held for held in census.parameters}, select_buffers(census, names)
    known = sorted({prefix for fqn in (*held_by, *buffers) for prefix in prefixes(fqn)})
    problems = [
        f"{spelled('train_also', entry)} matches no module or parameter; "
        f"{suggestion('train_also', entry, known) or 'the model has no parameters'}"
        for entry in unmatched(names, known)
    ]
    adapted = {id(site.weight) for site in sites}
    for fqn in selected:
        _, module, attribute, parameter = held_by[fqn]
        if id(parameter) in adapted:
            why = ", which the targets name too: leave it out of one of them, or name only its bias"
        elif attribute == "weight" and is_quantized(module):
            advice = "name only its bias, or do not quantize it (llm_int8_skip_modules of a BitsAndBytesConfig)"
            why = f", which is quantized ({type(module).__name__}) and cannot be trained: {advice}"
        elif is_lazy(parameter):
            why = ", which has no shape yet: run one forward pass first"
        elif not parameter.is_floating_point():
            why = f" of dtype {parameter.dtype}, expected a floating dtype: leave it out"
        else:
            continue
        problems.append(f"train_also includes {fqn}{why}")
    coded = {held.fqn: held.module for held in census.buffers if is_quantized(held.module)}
    return problems + [
        f"train_also includes {fqn}, a buffer of a quantized layer ({plain_class(coded[fqn]).__name__}): leave it out"
        for fqn in buffers
        if fqn in coded
    ]


def replacements(census: Census, state: ModelState, fqns: Iterable[str]) -> dict[str, ReplacedParameter]:
    """Return the model's own parameters and buffers with these names, and their places, even if copies are in use."""
    by_fqn = {held.fqn: held.tensor for held in census.tensors}
    found = {}
    for fqn in fqns:
        own = by_fqn[fqn]
        slots = {held.fqn: (held.module, held.attribute) for held in census.tensors if held.tensor is own}
        found[fqn] = state.replaced.get(fqn) or ReplacedParameter(slots, own, own)
    return found


def copy_dtype(entry: ReplacedParameter) -> torch.dtype:
    """Return the dtype of copies: float32 for a parameter of 16 bits whose modules can cast it in their forward."""
    own, dtype = entry.original, entry.dtype
    if entry.is_buffer or dtype not in HALF_RISKS:
        return dtype
    is_plain = type(own.data) is Tensor and is_whole(own)
    is_wide = is_plain and all(can_cast(module, attribute) for module, attribute in entry.slots.values())
    return torch.float32 if is_wide or entry.cast_dtype else dtype


def planned_copies(replaced: Mapping[str, ReplacedParameter]) -> dict[str, Tensor]:
    """Return stand-ins for copies before they exist: the model's own tensors, or empty ones of a different dtype."""
    dtypes = {fqn: copy_dtype(entry) for fqn, entry in replaced.items()}
    return {
        fqn: entry.original
        if entry.original.dtype == dtypes[fqn]
        else nn.Parameter(entry.original.detach().to("meta", dtypes[fqn]))
        for fqn, entry in replaced.items()
    }


def half_notes(adapter: Adapter) -> list[str]:
    """Return a note on each dtype of 16 bits in which an adapter trains parameters that cannot be in float32."""
    return [
        f"{shortened(fqns)} {'is' if len(fqns) == 1 else 'are'} trained in {dtype}, the model's dtype, unlike Λ and Γ, "
        f"because it is sharded already, or no cast can be put between it and the code that reads it: {risk}; load "
        "the model in float32 and train under torch.autocast, or inject before sharding"
        for dtype, risk in HALF_RISKS.items()
        if (fqns := [fqn for fqn, parameter in adapter.parameters.items() if parameter.dtype == dtype])
    ]


def lost_parameters(state: ModelState, adapters: Iterable[Adapter]) -> list[str]:
    """Return messages about parameters trained with an adapter that the model no longer has."""
    problems = []
    for adapter in adapters:
        for fqn, copy in adapter.trained.items():
            if state.replaced[fqn].is_lost:
                problems.append(
                    f"{fqn}, which adapter {adapter.name!r} trains, is no longer in the model: put it back, or remove "
                    "the adapter"
                )
            elif adapter.is_active and not state.replaced[fqn].fits(copy):
                now = sizes(state.replaced[fqn].original.shape)
                problems.append(
                    f"the shape of {fqn}, which adapter {adapter.name!r} trains, was {sizes(copy.shape)} and is {now}: "
                    "remove the adapter and load one with the new shape"
                )
    return problems


def misplaced_copies(census: Census, state: ModelState) -> list[ReplacedParameter]:
    """Return the copies that are no longer where the parameter was, such as in a module that was moved."""
    found = []
    for entry in (entry for entry in state.replaced.values() if entry.is_lost):
        tied = [held for held in census.tensors if held.tensor is entry.installed]
        slots = {held.fqn: (held.module, held.attribute) for held in tied}
        found += [ReplacedParameter(slots, entry.original, entry.installed)] if slots else []
    return found


def moving_note(census: Census, owned: Collection[str]) -> list[str]:
    """Return a note on torch's norms with buffers that training would change and no adapter has a copy of."""
    has = {held.fqn.rpartition(".")[0] for held in census.buffers if held.fqn in owned}
    norms = [(fqn, module) for fqn, module in census.visits if isinstance(module, _NormBase) and fqn not in has]
    fqns = [fqn for fqn, norm in norms if norm.track_running_stats and norm.running_mean is not None]
    have, what = "has" if len(fqns) == 1 else "have", "running statistics, which move in train mode and are not part of"
    return [f"{shortened(fqns)} {have} {what} the adapter: {REMEDY}"] if fqns else []


@torch.inference_mode(mode=False)
def remembered(census: Census) -> dict[str, Tensor]:
    """Return copies of a model's small buffers on the CPU, to detect later changes."""
    return {held.fqn: held.tensor.detach().to("cpu", copy=True) for held in census.buffers if _is_small(held.tensor)}


def moved_note(census: Census, state: ModelState, adapters: Iterable[Adapter], where: str) -> list[str]:
    """Return a note on buffers without copies that changed since the model was adapted, and where they are now."""
    owned = {fqn for adapter in adapters for fqn in adapter.buffers}
    own = {held.fqn: held.tensor for held in census.buffers if held.fqn not in owned}
    own |= {fqn: entry.original for fqn, entry in state.replaced.items() if fqn in own}
    moved = [fqn for fqn, now in own.items() if _is_small(now) and _differs(now, state.buffers_before.get(fqn))]
    if not moved:
        return []
    return [f"{shortened(moved)} moved since the model was adapted: {where}; next time {REMEDY}"]


def _is_small(buffer: Tensor) -> bool:
    return type(buffer) is Tensor and not is_lazy(buffer) and has_values(buffer) and buffer.numel() <= MOST_NUMBERS


def _differs(now: Tensor, before: Tensor | None) -> bool:
    if before is None:
        return False
    held, value = before.to(now.dtype), now.detach().cpu()
    return held.shape != value.shape or not bool(((held == value) | (held.isnan() & value.isnan())).all())


def untrained_notes(census: Census, state: ModelState, adapters: Iterable[Adapter]) -> list[str]:
    """Return a note on each adapter without an effect, unless only parts of its values are here."""
    notes = []
    for adapter in adapters:
        sites = [site for site in census.adapted if adapter.name in site.layer.adapters]
        held = {site: site.layer.diagonals_of(site.owner, adapter.name) for site in sites}
        diagonals = [pair for site, pair in held.items() if not site.layer.is_rows]
        tables = [(site.owner, site.layer) for site in sites if isinstance(site.layer, RowsAdapter)]
        tensors: list[Tensor] = [*(each for pair in held.values() for each in pair), *adapter.parameters.values()]
        tensors += [layer.weight_of(owner) for owner, layer in tables]
        if (
            all(has_values(each) and is_whole(each) for each in tensors)
            and not any(lam.any() and gamma.any() for lam, gamma in diagonals)
            and not any(is_changed(state, fqn, copy) for fqn, copy in adapter.parameters.items())
            and not any(layer.is_changed(owner, adapter.name) for owner, layer in tables)
        ):
            also = ", and what train_also names is unchanged" if adapter.parameters else ""
            also += ", and its rows are the table's" if adapter.rows else ""
            notes.append(
                f"the update of {adapter.name!r} is exactly zero in all layers{also}: nothing has trained it; an "
                "optimizer made before inject does not know its parameters, make one of "
                "randlora.trainable_parameters(model)"
            )
    return notes


def is_changed(state: ModelState, fqn: str, copy: Tensor) -> bool:
    """Whether a whole copy has different values than the model's own parameter, as far as this process has them."""
    own = state.replaced[fqn].original
    place = place_at(own)
    if not has_values(own) or not place.is_lasting:
        return True
    if place.part is not None:
        own, copy = place.read(), values_within(copy, place.part)
    return not torch.equal(own.detach().to(device=copy.device, dtype=copy.dtype), copy.detach())


METHOD = "_apply"
"""The method of torch through which all conversions go, and those of every module around the model."""


class Converter:
    """Replaces the method of a model, which it does not keep alive, to convert the copies held aside like the model."""

    def __init__(self, model: nn.Module | None) -> None:
        """Replace the method of a model, ``None`` for one that is not known."""
        self.model: Callable[[], nn.Module | None] = weakref.ref(model) if model is not None else lambda: None

    def __call__(self, convert: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert the model, then what is held aside."""
        model = self.model()
        if model is None:
            raise AdapterError(
                "cannot convert a shallow copy of an adapted model that is gone, or what was copied or pickled from a "
                "shallow copy: convert the model, or make its copy with copy.deepcopy"
            )
        result = getattr(type(model), METHOD)(model, convert, *args, **kwargs)
        if (state := attached_state(model)) is not None:
            state.convert_aside(convert)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return Converter, (self.model(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Converter:
        """Return one for the model's copy, which is not known if a shallow copy of the model is copied."""
        return Converter(memo.get(id(self.model())))


def watch_conversions(model: nn.Module, state: ModelState | None) -> None:
    """Have a model convert what is held aside if its adapters train copies of parameters, and else nothing more."""
    if state is not None and state.replaced:
        vars(model).setdefault(METHOD, Converter(model))
    elif isinstance(vars(model).get(METHOD), Converter):
        del vars(model)[METHOD]

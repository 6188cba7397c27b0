"""What adapters train in addition to Λ and Γ: parameters, such as a new head, biases or norms, and rows of tables.

Each adapter has a copy, which the model uses while the adapter is active. The model's own values do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from randlora.config import TableRows
from randlora.errors import AdapterError, raise_collected, spelled
from randlora.layers.in_place import can_cast, plain_class
from randlora.layers.rows import RowsAdapter, SiteRows
from randlora.places import has_values, is_whole, place_at, values_within, whole, whole_only_inside
from randlora.ranks import agree, run_collectives
from randlora.replaced import ReplacedParameter, Slot, like, whole_shape
from randlora.state import Adapter, ModelState
from randlora.targets.census import WEIGHT, Census, Held, Site, is_quantized, sizes
from randlora.targets.left_out import obstacle, offloaded_copies
from randlora.targets.match import has_suffix, matches_name, prefixes, shortened, suggestion, unmatched

HALF_RISKS = {
    torch.float16: "Adam's eps is 0 there, and values become NaN within some steps",
    torch.bfloat16: "steps below about 1/256 of a value are lost",
}
"""What goes wrong when parameters are trained in a dtype of 16 bits."""

MOST_NUMBERS = 65_536  # of a buffer whose changes are noticed: statistics are small; masks and tables may be large
REMEDY = "keep these modules in eval() while training, or name them in train_also, with which they are saved"


def select_parameters(census: Census, names: str | Sequence[str]) -> list[str]:
    """Return the FQNs of the parameters that a regex or a list of names matches, directly or through a module."""
    return _first_names(census.parameters, lambda fqn: any(matches_name(names, prefix) for prefix in prefixes(fqn)))


def select_buffers(census: Census, names: str | Sequence[str]) -> list[str]:
    """Return the FQNs of the buffers in modules that a regex or a list of names matches, or with an FQN in a list."""
    exact = () if isinstance(names, str) else names
    return _first_names(
        census.buffers, lambda fqn: fqn in exact or any(matches_name(names, prefix) for prefix in prefixes(fqn)[:-1])
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
    own = {held.fqn: held.tensor for held in census.tensors}
    known = state.replaced
    return {fqn: known.get(fqn) or ReplacedParameter(_slots(census, own[fqn]), own[fqn], own[fqn]) for fqn in fqns}


def _slots(census: Census, tensor: Tensor) -> dict[str, Slot]:
    return {held.fqn: (held.module, held.attribute) for held in census.tensors if held.tensor is tensor}


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
    copies = {}
    for fqn, entry in replaced.items():
        own, dtype = entry.original, copy_dtype(entry)
        copies[fqn] = own if own.dtype == dtype else nn.Parameter(own.detach().to("meta", dtype))
    return copies


def trained_copies(replaced: Mapping[str, ReplacedParameter], *, requires_grad: bool) -> dict[str, Tensor]:
    """Return copies of the model's own tensors; of a sharded parameter, of this process's part. A collective."""
    values = {fqn: entry.original for fqn, entry in replaced.items()}
    others = {fqn: each for fqn, each in values.items() if place_at(each).exchanges != "values"}
    agree()
    values |= zip(others, run_collectives(partial(whole, each) for each in others.values()), strict=True)
    copies = {}
    for fqn, entry in replaced.items():
        copy = values[fqn].detach().to(copy_dtype(entry), copy=True)
        copies[fqn] = like(entry.original, copy, requires_grad=requires_grad)
    return copies


def training_notes(census: Census, adapter: Adapter) -> list[str]:
    """Return notes on what would be trained in 16 bits, or move in training and not be part of the adapter."""
    has = {held.fqn.rpartition(".")[0] for held in census.buffers if held.fqn in adapter.buffers}
    norms = [(fqn, module) for fqn, module in census.visits if isinstance(module, _NormBase) and fqn not in has]
    fqns = [fqn for fqn, norm in norms if norm.track_running_stats and norm.running_mean is not None]
    have, what = "has" if len(fqns) == 1 else "have", "running statistics, which move in train mode and are not part of"
    notes = [f"{shortened(fqns)} {have} {what} the adapter: {REMEDY}"] if fqns else []
    return notes + [
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
            what, entry = f"{fqn}, which adapter {adapter.name!r} trains,", state.replaced[fqn]
            if entry.is_lost:
                problems.append(f"{what} is no longer in the model: put it back, or remove the adapter")
            elif adapter.is_active and not entry.fits(copy):
                change = f"was {sizes(copy.shape)} and is {sizes(entry.original.shape)}"
                problems.append(f"the shape of {what} {change}: remove the adapter and load one with the new shape")
    return problems


def misplaced_copies(census: Census, state: ModelState) -> list[ReplacedParameter]:
    """Return the copies that are no longer where the parameter was, such as in a module that was moved."""
    lost = [entry for entry in state.replaced.values() if entry.is_lost]
    found = [ReplacedParameter(_slots(census, entry.installed), entry.original, entry.installed) for entry in lost]
    return [entry for entry in found if entry.slots]


@torch.inference_mode(mode=False)
def remembered(census: Census) -> dict[str, Tensor]:
    """Return copies of a model's small buffers on the CPU, to detect later changes."""
    return {held.fqn: held.tensor.detach().to("cpu", copy=True) for held in census.buffers if _is_small(held.tensor)}


def moved_note(census: Census, state: ModelState, adapters: Iterable[Adapter], where: str) -> list[str]:
    """Return a note on buffers without copies that changed since the model was adapted, and where they are now."""
    owned = {fqn for adapter in adapters for fqn in adapter.buffers}
    own = {held.fqn: held.tensor for held in census.buffers if held.fqn not in owned}
    own |= {fqn: entry.original for fqn, entry in state.replaced.items() if fqn in own}
    small = {fqn: now for fqn, now in own.items() if fqn in state.buffers_before and _is_small(now)}
    moved = [fqn for fqn, now in small.items() if _differs(now, state.buffers_before[fqn])]
    return [f"{shortened(moved)} moved since the model was adapted: {where}; next time {REMEDY}"] if moved else []


def _is_small(buffer: Tensor) -> bool:
    return type(buffer) is Tensor and not is_lazy(buffer) and has_values(buffer) and buffer.numel() <= MOST_NUMBERS


def _differs(now: Tensor, before: Tensor) -> bool:
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


# Rows of tables, such as those of new tokens


class Table(NamedTuple):
    """A table of which an adapter trains rows: the sites of the modules that share it, and the rows in order."""

    fqn: str  # of the parameter, the first of several
    sites: tuple[Site, ...]
    rows: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        """The table."""
        return RowsAdapter.weight_of(self.sites[0].owner)

    def to_add(self, adapter: Adapter, state: ModelState, values: Tensor) -> tuple[Site, Any, SiteRows, tuple[Tensor]]:
        """Return its first site, the adapter layer of its modules or a new one, and what an adapter has there."""
        site = self.sites[0]
        layer = site.adapter_layer or RowsAdapter(site.owner, state, [each.owner for each in self.sites])
        site_rows = SiteRows(adapter, self.fqn, layer.shape, torch.tensor(self.rows, device=values.device))
        return site, layer, site_rows, (values,)


def find_tables(census: Census, given: TableRows) -> tuple[list[Table], list[str]]:
    """Return the tables that names mean, and messages about names that mean none, or several rows of one table."""
    tables, problems, names = dict[str, Table](), list[str](), {module: fqn for fqn, module in reversed(census.visits)}
    held_by = [held for held in census.parameters if held.attribute == WEIGHT]
    for name, rows in given.items():
        named = [held for held in held_by if has_suffix(held.fqn, name) or has_suffix(held.fqn, f"{name}.{WEIGHT}")]
        named = [held for held in named if held.fqn == name] or named
        if not named:
            known = [site.fqn for site in census.sites if site.layer_class.kind == "embedding"]
            near = suggestion("train_rows", name, known) or "the model has no embedding"
            problems.append(f"{spelled('train_rows', name)} matches no module with a weight; {near}")
        for tensor in [held.tensor for held in named]:
            tied = [held for held in census.parameters if held.tensor is tensor]
            owners = dict.fromkeys(held.module for held in tied)
            sites = tuple(Site(names.get(owner, ""), owner, RowsAdapter) for owner in owners)
            table = Table(tied[0].fqn, sites, tuple(sorted(rows)))
            if tables.setdefault(table.fqn, table).rows != table.rows:
                problems.append(f"train_rows names different rows of {table.fqn}, once as {name!r}: name it once")
    return [*tables.values()], problems


def table_problems(
    census: Census, tables: Iterable[Table], adapted: Iterable[Site] = (), also: Collection[str] = ()
) -> list[str]:
    """Return why an adapter of these sites, which trains these parameters also, cannot train rows of tables."""
    problems, taken = [], {id(site.weight) for site in adapted}
    for fqn, sites, rows in tables:
        weight = RowsAdapter.find_weight(sites[0].owner)
        reasons = [f"{site.fqn} {why}" for site in sites if (why := _rows_obstacle(site)) is not None]
        if fqn in also or id(weight) in taken:
            reasons.append(f"{fqn} is named by targets or train_also too: leave it out of one of them")
        elif not reasons and weight is not None and rows[-1] >= (count := whole_shape(weight)[0]):
            reasons.append(f"{fqn} has {count} rows, and row {rows[-1]} would be trained: resize it first")
        problems += [*(f"train_rows: {reason}" for reason in reasons), *offloaded_copies(census, [fqn])]
    return problems


def _rows_obstacle(site: Site) -> str | None:
    if is_quantized(site.owner):
        return f"is quantized ({type(site.owner).__name__}): load the model without quantizing it"
    return obstacle(site) or whole_only_inside(RowsAdapter.weight_of(site.owner))


def first_values(tables: Sequence[Table]) -> list[Tensor]:
    """Return the values of rows in their tables, in float32 or wider; a collective if these are sharded."""

    def first(table: Table) -> Tensor:
        weight = whole(table.weight).detach()
        rows = weight[torch.tensor(table.rows, device=weight.device)]
        return rows.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    problems = [f"{table.fqn} holds no values yet (meta)" for table in tables if not has_values(table.weight)]
    raise_collected(AdapterError, problems, doing="train rows of a table without values")
    agree()
    return run_collectives(partial(first, table) for table in tables)

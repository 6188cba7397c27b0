"""Tables of which adapters train rows, such as those of new tokens: finding them, and why they cannot be trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora.config import TableRows
from randlora.errors import AdapterError, raise_collected, spelled
from randlora.layers.rows import RowsAdapter, SiteRows
from randlora.places import has_values, whole, whole_only_inside
from randlora.ranks import agree, run_collectives
from randlora.replaced import whole_shape
from randlora.state import Adapter, ModelState
from randlora.targets.census import WEIGHT, Census, Site, is_quantized
from randlora.targets.left_out import obstacle, offloaded_copies
from randlora.targets.match import has_suffix, suggestion


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
        reasons = [f"{site.fqn} {why}" for site in sites if (why := _obstacle(site)) is not None]
        if fqn in also or id(weight) in taken:
            reasons.append(f"{fqn} is named by targets or train_also too: leave it out of one of them")
        elif not reasons and weight is not None and rows[-1] >= (count := whole_shape(weight)[0]):
            reasons.append(f"{fqn} has {count} rows, and row {rows[-1]} would be trained: resize it first")
        problems += [*(f"train_rows: {reason}" for reason in reasons), *offloaded_copies(census, [fqn])]
    return problems


def _obstacle(site: Site) -> str | None:
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

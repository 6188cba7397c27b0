"""An adapter to be saved: its values one at a time, and what its files have beside them; `AdapterState`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import attrgetter, itemgetter
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from randlora.checkpoint.bases import stored_bases, stored_dims
from randlora.checkpoint.header import HEADER_KEY, Header, ModelClass, Seal, facts_of, parse_header, seal_of
from randlora.checkpoint.peft_layout import (
    PeftFields,
    drawing_note,
    peft_obstacle,
    to_peft_fields,
    trained_key,
    value_keys,
)
from randlora.checkpoint.read import FLOATING, AdapterFile, disagreements, flaw_of, sort_contents
from randlora.config import LayerOptions
from randlora.disk.formats import LONGEST_NAME, Planned
from randlora.errors import CheckpointError, ConfigError, raise_collected
from randlora.hints import mistyped, require_types
from randlora.layers.diagonals import diagonal_shapes
from randlora.model.install import lost_parts
from randlora.model.view import View, collective, opened, require_own
from randlora.places import has_values, whole, whole_only_inside
from randlora.ranks import agree, agreeing, run_collectives
from randlora.replaced import whole_shape
from randlora.state import Adapter, ModelState
from randlora.targets.census import AdaptedSite, Census, shapes_of
from randlora.targets.match import shortened

StoredAs = Literal["seed", "stored"]  # whether bases are left out, as the seed reproduces them, or stored as they are

META = "holds no values to save (meta or fake): materialize the model first"


class Value(NamedTuple):
    """A parameter or buffer to save."""

    name: str  # in messages
    parameter: Tensor  # which may be sharded
    shape: Sequence[int]  # which it must have
    is_buffer: bool = False
    is_diagonal: bool = False  # of Λ, Γ and rows, which a file has in float32 or wider
    wanted: torch.dtype | None = None  # the dtype that the caller chose instead

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a file has it in."""
        dtype = self.parameter.dtype
        return self.wanted or (torch.promote_types(dtype, torch.float32) if self.is_diagonal else dtype)

    def problem(self, values: Tensor) -> str | None:
        """Return why values of it cannot be saved: not here, not whole, or not readable by `load`; else ``None``."""
        if not has_values(values):
            return f"{self.name} {META}"
        if type(values.data) is not Tensor:
            return f"{self.name} is sharded, a {type(values.data).__name__}: gather it first"
        is_freed = values.untyped_storage().nbytes() < values.nbytes
        if is_freed or tuple(values.shape) != tuple(self.shape):
            found = "no memory" if is_freed else f"shape {tuple(values.shape)}"
            remedy = whole_only_inside(values) or "gather it if it is sharded, else adapt the model again"
            return f"{self.name} has {found} here, expected all of {tuple(self.shape)}: {remedy}"
        if (flaw := flaw_of(values, is_buffer=self.is_buffer)) is not None:
            return f"{self.name} {flaw}, which cannot be loaded: go back to earlier values"
        return None

    def stored(self, values: Tensor) -> Tensor:
        """Return a copy of values of it as a file has them, on the CPU."""
        return values.detach().to("cpu", self.dtype, copy=True, memory_format=torch.contiguous_format)


@dataclass(eq=False)
class AdapterToSave:
    """An adapter to be saved, under the names that its layers have now; if it has problems, it has no header."""

    census: Census
    state: ModelState
    adapter: Adapter
    sites: Sequence[AdaptedSite]
    bases: StoredAs
    values: dict[str, Value]  # all that are written, except bases, by their keys
    problems: list[str]  # why it cannot be saved, as far as is known
    lost: dict[str, float] = field(default_factory=dict)  # by the dtype that the caller chose, of what was gathered

    @classmethod
    def of(cls, view: View, name: str | None, bases: StoredAs, dtype: torch.dtype | None = None) -> Self:
        """Return one adapter of a model; ``None`` means the only one."""
        adapter = view.state.adapter(name)
        sites = [site for site in view.census.adapted if adapter.name in site.layer.adapters]
        options, rows = dict[str, LayerOptions](), dict[str, tuple[int, ...]]()
        for site in sites:  # which may have another name now, if one of the places of a module is gone or new
            site_adapter = site.layer.adapters[adapter.name]
            if site.layer.is_rows:
                rows[f"{site.fqn}.weight"] = adapter.rows[site_adapter.fqn]
            else:
                options[site.fqn] = site_adapter.options
        renamed = replace(adapter, options=options, rows=rows)
        values, problems = _values(view.state, renamed, sites, dtype), _saving_problems(view, adapter, bases)
        return cls(view.census, view.state, renamed, sites, bases, values, problems)

    @cached_property
    def header(self) -> Header:
        """The header of its file."""
        adapter, sites = self.adapter, [site for site in self.sites if not site.layer.is_rows]
        return Header.of(
            replace(adapter.config, train_rows=adapter.rows or None),
            adapter.options,
            adapter.bases,
            shapes_of(sites, adapter.config),
            adapter.trained,
            transposed=tuple(site.fqn for site in sites if site.layer_class.is_transposed),
            kinds={site.fqn: kind for site in sites if (kind := site.layer_class.kind) != "linear"},
            model_class=ModelClass.of(self.census.model, has_trained=bool(adapter.trained)),
            buffers=tuple(adapter.buffers),
        )

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of its JSON."""
        return to_peft_fields(self.census, self.adapter, self.header.model_class, stored=self.bases == "stored")

    @cached_property
    def tensors(self) -> list[Planned]:
        """The tensors of its file, in the order of the model: `values`, whose pieces come later, and bases."""
        planned = [Planned(key, value.dtype, tuple(value.shape), tuple) for key, value in self.values.items()]
        return planned + (stored_bases(self.adapter.bases, self.header) if self.bases == "stored" else [])

    @cached_property
    def seal(self) -> Seal:
        """The checksum of all that was gathered so far."""
        return Seal(facts_of(self.header))

    @property
    def rounding(self) -> str:
        """In which dtype Λ and Γ are stored, and what this changed in all gathered; empty if nothing."""
        if not any(self.lost.values()):
            return ""
        dtype, options = next(value.dtype for value in self.values.values() if value.wanted), self.adapter.options
        most = max(math.hypot(*(self.lost[key] for key in value_keys(fqn, options))) for fqn in options)
        return f"{str(dtype).removeprefix('torch.')}, which changes a layer's update by up to {most:.2%}"

    def peft_notes(self) -> list[str]:
        """Return what PEFT 0.21.2 would not load, or would load wrongly."""
        if (reason := peft_obstacle(self.header.options, self.header.kinds, self.adapter.rows)) is not None:
            return [reason]
        notes, drawn_for_others = list[str](), "the bases were drawn for other layers"
        ((r, rectangle),) = self.header.rectangles.items()
        basis = self.adapter.bases[r]
        if self.bases == "seed" and (basis.spec.max_dim, basis.spec.min_dim) != rectangle:
            notes.append(f"{drawn_for_others} too, so PEFT would draw different ones: save with bases='stored'")
        elif self.bases == "seed" and (reason := drawing_note(basis.spec)) is not None:
            notes.append(reason)
        if stored_dims(basis, rectangle) != rectangle:
            notes.append(f"{drawn_for_others} and are too narrow for PEFT, which cannot load this adapter")
        return notes

    def flaws(self, *, are_whole: bool) -> list[str]:
        """Return which values cannot be saved; before parts of them are gathered, only which are missing."""
        values = self.values.values()
        if are_whole:
            return [problem for value in values if (problem := value.problem(value.parameter)) is not None]
        return [f"{value.name} {META}" for value in values if not has_values(value.parameter)]

    def gather(self, write: Callable[[Planned], object] | None) -> Iterator[Callable[[], None]]:
        """Yield the steps that gather, check, hash and write each value; a process without ``write`` only gathers."""
        found = dict[str, str]()
        for item in sorted(self.values.items(), key=itemgetter(0)):
            yield partial(self._gather, *item, write, found)
        if write is not None:
            yield partial(self._end, write, found)

    def _gather(self, key: str, value: Value, write: Callable[[Planned], object] | None, found: dict[str, str]) -> None:
        with torch.no_grad():
            values = whole(value.parameter)
            if write is None:
                return
            if (problem := value.problem(values)) is not None:
                found[key] = problem
                return
            stored = value.stored(values)
            if value.wanted is not None:
                own = values.detach().to("cpu", torch.float64)
                self.lost[key] = lost = float((stored.double() - own).norm() / own.norm().clamp_min(1e-300))
                if lost > 0.01:  # within its range, bfloat16 changes 0.2 %
                    of = f"by {lost:.1%} in {value.wanted}, whose range is too narrow"
                    found[key] = f"{value.name} would change {of}: choose a wider one, such as bfloat16"
                    return
            write(self.seal.added(Planned.whole(key, stored)))

    def _end(self, write: Callable[[Planned], object], found: Mapping[str, str]) -> None:
        """Write the bases, whose names come after those of all values, and list the problems as the model does."""
        self.problems += [found[key] for key in self.values if key in found]
        for basis in sorted(self.tensors[len(self.values) :], key=attrgetter("name")):
            write(self.seal.added(basis))


def to_save(
    model: nn.Module, names: Sequence[str | None], bases: StoredAs, dtype: torch.dtype | None, *, doing: str
) -> list[AdapterToSave]:
    """Return some adapters, after checking what can be checked before their values are gathered."""
    if dtype not in (None, *FLOATING):
        raise ConfigError(f"dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype}")
    with opened(model, None) as view:
        adapters = [AdapterToSave.of(view, name, bases, dtype) for name in names]
        require_own(view.census, view.state, "save")
    are_whole = agreeing() is None
    problems = [problem for adapter in adapters for problem in [*adapter.problems, *adapter.flaws(are_whole=are_whole)]]
    raise_collected(CheckpointError, problems, doing=doing)
    return adapters


def given_values(model: nn.Module, values: Mapping[str, Tensor]) -> AdapterToSave:
    """Return the only adapter of a model with values that another library gathered, by FQN; never a collective."""
    with opened(model, "save") as view:
        adapter = AdapterToSave.of(view, None, "seed")
        owners = {id(visit.module): visit.fqn for visit in reversed(view.census.visits)}
    names = [
        f"{owners[id(site.owner)]}.{part}.{adapter.adapter.name}".removeprefix(".")
        for site in adapter.sites
        for part in site.layer.parameter_names()
    ]
    names += adapter.adapter.trained
    if lacking := [name for name in names if name not in values]:
        adapter.problems.append(f"the state_dict has no {shortened(lacking)}")
        return adapter
    for (key, value), name in zip(adapter.values.items(), names, strict=True):
        adapter.values[key] = value._replace(parameter=values[name].detach())
    adapter.problems += adapter.flaws(are_whole=True)
    return adapter


def _values(
    state: ModelState, adapter: Adapter, sites: Sequence[AdaptedSite], dtype: torch.dtype | None
) -> dict[str, Value]:
    values = {}
    for site in sites:
        site_adapter, diagonals = site.layer.adapters[adapter.name], site.layer.diagonals_of(site.owner, adapter.name)
        if site.layer.is_rows:
            fqn = f"{site.fqn}.weight"
            (own,), size = diagonals, (len(adapter.rows[fqn]), site_adapter.shape[-1])
            values[trained_key(fqn, adapter.options)] = Value(f"rows of {fqn}", own, size, is_diagonal=True)
            continue
        shapes = diagonal_shapes(site_adapter.shape, site_adapter.options.r)
        keys = value_keys(site.fqn, adapter.options)
        for key, letter, diagonal, shape in zip(keys, "ΛΓ", diagonals, shapes, strict=True):
            values[key] = Value(f"{letter} of {site.fqn}", diagonal, shape, is_diagonal=True, wanted=dtype)
    for fqn, parameter in adapter.trained.items():
        entry = state.replaced[fqn]
        shape = whole_shape(entry.original)
        values[trained_key(fqn, adapter.options)] = Value(fqn, parameter, shape, is_buffer=entry.is_buffer)
    return values


def _saving_problems(view: View, adapter: Adapter, bases: StoredAs) -> list[str]:
    problems = lost_parts(view.census, view.state, [adapter])
    if bases == "seed" and any(basis.stored is not None for basis in adapter.bases.values()):
        problems.append("its bases came from a file, and no seed reproduces them: save with bases='stored'")
    keys = {fqn: max(value_keys(fqn, adapter.options), key=len) for fqn in adapter.options}
    keys |= {fqn: trained_key(fqn, adapter.options) for fqn in (*adapter.trained, *adapter.rows)}
    return problems + [
        f"{fqn[:60]!r} has a name of {len(key)} characters in a file: expected at most {LONGEST_NAME}, and valid "
        "Unicode: rename the modules"
        for fqn, key in keys.items()
        if len(key) > LONGEST_NAME or key.encode(errors="replace").decode() != key
    ]


@dataclass(frozen=True, eq=False)
class AdapterState:
    """An adapter in memory, as `randlora.save` writes it: to send, to average, or to load into a model again.

    It can be pickled. Its tensors are copies, so it does not depend on the model.

    Attributes:
        tensors: Λ and Γ, in float32 if no dtype was chosen (float64 if they are in float64), rows in float32 or wider,
            and the parameters of ``train_also`` in their own dtype, on the CPU, by their names in
            ``adapter_model.safetensors``.
        metadata: The metadata of that file, with a SHA-256 of the tensors.
        config: The contents of ``adapter_config.json``.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> AdapterState:
        """Return the same adapter with different values, such as an average over clients, and a new SHA-256.

        Args:
            tensors: A tensor of the same shape for each name in ``tensors``. Values are rounded to the dtype there.

        Raises:
            CheckpointError: If names or shapes differ.
        """
        require_types(AdapterState.with_tensors, {"tensors": tensors})
        given = {name: f"shape {tuple(tensor.shape)}" for name, tensor in tensors.items()}
        expected = {name: f"shape {tuple(tensor.shape)}" for name, tensor in self.tensors.items()}
        problems = [
            f"{name} has {given.get(name, 'no values')}, expected {expected.get(name, 'no such tensor')}"
            for name in sorted(given.keys() | expected.keys())
            if given.get(name) != expected.get(name)
        ]
        raise_collected(CheckpointError, problems, doing="give an adapter other values")
        values = {
            name: tensors[name].detach().to(device="cpu", dtype=own.dtype, copy=True).contiguous()
            for name, own in self.tensors.items()
        }
        header = parse_header(_header_of(self), self.tensors)
        return replace(self, tensors=values, metadata=self.metadata | seal_of(facts_of(header), values).metadata)


@collective(writes=False)
def adapter_state(
    model: nn.Module, name: str | None = None, *, bases: StoredAs = "seed", dtype: torch.dtype | None = None
) -> AdapterState:
    """Return an adapter in memory, as `randlora.save` would write it.

    If the model is sharded, such as by `fully_shard`, every process calls this and gets the whole adapter.

    Args:
        model: A model with adapters.
        name: The adapter's name; ``None`` means the only one.
        bases: Whether the state contains the bases, as for `randlora.save`.
        dtype: The dtype of Λ and Γ, as for `randlora.save`.

    Returns:
        Copies of the tensors, on the CPU, with the metadata of the file.

    Raises:
        AdapterError: If the model has no adapter, or several and no ``name`` is given.
        CheckpointError: If `randlora.save` would refuse to write the adapter.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> state = randlora.adapter_state(model)
        >>> half = {name: tensor / 2 for name, tensor in state.tensors.items()}
        >>> randlora.swap(model, state.with_tensors(half))
    """
    require_types(adapter_state, locals())
    doing = "return the state of an adapter"
    (adapter,) = to_save(model, [name], bases, dtype, doing=doing)
    tensors = dict[str, Tensor]()
    steps = [*adapter.gather(lambda tensor: tensors.update({tensor.name: tensor.read()}))]
    agree()  # before anything is gathered
    run_collectives(steps)
    raise_collected(CheckpointError, adapter.problems, doing=doing)
    tensors = {tensor.name: tensors[tensor.name] for tensor in adapter.tensors}  # in the order of the model
    config = json.loads(json.dumps(adapter.fields))  # as it is read from a file
    return AdapterState(tensors, adapter.seal.metadata, config)


def file_of(state: AdapterState) -> AdapterFile:
    """Check a state, and return the contents of the files that it would be saved as, with copies of the tensors."""
    problems = [
        *mistyped(state.tensors, dict[str, Tensor], "tensors"),
        *mistyped(state.metadata, dict[str, str], "metadata"),
        *mistyped(state.config, PeftFields, "config"),
    ]
    raise_collected(CheckpointError, problems, doing="use the state of an adapter")
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.tensors.items()}
    try:
        header = parse_header(_header_of(state), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; values are changed with AdapterState.with_tensors") from error
    fields = json.loads(json.dumps(state.config))
    file = sort_contents(fields, header, tensors, None, doing="use the state of an adapter")
    return replace(file, doubts=disagreements(fields, header))


def _header_of(state: AdapterState) -> str:
    if HEADER_KEY not in state.metadata:
        raise CheckpointError(f"the metadata of the state has no {HEADER_KEY!r}, which randlora.adapter_state writes")
    return state.metadata[HEADER_KEY]

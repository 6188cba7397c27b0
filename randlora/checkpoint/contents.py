"""An adapter to be saved: its values one at a time, and what its files have beside them; `AdapterState`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import attrgetter, itemgetter
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from randlora.checkpoint.bases import stored_bases, stored_dims
from randlora.checkpoint.header import HEADER_KEY, Header, ModelClass, Seal, facts_of, metadata_of, parse_header
from randlora.checkpoint.peft_config import PeftFields, drawing_note, peft_obstacle, to_peft_fields, unknown_to_peft
from randlora.checkpoint.read import AdapterFile, disagreements, sort_contents
from randlora.checkpoint.tensors import Value, is_text, meta_problems, trained_key, value_keys
from randlora.disk.formats import LONGEST_NAME, Planned
from randlora.errors import CheckpointError, raise_collected
from randlora.hints import mistyped, require_types, shortly
from randlora.layers.diagonals import diagonal_shapes
from randlora.model.install import lost_parts
from randlora.model.train_also import is_changed
from randlora.model.view import View, collective, opened, require_own
from randlora.places import whole
from randlora.ranks import agree, agreeing, run_collectives
from randlora.replaced import whole_shape
from randlora.state import Adapter, ModelState
from randlora.targets.census import AdaptedSite, Census, other_kinds, shapes_of
from randlora.targets.match import shortened

StoredAs = Literal["seed", "stored"]
"""Whether the bases of an adapter are left out, because the seed reproduces them, or stored as they are."""


@dataclass(eq=False)
class AdapterToSave:
    """An adapter to be saved, under the names that its layers have now.

    What its files have beside the values is found when it is asked for, of an adapter without problems.

    Attributes:
        census: The model.
        state: The model's state.
        adapter: The adapter.
        sites: Its layers.
        bases: Whether its bases are stored.
        values: All values that are written, except bases, by their names in a file.
        problems: Why it cannot be saved, as far as is known.
        has_effect: Whether the values gathered so far change what the model computes.
    """

    census: Census
    state: ModelState
    adapter: Adapter
    sites: Sequence[AdaptedSite]
    bases: str
    values: dict[str, Value]
    problems: list[str]
    has_effect: bool = False
    _nonzero: set[str] = field(default_factory=set)  # the layers of which one of Λ and Γ has an entry that is not 0

    @classmethod
    def of(cls, view: View, name: str | None, bases: str) -> Self:
        """Return one adapter of a model; ``None`` means the only one."""
        adapter = view.state.adapter(name)
        sites = [site for site in view.census.adapted if adapter.name in site.layer.adapters]
        # a module used in several places may have another name now, if one of them is gone or new
        renamed = replace(adapter, options={site.fqn: site.layer.adapters[adapter.name].options for site in sites})
        values, problems = _values(view.state, renamed, sites), _problems(view, adapter, bases)
        return cls(view.census, view.state, renamed, sites, bases, values, problems)

    @cached_property
    def header(self) -> Header:
        """Its header."""
        adapter, sites = self.adapter, self.sites
        return Header.of(
            adapter.config,
            adapter.options,
            adapter.bases,
            shapes_of(sites, adapter.config),
            adapter.trained,
            tuple(site.fqn for site in sites if site.layer_class.is_transposed),
            other_kinds(sites),
            ModelClass.of(self.census.model, has_trained=bool(adapter.trained)),
            adapter.buffers,
        )

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of its JSON."""
        return to_peft_fields(self.census, self.adapter, stored=self.bases == "stored")

    @cached_property
    def stored(self) -> list[Planned]:
        """The bases that are written."""
        return stored_bases(self.adapter.bases, self.header) if self.bases == "stored" else []

    @cached_property
    def tensors(self) -> list[Planned]:
        """The tensors of its file, in the order of the model; those of `values` without values."""
        return [*(Planned(key, own.dtype, tuple(own.shape), tuple) for key, own in self.values.items()), *self.stored]

    @cached_property
    def seal(self) -> Seal:
        """The checksum of what was gathered so far."""
        return Seal(facts_of(self.header))

    @property
    def notes(self) -> list[str]:
        """What PEFT 0.21.2 would not load, or would load wrongly."""
        return _peft_notes(self.adapter, self.header, self.bases)

    def value_problems(self) -> list[str]:
        """Return why it cannot be saved if all values are here."""
        return [*self.problems, *filter(None, (value.problem(value.parameter) for value in self.values.values()))]

    def gather(self, write: Callable[[Planned], object] | None) -> Iterator[Callable[[], None]]:
        """Yield the steps that gather, check, hash and write one value after the other, in the order of their names.

        They are collectives if the model is sharded. A process without ``write`` takes part and drops the values.
        """
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
            self.has_effect = self.has_effect or self._changes(key, value, values)
            write(self.seal.added(Planned.whole(key, value.stored(values))))

    def _end(self, write: Callable[[Planned], object], found: Mapping[str, str]) -> None:
        """Write the bases, whose names come after those of all values, and list the problems as the model does."""
        self.problems += [found[key] for key in self.values if key in found]
        for basis in sorted(self.stored, key=attrgetter("name")):
            write(self.seal.added(basis))

    def _changes(self, key: str, value: Value, values: Tensor) -> bool:
        if not value.is_diagonal:
            return not value.is_buffer and is_changed(self.state, value.name, values)
        layer, is_nonzero = key.rpartition(".")[0], bool(values.any())
        is_second = layer in self._nonzero
        self._nonzero.update([layer] * is_nonzero)
        return is_nonzero and is_second


def to_save(model: nn.Module, names: Sequence[str | None], bases: str, *, doing: str) -> list[AdapterToSave]:
    """Return some adapters.

    If the model is sharded, problems that are known before anything is gathered raise an error at once.
    """
    with opened(model, None) as view:
        adapters = [AdapterToSave.of(view, name, bases) for name in names]
        require_own(view.census, view.state, "save")
    if agreeing() is not None:
        values = [value for adapter in adapters for value in adapter.values.values()]
        problems = [*(problem for adapter in adapters for problem in adapter.problems), *meta_problems(values)]
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
    return adapter


def _values(state: ModelState, adapter: Adapter, sites: Sequence[AdaptedSite]) -> dict[str, Value]:
    values = {}
    for site in sites:
        part = site.layer.adapters[adapter.name]
        shapes, keys = diagonal_shapes(part.shape, part.options.r), value_keys(site.fqn, adapter.options)
        diagonals = site.layer.diagonals_of(site.owner, adapter.name)
        for key, letter, diagonal, shape in zip(keys, "ΛΓ", diagonals, shapes, strict=True):
            values[key] = Value(f"{letter} of {site.fqn}", diagonal, shape, is_diagonal=True)
    for fqn, parameter in adapter.trained.items():
        entry = state.replaced[fqn]
        shape = whole_shape(entry.original)
        values[trained_key(fqn, adapter.options)] = Value(fqn, parameter, shape, is_buffer=entry.is_buffer)
    return values


def _problems(view: View, adapter: Adapter, bases: str) -> list[str]:
    problems = lost_parts(view.census, view.state, [adapter])
    if bases not in ("seed", "stored"):
        problems.append(f"bases must be 'seed' or 'stored', got {shortly(bases)}")
    if bases == "seed" and any(basis.stored is not None for basis in adapter.bases.values()):
        problems.append("its bases came from a file, and no seed reproduces them: save with bases='stored'")
    names = [*adapter.targets, *adapter.trained]
    problems += [f"{fqn!r} is not valid Unicode: rename the module" for fqn in names if not is_text(fqn)]
    keys = {fqn: max(map(len, value_keys(fqn, adapter.options))) for fqn in adapter.options}
    keys |= {fqn: len(trained_key(fqn, adapter.options)) for fqn in adapter.trained}
    return problems + [
        f"the name of {fqn:.60}… in a file would have {length} characters, and at most {LONGEST_NAME} can be loaded: "
        "rename the modules"
        for fqn, length in keys.items()
        if length > LONGEST_NAME
    ]


def _peft_notes(adapter: Adapter, header: Header, bases: str) -> list[str]:
    if (reason := unknown_to_peft(header.kinds)) is not None:
        return [f"PEFT cannot load this adapter: {reason}"]
    if (reason := peft_obstacle(header.options)) is not None:
        return [reason]
    notes = []
    ((basis, rectangle),) = ((adapter.bases[r], rectangle) for r, rectangle in header.rectangles.items())
    spec = basis.spec
    if bases == "seed" and (spec.max_dim, spec.min_dim) != rectangle:
        notes.append(
            "the bases were drawn for other layers too, so PEFT would draw different ones: save with bases='stored'"
        )
    elif bases == "seed" and (reason := drawing_note(spec)) is not None:
        notes.append(reason)
    if stored_dims(basis, rectangle) != rectangle:
        notes.append(
            "the bases were drawn for other layers and are too narrow for PEFT, which cannot load this adapter"
        )
    return notes


@dataclass(frozen=True, eq=False)
class AdapterState:
    """An adapter in memory, as `randlora.save` writes it: to send, to average, or to load into a model again.

    It can be pickled. Its tensors are copies, so it does not depend on the model.

    Attributes:
        tensors: Λ and Γ in float32 (float64 if they are in float64), and the parameters of ``train_also`` in their own
            dtype, on the CPU, by their names in ``adapter_model.safetensors``.
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
        named = [
            ("there are no values of", sorted(self.tensors.keys() - tensors.keys())),
            ("the adapter has no tensor", sorted(tensors.keys() - self.tensors.keys())),
        ]
        problems = [f"{what} {shortened(names)}" for what, names in named if names]
        problems += [
            f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(own.shape)}"
            for name, own in self.tensors.items()
            if name in tensors and tensors[name].shape != own.shape
        ]
        raise_collected(CheckpointError, problems, doing="give an adapter other values")
        values = {
            name: tensors[name].detach().to(device="cpu", dtype=own.dtype, copy=True).contiguous()
            for name, own in self.tensors.items()
        }
        header = parse_header(_header_of(self), self.tensors)
        return replace(self, tensors=values, metadata=self.metadata | metadata_of(header, values))


@collective(writes=False)
def adapter_state(model: nn.Module, name: str | None = None, *, bases: StoredAs = "seed") -> AdapterState:
    """Return an adapter in memory, as `randlora.save` would write it.

    If any parameter of the model is sharded, such as by `fully_shard`, this is a collective: every process calls it and
    gets the whole adapter.

    Args:
        model: A model with adapters.
        name: The adapter's name; ``None`` means the only one.
        bases: Whether the state contains the bases, as for `randlora.save`.

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
    doing = "return the state of an adapter"
    (adapter,) = to_save(model, [name], bases, doing=doing)
    raise_collected(CheckpointError, adapter.value_problems() if agreeing() is None else [], doing=doing)
    tensors = dict[str, Tensor]()

    def keep(tensor: Planned) -> None:
        tensors[tensor.name] = tensor.read()

    steps = [*adapter.gather(keep)]
    agree()  # before anything is gathered
    run_collectives(steps)
    raise_collected(CheckpointError, adapter.problems, doing=doing)
    tensors = {tensor.name: tensors[tensor.name] for tensor in adapter.tensors}  # in the order of the model
    config = json.loads(json.dumps(adapter.fields))  # as it is read from a file
    return AdapterState(tensors, adapter.seal.metadata, config)


def file_of(state: AdapterState) -> AdapterFile:
    """Check a state, and return the contents of the files that it would be saved as, with copies of the tensors.

    Raises:
        CheckpointError: If it is not the state of an adapter, or its values were changed other than by `with_tensors`.
    """
    problems = [
        *mistyped(state.tensors, dict[str, Tensor], "tensors"),
        *mistyped(state.metadata, dict[str, str], "metadata"),
        *mistyped(state.config, dict[str, Any], "config"),
    ]
    problems = problems or [*mistyped(state.config, PeftFields, "config")]
    raise_collected(CheckpointError, problems, doing="use the state of an adapter")
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.tensors.items()}
    try:
        header = parse_header(_header_of(state), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; values are changed with AdapterState.with_tensors") from error
    fields = json.loads(json.dumps(state.config))
    file = sort_contents(fields, header, tensors, None, doing="use the state of an adapter")
    return replace(file, basis_copies=int(bool(file.bases)), doubts=tuple(disagreements(fields, header)))


def _header_of(state: AdapterState) -> str:
    if HEADER_KEY not in state.metadata:
        raise CheckpointError(
            f"the metadata of the state has no {HEADER_KEY!r}, which randlora.adapter_state and randlora.save write"
        )
    return state.metadata[HEADER_KEY]

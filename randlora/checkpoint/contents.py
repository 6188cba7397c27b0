"""An adapter to be saved: what its files have beside the values, and the values one at a time; `AdapterState`.

`Saving` is an adapter on its way into a file of `save` or into memory, for `adapter_state`. The steps of `passing_on`,
collectives if the model is sharded, give it one value after the other, so that `save` holds no more than one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, Literal, NamedTuple

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
from randlora.model.engines import collective
from randlora.model.install import lost_parts
from randlora.model.train_also import is_changed
from randlora.model.view import opened, require_own
from randlora.places import whole
from randlora.ranks import agree, agreeing, run_collectives
from randlora.replaced import whole_shape
from randlora.state import Adapter, ModelState
from randlora.targets.census import AdaptedSite, Census, other_kinds, shapes_of
from randlora.targets.match import shortened

StoredAs = Literal["seed", "stored"]
"""Whether the bases of an adapter are left out, because the seed reproduces them, or stored as they are."""


@dataclass(frozen=True, eq=False)
class AdapterToSave:
    """An adapter, with Λ and Γ by FQN (``diagonals``), and why it cannot be saved."""

    census: Census
    state: ModelState
    adapter: Adapter
    sites: Sequence[AdaptedSite]
    diagonals: Mapping[str, tuple[Tensor, Tensor]]
    trained: Mapping[str, Tensor]
    bases: str
    problems: list[str]

    def values(self) -> dict[str, Value]:
        """Return all values that are written, except bases, by their names in a file."""
        values = {}
        for site in self.sites:
            part = site.layer.adapters[self.adapter.name]
            shapes, keys = diagonal_shapes(part.shape, part.options.r), value_keys(site.fqn, self.diagonals)
            for key, letter, own, shape in zip(keys, "ΛΓ", self.diagonals[site.fqn], shapes, strict=True):
                values[key] = Value(f"{letter} of {site.fqn}", own, shape, is_diagonal=True)
        for fqn, parameter in self.trained.items():
            entry = self.state.replaced[fqn]
            shape = whole_shape(entry.original)
            values[trained_key(fqn, self.diagonals)] = Value(fqn, parameter, shape, is_buffer=entry.is_buffer)
        return values

    def value_problems(self) -> list[str]:
        """Return why it cannot be saved if all values are here."""
        return [*self.problems, *filter(None, (value.problem(value.parameter) for value in self.values().values()))]


class Contents(NamedTuple):
    """What an adapter's files have beside the values, under the names that its layers have now.

    ``bases`` are the bases to write, and ``notes`` say why PEFT could not load the files.
    """

    adapter: Adapter
    fields: dict[str, Any]
    header: Header
    bases: list[Planned]
    notes: list[str]


class Saving:
    """An adapter whose values are given one at a time, in the order of their names: checked, hashed and written.

    Attributes:
        held: The adapter.
        contents: What its files have beside the values.
        tensors: The tensors of its file, without values.
        seal: The checksum of what was written so far.
        has_effect: Whether the values so far change what the model computes.
    """

    def __init__(self, held: AdapterToSave) -> None:
        """Prepare an adapter that has no problems but, perhaps, in its values."""
        self.held, self.contents = held, contents_of(held)
        values = held.values()
        own = [Planned(key, value.dtype, tuple(value.shape), tuple) for key, value in values.items()]
        self.tensors = [*own, *self.contents.bases]
        self.seal = Seal(facts_of(self.contents.header))
        self.has_effect = False
        self._own = {tensor.name: tensor for tensor in own}
        self._problems: dict[str, str | None] = dict.fromkeys(values)
        self._nonzero = set[str]()  # the layers of which one of Λ and Γ has an entry that is not 0

    @property
    def problems(self) -> list[str]:
        """Why the adapter cannot be saved, by the values so far, in the order of the model."""
        return [problem for problem in self._problems.values() if problem is not None]

    def take(self, key: str, value: Value, values: Tensor, write: Callable[[Planned], object]) -> None:
        """Take all values of a parameter, and write a copy if there is no problem with them."""
        self._problems[key] = value.problem(values)
        if self._problems[key] is not None:
            return
        self.has_effect = self.has_effect or self._changes(key, value, values)
        copy = value.stored(values)
        write(self.seal.added(replace(self._own[key], pieces=lambda: (copy,))))

    def _changes(self, key: str, value: Value, values: Tensor) -> bool:
        if not value.is_diagonal:
            return not value.is_buffer and is_changed(self.held.state, value.name, values)
        layer, is_nonzero = key.rpartition(".")[0], bool(values.any())
        is_second = layer in self._nonzero
        self._nonzero.update([layer] * is_nonzero)
        return is_nonzero and is_second

    def end(self, write: Callable[[Planned], object]) -> None:
        """Write the bases, if they are to be written: their names come after those of all values."""
        for basis in sorted(self.contents.bases, key=attrgetter("name")):
            write(self.seal.added(basis))


def to_save(model: nn.Module, names: Sequence[str | None], bases: str, *, doing: str) -> list[AdapterToSave]:
    """Return some adapters.

    If the model is sharded, problems that are known before anything is gathered raise an error at once.
    """
    with opened(model, None) as view:
        state, census = view.state, view.census
        held = [_held(census, state, state.adapter(name), bases) for name in names]
        require_own(census, state, "save")
        for each in held:
            each.problems.extend(_problems(each))
        if agreeing() is not None:
            values = [value for each in held for value in each.values().values()]
            problems = [*(problem for each in held for problem in each.problems), *meta_problems(values)]
            raise_collected(CheckpointError, problems, doing=doing)
        return held


def passing_on(
    held: AdapterToSave, take: Callable[[str, Value, Tensor], object] | None
) -> Iterator[Callable[[], None]]:
    """Yield the steps that give the values of an adapter to a function, one at a time; collectives if it is sharded.

    A process without such a function takes part in gathering, and drops the values.
    """

    def step(key: str, value: Value) -> None:
        with torch.no_grad():
            values = whole(value.parameter)
            if take is not None:
                take(key, value, values)

    for item in sorted(held.values().items(), key=itemgetter(0)):
        yield partial(step, *item)


def given_values(model: nn.Module, values: Mapping[str, Tensor]) -> AdapterToSave:
    """Return the only adapter of a model with values that another library gathered, by FQN; never a collective."""
    with opened(model, "save") as view:
        state, census = view.state, view.census
        held = _held(census, state, state.adapter(None), "seed")
        held.problems.extend(_problems(held))
        owners = {id(visit.module): visit.fqn for visit in reversed(census.visits)}
        names = [
            f"{owners[id(site.owner)]}.{part}.{held.adapter.name}".removeprefix(".")
            for site in held.sites
            for part in site.layer.parameter_names()
        ]
        names += held.trained
        if lacking := [name for name in names if name not in values]:
            held.problems.append(f"the state_dict has no {shortened(lacking)}")
            return held
        found = iter([values[name].detach() for name in names])
        pairs = {fqn: (next(found), next(found)) for fqn in held.diagonals}
        return replace(held, diagonals=pairs, trained=dict(zip(held.trained, found, strict=True)))


def contents_of(held: AdapterToSave) -> Contents:
    """Return what the files of an adapter that has no problems have beside the values."""
    adapter, sites = held.adapter, held.sites
    shapes = shapes_of(sites, adapter.config)
    # a module used in several places may have another name now, if one of them is gone or new
    adapter = replace(adapter, options={site.fqn: site.layer.adapters[adapter.name].options for site in sites})
    transposed = tuple(site.fqn for site in sites if site.layer_class.is_transposed)
    model_class = ModelClass.of(held.census.model, has_trained=bool(adapter.trained))
    header = Header.of(
        adapter.config,
        adapter.options,
        adapter.bases,
        shapes,
        adapter.trained,
        transposed,
        other_kinds(sites),
        model_class,
        adapter.buffers,
    )
    fields = to_peft_fields(held.census, adapter, stored=held.bases == "stored")
    written = stored_bases(adapter.bases, header) if held.bases == "stored" else []
    return Contents(adapter, fields, header, written, _peft_notes(adapter, header, held.bases))


def _held(census: Census, state: ModelState, adapter: Adapter, bases: str) -> AdapterToSave:
    sites = [site for site in census.adapted if adapter.name in site.layer.adapters]
    diagonals = {site.fqn: site.layer.diagonals_of(site.owner, adapter.name) for site in sites}
    return AdapterToSave(census, state, adapter, sites, diagonals, adapter.trained, bases, [])


def _problems(held: AdapterToSave) -> list[str]:
    adapter, bases = held.adapter, held.bases
    problems = lost_parts(held.census, held.state, [adapter])
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
    """Return what PEFT 0.21.2 would not load, or would load wrongly."""
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
    (held,) = to_save(model, [name], bases, doing=doing)
    raise_collected(CheckpointError, held.value_problems() if agreeing() is None else [], doing=doing)
    saving, tensors = Saving(held), dict[str, Tensor]()

    def keep(tensor: Planned) -> None:
        tensors[tensor.name] = tensor.read()

    steps = [*passing_on(held, partial(saving.take, write=keep))]
    agree()  # before anything is gathered
    run_collectives(steps)
    saving.end(keep)
    raise_collected(CheckpointError, saving.problems, doing=doing)
    tensors = {tensor.name: tensors[tensor.name] for tensor in saving.tensors}  # in the order of the model
    config = json.loads(json.dumps(saving.contents.fields))  # as it is read from a file
    return AdapterState(tensors, saving.seal.metadata, config)


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

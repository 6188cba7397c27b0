"""The header of an adapter's file: the facts for which PEFT has no field, as JSON in the metadata of the tensors' file.

These are options, the specs of the bases with their digests, the layers' shapes, versions, and a checksum of
everything. The dataclasses here are the schema, in the newest format.
"""

import hashlib
import json
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec, Shape, drawn_dims, sliced_dims
from randlora.config import OPTIONS, LayerOptions, RandLoRAConfig, by_rank
from randlora.disk.formats import METADATA, Planned, bytes_of, parse_json
from randlora.errors import SHOWN, CheckpointError, ConfigError
from randlora.hints import RIGHT, UNIONS, mistyped, shortly
from randlora.layers.in_place import plain_class
from randlora.layers.registry import KINDS
from randlora.targets.census import Shapes
from randlora.targets.match import is_names, shortened
from randlora.targets.options import options_by_target, options_listed

HEADER_KEY = "randlora"
SEAL_WORD = "basis_sha256"  # a word that every header contains and nothing else does

NEWEST = 4
"""The newest version of the format. A version is written only if the version before has no place for all fields.

Version 1 has one pair of bases, version 2 has bases by r, stacks of matrices and options of single layers,
version 3 has buffers of modules in ``train_also``, and version 4 has rows of tables in ``train_rows``, and ``train``.
"""

LIBRARIES = ("transformers", "sentence_transformers")  # whose exported classes are recorded, to be found by name


@dataclass(frozen=True)
class ModelClass:
    """The class of a model, and the outputs of a head, trained with the adapter, as its config describes them."""

    library: str  # the package that exports it
    name: str  # such as "BertForSequenceClassification"
    labels: tuple[str, ...] | None = None  # the names of the outputs, in order
    problem_type: str | None = None  # which selects the loss

    @classmethod
    def of(cls, model: nn.Module, *, has_trained: bool) -> Self | None:
        """Return the class of a model, or ``None`` if no library exports it; with the outputs if ``has_trained``."""
        # `fully_shard` changes the class too
        kind = next(kind for kind in plain_class(model).__mro__ if not kind.__module__.startswith("torch."))
        library = kind.__module__.partition(".")[0]
        if library not in LIBRARIES or getattr(sys.modules.get(library), kind.__name__, None) is not kind:
            return None
        config = getattr(model, "config", None) if has_trained else None
        problem_type = getattr(config, "problem_type", None)
        return cls(library, kind.__name__, _labels(config), problem_type if isinstance(problem_type, str) else None)


def _labels(config: object) -> tuple[str, ...] | None:
    found = getattr(config, "id2label", None)
    if not isinstance(found, dict) or sorted(found) != [*range(len(found))]:
        return None
    labels = tuple(found[index] for index in range(len(found)))
    return labels if all(isinstance(label, str) for label in labels) else None


@dataclass(frozen=True)
class BasisRecord:
    """One pair of bases, as a header records it. If not ``is_reproducible``, the file must hold them."""

    spec: BasisSpec = field(metadata={"json": "basis"})
    digest: str = field(metadata={"json": SEAL_WORD})  # of the values that the layers with this r use
    is_reproducible: bool  # by the spec

    @classmethod
    def of(cls, basis: Basis, shapes: Sequence[Shape]) -> Self:
        """Return the record of bases for layers of these shapes."""
        spec, (max_dim, min_dim) = basis.spec, drawn_dims(shapes)
        if spec.is_prefix_stable:  # then the dims that other adapters of the model made it grow to do not matter
            spec = replace(spec, max_dim=max_dim, min_dim=min_dim)
        return cls(spec, basis.digest(*sliced_dims(shapes)), basis.stored is None)


@dataclass(frozen=True)
class Header:
    """The facts about an adapter that are not in its tensors. ``None`` is what the file does not say."""

    config: RandLoRAConfig  # with r and alpha of each target by FQN where they differ
    bases: dict[int, BasisRecord]  # by r
    shapes: Shapes = field(metadata={"json": "targets"})  # of the updates, by target
    library_version: str
    torch_version: str | None  # which drew the bases
    transposed: tuple[str, ...] | None  # the targets that are stored as (in_features, out_features)
    kinds: Mapping[str, str] = field(default_factory=dict)  # of the targets that are not linear layers
    model_class: ModelClass | None = None  # that the adapter was trained on
    buffers: tuple[str, ...] = ()  # the names in config.train_also that are buffers

    @classmethod
    def of(
        cls,
        config: RandLoRAConfig,
        options: Mapping[str, LayerOptions],
        bases: Mapping[int, Basis],
        shapes: Shapes,
        trained: Iterable[str],
        **others: Any,
    ) -> Self:
        """Return a header written now; ``trained`` are the FQNs trained with the adapter, ``others`` further fields."""
        also = tuple(fqn for fqn in trained if fqn not in (config.train_rows or ()))
        config = replace(config, targets=tuple(shapes), exclude=None, train_also=also or None)
        config = options_by_target(config, options)
        records = {r: BasisRecord.of(bases[r], used_by) for r, used_by in by_rank(shapes, options).items()}
        is_drawn = any(record.is_reproducible for record in records.values())
        versions = version("randlora"), torch.__version__.split("+")[0] if is_drawn else None
        return cls(config, records, dict(shapes), *versions, **others)

    @property
    def format_version(self) -> int:
        """The oldest version of the format that has a place for all fields."""
        has_more = any(isinstance(option, Mapping) for option in (self.config.r, self.config.alpha))
        has_more |= any(len(shape) == 3 for shape in self.shapes.values())
        chosen = (option.since for name, option in OPTIONS.items() if getattr(self.config, name) != option.default)
        return max([1, *chosen, 2 * has_more, 3 * bool(self.buffers)])

    @property
    def options(self) -> dict[str, LayerOptions]:
        """The r and the alpha of each target."""
        return options_listed(self.config, self.shapes)

    @property
    def rectangles(self) -> dict[int, tuple[int, int]]:
        """``(max_dim, min_dim)`` of the bases that PEFT would draw for the targets with each r."""
        return {r: drawn_dims(own) for r, own in by_rank(self.shapes, self.options).items()}

    @property
    def is_reproducible(self) -> bool:
        """Whether the specs reproduce all bases."""
        return all(record.is_reproducible for record in self.bases.values())


class Seal:
    """The SHA-256 of the facts of a header and of the tensors beside it, added one by one in the order of names."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Begin with the facts."""
        self._facts, self._digest = facts, hashlib.sha256(json.dumps(facts, sort_keys=True).encode())

    def added(self, tensor: Planned) -> Planned:
        """Return a tensor whose pieces are added as they are read."""

        def pieces() -> Iterator[Tensor]:
            self._digest.update(f"\n{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
            for piece in tensor.pieces():
                self._digest.update(bytes_of(piece.contiguous()).numpy().data)
                yield piece

        return replace(tensor, pieces=pieces)

    @property
    def digest(self) -> str:
        """The SHA-256 of all that was added so far."""
        return self._digest.hexdigest()

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file with all that was added so far; always of the same length."""
        return METADATA | {HEADER_KEY: json.dumps({**self._facts, "sha256": self.digest})}


def facts_of(header: Header) -> dict[str, Any]:
    """Return the fields of a header as JSON-serializable values, in its format, without the SHA-256."""
    facts = {**_to_json(header), "format_version": header.format_version}
    if header.format_version == 1:
        ((_, record),) = facts.pop("bases").items()
        facts |= record
    return dict(sorted(facts.items()))


def _to_json(value: Any) -> Any:
    """Return a dataclass as JSON, by the names that its fields have there, without those that have their default."""
    if isinstance(value, RandLoRAConfig | BasisSpec):
        return value.to_dict()
    if is_dataclass(value):
        given = {part: getattr(value, part.name) for part in fields(value)}
        return {_name(part): _to_json(entry) for part, entry in given.items() if entry != _default(part)}
    if isinstance(value, Mapping):
        return {str(key): _to_json(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _from_json(hint: Any, value: Any, place: str, problems: list[str]) -> Any:
    """Return what JSON stands for by a type hint, such as a dataclass; add what does not match, with its place."""
    if (type(value), hint) in RIGHT:
        return value
    choices = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    form = next((choice for choice in choices if is_dataclass(choice) or get_origin(choice) is dict), None)
    if form is None or (value is None and type(None) in choices):
        # which words are choices, `BasisSpec` checks: kinds of bases may have been registered
        problems += mistyped(value, str if get_origin(hint) is Literal else hint, place)
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, dict):
        problems += mistyped(value, dict, place or "it")
        return None
    if get_origin(form) is dict:
        make, of = get_args(form)
        return {make(key): _from_json(of, entry, f"{place}[{shortly(key)}]", problems) for key, entry in value.items()}
    return _config(value, problems) if form is RandLoRAConfig else _record(form, value, place, problems)


def _record(kind: Any, facts: dict[str, Any], place: str, problems: list[str]) -> Any:
    """Return a dataclass from what JSON has for its fields, or ``None`` if there are problems."""
    hints, found = get_type_hints(kind), {}
    for part in fields(kind):
        name = _name(part)
        if name in facts:
            inside = f"{place}.{name}".removeprefix(".")
            found[part.name] = _from_json(hints[part.name], facts[name], inside, problems)
        elif _default(part) is MISSING:
            problems.append(f"{place or 'it'} has no {name}")
    return None if problems else kind(**found)


def _config(facts: dict[str, Any], problems: list[str]) -> RandLoRAConfig | None:
    """Return options as a header has them, which lists names: nothing in a file is a pattern."""
    if unknown := sorted(facts.keys() - OPTIONS.keys()):
        advice = "was the file written by a newer version? Else get an undamaged copy"
        raise CheckpointError(f"this randlora does not know {shortened(unknown)}: {advice}")
    problems += [f"config has no {name}" for name, option in OPTIONS.items() if option.since == 1 and name not in facts]
    patterns = {name: facts.get(name) for name in ("targets", "exclude", "train_also")}
    problems += [f"config.{name} must be a list or None" for name, value in patterns.items() if isinstance(value, str)]
    return None if problems else RandLoRAConfig.from_dict(facts)


def _name(part: Field[Any]) -> str:
    return str(part.metadata.get("json", part.name))


def _default(part: Field[Any]) -> Any:
    return part.default if part.default_factory is MISSING else part.default_factory()


def upgrade(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a header of any version as a header of the newest has them, after checking the version."""
    found = facts["format_version"]
    if type(found) is not int or not 1 <= found <= NEWEST:
        known = f"this library reads versions 1 to {NEWEST}"
        raise CheckpointError(f"the file has format version {found!r:.80}, {known}: install one for it")
    newest = {"torch_version": None, "transposed": None, **facts}  # which the first files lack
    if found == 1:
        names = [_name(part) for part in fields(BasisRecord)]
        newest["bases"] = {str(facts["config"]["r"]): {name: facts[name] for name in names if name in facts}}
    return newest


def parse_header(text: str, tensors: Mapping[str, Tensor]) -> Header:
    """Return the header that a `Seal` wrote with these tensors, after checking version and checksum."""
    problems: list[str] = []
    try:
        facts = parse_json(text)
        if not isinstance(facts, dict):
            raise TypeError("it is not an object")
        header: Header | None = _from_json(Header, upgrade(facts), "", problems)
        if header is None:
            raise ValueError("; ".join(problems[:SHOWN]))
        seal = facts.pop("sha256")
    except CheckpointError:
        raise
    except ConfigError as error:  # of options, perhaps with several problems
        raise CheckpointError(f"the file's header is damaged: {error.args[0]}", *error.args[1:]) from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the file's header is damaged ({error}): get an undamaged copy") from error
    if seal != seal_of(facts, tensors).digest:
        raise CheckpointError("the file's contents do not match its checksum, it was damaged: get an undamaged copy")
    if (problem := next(_contradictions(header), None)) is not None:
        raise CheckpointError(f"the file's header is damaged ({problem}): randlora.save wrote no such file")
    return header


def _contradictions(header: Header) -> Iterator[str]:
    """Yield what contradicts itself in a header whose types are right."""
    for fqn, shape in header.shapes.items():
        if not (len(shape) in (2, 3) and all(size > 0 for size in shape)):
            yield f"{fqn} has shape {shape!r:.80}, expected two or three positive integers"
    for fqn, kind in header.kinds.items():
        if fqn not in header.shapes or kind not in KINDS:
            yield f"{fqn} has kind {kind!r}, expected a target and one of {', '.join(KINDS)}"
    if others := {*header.buffers} - {*(header.config.train_also or ())}:
        yield f"{', '.join(sorted(others))} is not among the trained parameters"
    if any(rows != tuple(sorted(rows)) for rows in (header.config.train_rows or {}).values()):
        yield "the trained rows are not in order"
    named = [option.keys() for option in (header.config.r, header.config.alpha) if isinstance(option, Mapping)]
    targets = header.config.targets
    if not is_names(targets) or any(fqns != header.shapes.keys() for fqns in [*named, {*targets}]):
        yield "the options are not of these targets and contradict each other"
        return
    shapes = by_rank(header.shapes, header.options)
    if shapes.keys() != header.bases.keys():
        yield "its options and its bases contradict each other"
    for r in shapes.keys() & header.bases.keys():
        spec, used = header.bases[r].spec, sliced_dims(shapes[r])
        is_large_enough = spec.is_prefix_stable or all(map(operator.ge, (spec.max_dim, spec.min_dim), used))
        if not (spec.is_of(header.config, r) and is_large_enough):
            yield f"its options, its targets and {spec} contradict each other"


def seal_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Seal:
    """Return a seal to which tensors in any order were added."""
    seal = Seal(facts)
    for name, tensor in sorted(tensors.items()):
        seal.added(Planned.whole(name, tensor.cpu())).read()
    return seal

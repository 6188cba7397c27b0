"""The header of an adapter's file: the facts for which PEFT has no field.

It is JSON in the metadata of the safetensors file: the spec of the bases with their digest, the layers' shapes,
versions, and a checksum of everything. Types are checked first, field by field. `RandLoRAConfig` and `BasisSpec` check
what types cannot express, such as which numbers are valid ranks.
"""

import hashlib
import json
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Self, TypedDict, Union, get_args, get_origin

import torch
from torch import Tensor, nn

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec, Shape, drawn_dims, sliced_dims
from randlora.checkpoint.tensors import METADATA
from randlora.config import OPTIONS, LayerOptions, RandLoRAConfig, by_rank
from randlora.disk.formats import Planned, bytes_of, parse_json
from randlora.errors import SHOWN, CheckpointError
from randlora.hints import UNIONS, mistyped
from randlora.layers.in_place import plain_class
from randlora.layers.registry import KINDS
from randlora.targets.census import Shapes
from randlora.targets.match import is_names
from randlora.targets.options import options_by_target, options_listed

HEADER_KEY = "randlora"
SEAL_WORD = "basis_sha256"  # a word that every header contains and nothing else does

LIBRARIES = ("transformers", "sentence_transformers")
"""Libraries whose classes are recorded if they are exported, so that other programs find them by name."""


class BasisFacts(TypedDict):
    """A `BasisSpec` in our header."""

    kind: str
    stream: str
    seed: int
    r: int
    max_dim: int
    min_dim: int
    blocks: tuple[int, int] | None


class RecordFacts(TypedDict):
    """A `BasisRecord` in our header."""

    basis: BasisFacts
    basis_sha256: str
    is_reproducible: bool


def _in_file(hint: Any) -> Any:
    """Return the type that values of an option have in a file: names for patterns, and lists of pairs for mappings.

    Which words are choices, `RandLoRAConfig` checks.
    """
    kinds = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    if Sequence[str] in kinds:
        return list[str] | None
    return Union[tuple(_kind_in_file(kind) for kind in kinds)]  # noqa: UP007 (of any number)


def _kind_in_file(kind: Any) -> Any:
    if get_origin(kind) is Mapping:
        return list[tuple[str, get_args(kind)[1]]]  # type: ignore[misc]
    return str if get_origin(kind) is Literal else kind


if TYPE_CHECKING:
    ConfigFacts = dict[str, Any]
else:
    _OWN = {name: _in_file(option.type) for name, option in OPTIONS.items()}
    ConfigFacts = TypedDict(
        "ConfigFacts", {name: NotRequired[own] if OPTIONS[name].since > 1 else own for name, own in _OWN.items()}
    )
    """A `RandLoRAConfig` in our header, which lists names: nothing in a file is a pattern."""


class ModelClassFacts(TypedDict):
    """A `ModelClass` in our header."""

    library: str
    name: str
    labels: NotRequired[list[str]]
    problem_type: NotRequired[str]


class HeaderFacts(TypedDict):
    """The fields of our header in every version of the format. The first files lack some of them."""

    config: ConfigFacts
    targets: dict[str, list[int]]
    library_version: str
    sha256: str
    torch_version: NotRequired[str | None]
    transposed: NotRequired[list[str] | None]
    kinds: NotRequired[dict[str, str]]
    model_class: NotRequired[ModelClassFacts]


class HeaderFacts1(HeaderFacts, RecordFacts):
    """Our header in version 1, with one pair of bases."""


class HeaderFacts2(HeaderFacts):
    """Our header in version 2, with bases by r."""

    bases: dict[str, RecordFacts]


class HeaderFacts3(HeaderFacts2):
    """Our header in version 3, with the names of the trained buffers."""

    buffers: list[str]


FORMAT_VERSIONS = {1: HeaderFacts1, 2: HeaderFacts2, 3: HeaderFacts3}
"""A version is written only if the version before has no place for all fields.

Version 2 has stacks of matrices and options of single layers, version 3 has buffers of modules in ``train_also``.
"""


@dataclass(frozen=True)
class ModelClass:
    """The class of a model, and the outputs of a head as its config describes them.

    Attributes:
        library: The package that exports it.
        name: Its name, such as ``"BertForSequenceClassification"``.
        labels: The names of the outputs, in order, if parameters were trained with the adapter, such as a head.
        problem_type: The ``problem_type`` in the config, which selects the loss.
    """

    library: str
    name: str
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None

    @classmethod
    def of(cls, model: nn.Module, *, has_trained: bool) -> Self | None:
        """Return the class of a model, or ``None`` if no library exports it; with labels if ``has_trained``."""
        # `fully_shard` changes the class too
        kind = next(kind for kind in plain_class(model).__mro__ if not kind.__module__.startswith("torch."))
        library = kind.__module__.partition(".")[0]
        if library not in LIBRARIES or getattr(sys.modules.get(library), kind.__name__, None) is not kind:
            return None
        config = getattr(model, "config", None) if has_trained else None
        problem_type = getattr(config, "problem_type", None)
        return cls(library, kind.__name__, _labels(config), problem_type if isinstance(problem_type, str) else None)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Self:
        """Build one from the result of `to_dict`."""
        labels = facts.get("labels")
        return cls(
            facts["library"], facts["name"], None if labels is None else tuple(labels), facts.get("problem_type")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are known as JSON-serializable values."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields that a config of transformers has for a model with these labels."""
        fields: dict[str, Any] = {} if self.problem_type is None else {"problem_type": self.problem_type}
        if self.labels is not None:
            fields["id2label"] = dict(enumerate(self.labels))
            fields["label2id"] = {label: index for index, label in enumerate(self.labels)}
        return fields


def _labels(config: object) -> tuple[str, ...] | None:
    found = getattr(config, "id2label", None)
    if not isinstance(found, dict) or sorted(found) != [*range(len(found))]:
        return None
    labels = tuple(found[index] for index in range(len(found)))
    return labels if all(isinstance(label, str) for label in labels) else None


@dataclass(frozen=True)
class BasisRecord:
    """One pair of bases, as a header records it.

    ``digest`` is the `Basis.digest` of the values that the layers with this r use. If not ``is_reproducible``, the spec
    does not reproduce the bases, and the file must hold them.
    """

    spec: BasisSpec
    digest: str
    is_reproducible: bool

    @classmethod
    def of(cls, basis: Basis, shapes: Iterable[Shape]) -> Self:
        """Return the record of bases for layers of these shapes."""
        spec, shapes = basis.spec, list(shapes)
        if spec.is_prefix_stable:  # then the dims that other adapters of the model made it grow to do not matter
            max_dim, min_dim = drawn_dims(shapes)
            spec = replace(spec, max_dim=max_dim, min_dim=min_dim)
        return cls(spec, basis.digest(*sliced_dims(shapes)), basis.stored is None)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serializable values."""
        return {
            "basis": self.spec.to_dict(),
            SEAL_WORD: self.digest,
            "is_reproducible": self.is_reproducible,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Self:
        """Build a record from the result of `to_dict`."""
        return cls(BasisSpec.from_dict(facts["basis"]), facts[SEAL_WORD], bool(facts["is_reproducible"]))


@dataclass(frozen=True)
class Header:
    """The facts about an adapter that are not in its tensors.

    ``config`` gives r and alpha of each target by FQN where they differ, ``bases`` are the bases by r, and ``shapes``
    the shapes of the updates by target. ``torch_version`` is the version that drew the bases, and ``transposed`` are
    the targets that are stored as ``(in_features, out_features)``; ``None`` if the file does not say. ``kinds`` are the
    kinds of targets that are not linear layers. ``model_class`` is the class that the adapter was trained on; ``None``
    if the file does not say. ``buffers`` are the names in ``config.train_also`` that are buffers.
    """

    config: RandLoRAConfig
    bases: dict[int, BasisRecord]
    shapes: Shapes
    library_version: str
    torch_version: str | None
    transposed: tuple[str, ...] | None
    kinds: Mapping[str, str] = field(default_factory=dict)
    model_class: ModelClass | None = None
    buffers: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        config: RandLoRAConfig,
        options: Mapping[str, LayerOptions],
        bases: Mapping[int, Basis],
        shapes: Shapes,
        trained: Iterable[str],
        transposed: tuple[str, ...] | None,
        kinds: Mapping[str, str],
        model_class: ModelClass | None,
        buffers: Iterable[str],
    ) -> Self:
        """Return the header of an adapter, given its layers' shapes and the FQNs of parameters trained with it.

        ``buffers`` are the FQNs that are buffers.
        """
        config = replace(config, targets=tuple(shapes), exclude=None, train_also=tuple(trained) or None)
        records = {r: BasisRecord.of(bases[r], own) for r, own in by_rank(shapes, options).items()}
        is_drawn = any(record.is_reproducible for record in records.values())
        versions = version("randlora"), torch.__version__.split("+")[0] if is_drawn else None
        head = options_by_target(config, options), records, dict(shapes), *versions
        return cls(*head, transposed, kinds, model_class, tuple(buffers))

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
    """The SHA-256 of the facts of a header and of the tensors beside it, added one by one in the order of their names.

    Attributes:
        text: The header as JSON, with the SHA-256 of all that was added so far: always of the same length.
    """

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
    def text(self) -> str:  # noqa: D102  # see above
        return json.dumps({**self._facts, "sha256": self.digest})

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        return METADATA | {HEADER_KEY: self.text}


def metadata_of(header: Header | None, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of the file of an adapter's tensors."""
    return METADATA if header is None else seal_of(facts_of(header), tensors).metadata


def facts_of(header: Header) -> dict[str, Any]:
    """Return the fields of a header as JSON-serializable values, without the SHA-256."""
    facts: dict[str, Any] = {
        "config": header.config.to_dict(),
        "format_version": header.format_version,
        "library_version": header.library_version,
        "targets": {fqn: list(shape) for fqn, shape in header.shapes.items()},
        "torch_version": header.torch_version,
        "transposed": header.transposed,
        **({"kinds": dict(header.kinds)} if header.kinds else {}),  # the first files have none
        **({"model_class": header.model_class.to_dict()} if header.model_class else {}),  # nor this
    }
    if header.format_version == 1:
        (record,) = header.bases.values()
        facts |= record.to_dict()
    else:
        facts["bases"] = {str(r): record.to_dict() for r, record in header.bases.items()}
    if header.buffers:
        facts["buffers"] = list(header.buffers)
    return dict(sorted(facts.items()))


def parse_header(text: str, tensors: Mapping[str, Tensor]) -> Header:
    """Return the header that was written as a `Seal.text` with these tensors, after checking version and checksum."""
    try:
        facts = parse_json(text)
        if not isinstance(facts, dict):
            raise TypeError("it is not an object")
        found = facts["format_version"]
        if type(found) is not int or found not in FORMAT_VERSIONS:
            known = f"versions 1 to {max(FORMAT_VERSIONS)}"
            raise CheckpointError(
                f"the file has format version {found!r:.80}, this library reads {known}: install one that reads it"
            )
        if problems := [*mistyped(facts, FORMAT_VERSIONS[found], "")]:
            raise ValueError("; ".join(problems[:SHOWN]))
        seal = facts.pop("sha256")
        records = {facts["config"]["r"]: facts} if found == 1 else facts["bases"]
        if problems := [*_problems(facts, records)]:
            raise ValueError(problems[0])
        header = Header(
            config=RandLoRAConfig.from_dict(facts["config"]),
            bases={int(r): BasisRecord.from_dict(record) for r, record in records.items()},
            shapes={fqn: tuple(sizes) for fqn, sizes in facts["targets"].items()},
            library_version=facts["library_version"],
            torch_version=facts.get("torch_version"),  # the first files have neither this
            transposed=None if (found := facts.get("transposed")) is None else tuple(found),  # nor this
            kinds=facts.get("kinds", {}),
            model_class=ModelClass.from_dict(facts["model_class"]) if "model_class" in facts else None,
            buffers=tuple(facts.get("buffers", [])),
        )
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the file's header is damaged ({error}): get an undamaged copy") from error
    if seal != seal_of(facts, tensors).digest:
        raise CheckpointError("the file's contents do not match its checksum, it was damaged: get an undamaged copy")
    if not _is_consistent(header):
        specs = " and ".join(str(record.spec) for record in header.bases.values())
        raise CheckpointError(
            f"the file's options, its targets and {specs} contradict each other: randlora.save wrote no such file"
        )
    return header


def _problems(facts: Mapping[str, Any], records: Iterable[int | str]) -> Iterator[str]:
    """Yield what is wrong with the values of a header whose types are right; an r is a name if there are several."""
    yield from (f"{r!r} is not an r" for r in records if str(int(r)) != str(r))
    for fqn, sizes in facts["targets"].items():
        if not (len(sizes) in (2, 3) and all(size > 0 for size in sizes)):
            yield f"{fqn} has shape {sizes!r:.80}, expected two or three positive integers"
    for fqn, kind in facts.get("kinds", {}).items():
        if fqn not in facts["targets"] or kind not in KINDS:
            yield f"{fqn} has kind {kind!r}, expected a target and one of {', '.join(KINDS)}"
    if others := {*facts.get("buffers", [])} - {*(facts["config"].get("train_also") or ())}:
        yield f"{', '.join(sorted(others))} is not among the trained parameters"


def _is_consistent(header: Header) -> bool:
    """Whether each target has its options, and the bases of its r fit those and are large enough."""
    named = [option.keys() for option in (header.config.r, header.config.alpha) if isinstance(option, Mapping)]
    targets = header.config.targets
    if not is_names(targets) or any(fqns != header.shapes.keys() for fqns in [*named, {*targets}]):
        return False
    shapes = by_rank(header.shapes, header.options)
    if shapes.keys() != header.bases.keys():
        return False
    for r, own in shapes.items():
        spec, used = header.bases[r].spec, sliced_dims(own)
        is_large_enough = spec.is_prefix_stable or all(map(operator.ge, (spec.max_dim, spec.min_dim), used))
        if not (spec.is_of(header.config, r) and is_large_enough):
            return False
    return True


def seal_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Seal:
    """Return a seal to which tensors in any order were added."""
    seal = Seal(facts)
    for name, tensor in sorted(tensors.items()):
        seal.added(Planned.whole(name, tensor.cpu())).read()
    return seal

"""The table of options: the config of one adapter, a frozen dataclass that validates itself, and the values it takes.

Each option is one field, whose metadata are those of `Option`, and a line of the class's docstring. The checks, the
options of `inject`, `plan` and the command line, the schema of files and PEFT's names are derived from it. This module
does not import torch, because that takes seconds.
"""

import difflib
import functools
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, ParamSpec, Self, TypeVar, get_type_hints

from randlora.errors import ConfigError, OptionError, named, raise_collected, spelled, typed
from randlora.hints import ADVICE, mistyped, shortly

BasisKind = Literal["dense", "sparse", "very_sparse", "block"]
Stream = Literal["torch", "torch-2.11", "portable"]
InProj = Literal["packed", "split"]
Experts = Literal["each", "shared"]

Init = Literal["lambda", "gamma"]  # which of Λ and Γ starts at zero and moves first
Train = Literal["both", "lambda"]  # which of Λ and Γ is trained
Strategy = Literal["ddp", "fsdp2"]

Names = str | Sequence[str]  # a regex for whole names, or names and suffixes of names
Pattern = Names | Callable[[str, Any], bool]  # of a name and a module
TableRows = Mapping[str, Sequence[int]]  # numbers of rows, by the names of the embeddings or heads that have them
Source = str | os.PathLike[str]  # a path, or a repository on the Hub
Factor = float | Mapping[str, float]  # of an active adapter's update, or of each layer's by FQN; at 0 it does not act
Check = Callable[[Any], str]  # returns what a value of the right type does not meet, or an empty string

NO_REGEX = re.error, OverflowError, RecursionError  # of ``re``: no regex, counts too far, nested too deeply

_Number = TypeVar("_Number", bound=float | Sequence[int])
_Value = TypeVar("_Value")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def between(words: str, least: float, largest: float) -> Check:
    """Return a check that a value is a Python number (as in JSON) within a range, described by ``words``."""
    return lambda value: "" if isinstance(value, int | float) and least <= value <= largest else words


def distinct_rows(rows: Sequence[int]) -> str:
    """Check the numbers of rows of a table."""
    is_right = rows and min(rows) >= 0 and len({*rows}) == len(rows)
    return "" if is_right else "at least one row, and different integers of at least 0"


def names_or_regex(value: Any) -> str:
    """Check a pattern for names, which may be a function too."""
    if isinstance(value, tuple):
        return "" if value and all(value) else "at least one name, and no empty names"
    try:
        re.compile(value if isinstance(value, str) else "")
    except NO_REGEX as error:
        return f"a valid regular expression ({error})"
    return ""


def _option(default: Any, **metadata: Any) -> Any:
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """An option of the table."""

    name: str
    type: Any
    default: Any
    check: Check = lambda _: ""  # of a value of this type; in a mapping, of each value
    peft: str | None = None  # PEFT's name for it, in the JSON of its RandLoRA
    aliases: tuple[str, ...] = ()  # in other libraries
    since: int = 1  # the file format that has it first; above 1, it is written only if it does not have its default

    def problems(self, value: Any) -> Iterator[str]:
        """Yield messages about why a value is invalid for this option."""
        if wrong := [*mistyped(value, self.type, named(self.name))]:
            yield from wrong
        elif isinstance(value, Mapping):
            if not all(value) or not value:
                yield f"{named(self.name)} must have patterns that are names or regexes, got {shortly(value)}"
            for pattern, number in value.items():
                if said := self.check(number):
                    yield f"{named(self.name)}[{shortly(pattern)}] must be {said}, got {shortly(number)}"
        elif value is not None and (said := self.check(value)):
            yield f"{named(self.name)} must be {said}, got {shortly(value)}"


class ByPattern(Mapping[str, _Number]):
    """An option with a value for each pattern of layers; the first pattern that matches a layer applies.

    It is immutable, and equals only mappings with the same entries in the same order.
    """

    def __init__(self, numbers: Mapping[str, _Number]) -> None:
        """Copy a mapping from patterns to values."""
        self._numbers: dict[str, _Number] = dict(numbers)

    def __getitem__(self, pattern: str) -> _Number:
        return self._numbers[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and [*self.items()] == [*other.items()]

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._numbers)


class LayerOptions(NamedTuple):
    """The options that may differ between the layers of an adapter.

    Attributes:
        r: Rank of one random basis.
        alpha: The update is scaled by ``alpha / r``.
    """

    r: int
    alpha: float

    @property
    def scaling(self) -> float:
        """The factor of the update, ``alpha / r``."""
        return self.alpha / self.r


def by_rank(values: Mapping[str, _Value], options: Mapping[str, LayerOptions]) -> dict[int, list[_Value]]:
    """Return the values of layers, such as their shapes, grouped by r."""
    found: dict[int, list[_Value]] = {}
    for fqn, value in values.items():
        found.setdefault(options[fqn].r, []).append(value)
    return found


def described(options: Mapping[str, LayerOptions]) -> dict[str, str]:
    """Return r and alpha in words: the value, or each value with its number of layers."""
    words = {}
    for name in LayerOptions._fields:
        counts = sorted(Counter(getattr(layer, name) for layer in options.values()).items())
        many = ", ".join(f"{value:g} ({count} layer{'s' * (count > 1)})" for value, count in counts)
        words[name] = f"{counts[0][0]:g}" if len(counts) == 1 else many
    return words


ALPHA_PER_RANK = 20.0  # the default alpha is 20·r, which is PEFT's 640 for r = 32
LARGEST_RANK = 2**20  # above min_dim, a larger r adds no rank, and no layer is as wide as this
LARGEST_FACTOR = 1e15  # of an adapter, and the largest alpha: their product times zero is zero in any dtype


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig:
    """The options of one adapter.

    Attributes:
        r: Rank of one random basis. A **smaller** r means **more** trainable parameters: ``num_bases·(r + min_dim)``
            in each layer, with ``num_bases = ceil(min_dim / r)``. A mapping from patterns to ranks, such as
            ``{"q_proj": 16, ".*": 32}``, gives layers different ranks. A pattern is an FQN or a suffix of FQNs, of
            layers or of modules with layers inside, or else a regex matched with ``fullmatch``. The first pattern that
            matches a layer applies, so put narrower patterns first. Every layer needs a match. There is one pair of
            bases for each rank, with the dims of the layers that have it.
        targets: The layers and weights to adapt. ``"all-linear"`` means all linear layers and the projections of
            attention. ``"all"`` means every kind that has an adapter layer, and skips layers that cannot be adapted.
            Both leave out output heads. Any other string is a regex matched with ``fullmatch`` against the FQN. A
            sequence contains FQNs or suffixes of them: of layers, of weights that other code reads, or of modules, in
            which all layers are adapted. A callable is called with ``(fqn, module)``. ``None`` means the query and
            value projections in models of transformers (by a preset for ``model.config.model_type``, or by names that
            models share), the attention in models of diffusers, and ``"all-linear"`` in other models.
        exclude: Layers to exclude from ``targets``, in the same forms, before ``targets`` are checked. Names may be
            the names of any modules; a callable is called for the layers that ``targets`` match.
        alpha: The update is scaled by ``alpha / r``. ``None`` means ``20·r``, with each layer's r. The paper's author
            advises values from ``2·r`` to ``20·r``. A larger alpha needs a smaller learning rate. May also be a
            mapping, with patterns as for ``r``. `randlora.inject` requires a positive alpha; files may have others.
        dropout: Probability of zeroing an entry of the adapter's input in training, in [0, 1).
        basis: The kind of the frozen random bases.
        stream: The random stream of the bases. Each gives the same bits on every machine and version. ``"torch"`` gives
            what PEFT 0.21.2 draws, ``"torch-2.11"`` what it draws for ``dense`` under torch 2.11 and older. The values
            of ``"portable"`` do not depend on the dims. ``None`` means ``"torch"``, or ``"portable"`` for ``block``,
            which has no other stream.
        blocks: ``(c, b)``, the numbers of blocks in A and B of ``block`` bases. Both must divide every r. ``None``
            means a default that depends on r and the layers, and leaves no entry of an update always zero.
        seed: Seed of the bases, a 64-bit unsigned integer; torch's generator uses its low 32 bits.
        train: Whether ``"both"`` Λ and Γ are trained, or ``"lambda"`` alone, and Γ stays 1 / min_dim. Updates are then
            linear in what is trained, so that sums and means of adapters are adapters: see `randlora.serving.combine`.
            A layer trains ``r·num_bases`` numbers, which is r if r is at least its min_dim; a smaller r limits the rank
            of its update, and a larger one, which may exceed all layers, trains more.
        train_also: Modules or parameters that are trained and saved with the adapter: a regex, or a sequence of names
            or suffixes. Default targets, ``"all"`` and ``"all-linear"`` leave them out.
        train_rows: Rows of embeddings, such as those of new tokens, that are trained and saved with the adapter:
            ``{"embed_tokens": [128256, 128257]}``, by names or suffixes. A head that is tied to the embedding has the
            same rows; name one that is not tied too. Default targets, ``"all"`` and ``"all-linear"`` leave these out.
        in_proj: How the ``in_proj_weight`` of an `nn.MultiheadAttention` is adapted: ``"packed"``, as one matrix, or
            ``"split"``, with a Λ and a Γ for each of its query, key and value projections.
        experts: How a stack of experts' weights is adapted: ``"each"`` expert has its own Λ and Γ, or they are
            ``"shared"``, so that one update is added to all experts.

    Raises:
        ConfigError: If values are invalid; the message lists all of them.
        OptionError: For an unknown option, with a suggestion. It is also a `TypeError`.
    """

    r: int | Mapping[str, int] = _option(
        32, check=between(f"a positive integer of at most {LARGEST_RANK}", 1, LARGEST_RANK), peft="r"
    )
    targets: Pattern | None = _option(None, check=names_or_regex, peft="target_modules")
    exclude: Pattern | None = _option(None, check=names_or_regex, aliases=("exclude_modules",))
    alpha: float | Mapping[str, float] | None = _option(
        None,
        check=between(f"a number of at most {LARGEST_FACTOR:g} in size", -LARGEST_FACTOR, LARGEST_FACTOR),
        peft="randlora_alpha",
        aliases=("lora_alpha",),
    )
    dropout: float = _option(
        0.0,
        check=between("a number in [0, 1)", 0, math.nextafter(1, 0)),
        peft="randlora_dropout",
        aliases=("lora_dropout",),
    )
    basis: BasisKind = "dense"
    stream: Stream | None = None
    blocks: tuple[int, int] | None = _option(
        None, check=lambda pair: "" if min(pair) > 0 else "two positive integers (c, b)"
    )
    seed: int = _option(0, check=between("an integer in [0, 2**64)", 0, 2**64 - 1), peft="projection_prng_key")
    train: Train = _option("both", since=4)
    train_also: Names | None = _option(None, check=names_or_regex, peft="modules_to_save")
    train_rows: TableRows | None = _option(None, check=distinct_rows, aliases=("trainable_token_indices",), since=4)
    in_proj: InProj = _option("packed", since=2)
    experts: Experts = _option("each", since=2)

    def __post_init__(self) -> None:
        """Convert lists to tuples and mappings to immutable ones, and check every value."""
        for name in OPTIONS:
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        problems = [problem for option in OPTIONS.values() for problem in option.problems(getattr(self, option.name))]
        raise_collected(ConfigError, problems or [*self._conflicts()], doing="configure RandLoRA")

    def _conflicts(self) -> Iterator[str]:
        basis, stream, blocks = self.basis, self.stream, self.blocks
        if basis == "block" and stream in ("torch", "torch-2.11"):
            yield f"{spelled('basis', basis)} has no {spelled('stream', stream)}: omit {named('stream')}"
        if basis in ("sparse", "very_sparse") and stream == "torch-2.11":
            given, dense = spelled("stream", stream), spelled("basis", "dense")
            yield f"{given} is for {dense}: every torch draws the same {basis} bases: omit {named('stream')}"
        if blocks is not None and basis != "block":
            yield f"{named('blocks')} needs {spelled('basis', 'block')}, got {typed(basis)}"
        elif blocks is not None:
            ranks = dict.fromkeys(self.r.values() if isinstance(self.r, Mapping) else [self.r])
            both, got = f"both numbers of {named('blocks')}", f"got {blocks[0]} and {blocks[1]}"
            yield from (f"{both} must divide {spelled('r', r)}, {got}" for r in ranks if any(r % n for n in blocks))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-serializable values. Mappings become lists of pairs, to keep their order in JSON.

        Raises:
            ConfigError: If ``targets`` or ``exclude`` is a callable.
        """
        written = {}
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if callable(value):
                raise ConfigError(f"{name} is a callable, which cannot be serialized: give the layers' names instead")
            if option.since == 1 or value != option.default:  # so that a file of format 1 has what its readers know
                pairs = [*map(list, value.items())] if isinstance(value, Mapping) else value
                written[name] = list(pairs) if isinstance(pairs, tuple) else pairs
        return written

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from the result of `to_dict`.

        Raises:
            ConfigError: For an unknown option or an invalid value.
        """
        if unknown := sorted(set(values) - set(OPTIONS)):
            raise ConfigError(f"unknown options {', '.join(unknown)}: the options are {', '.join(sorted(OPTIONS))}")
        by_name = ("r", "alpha", "train_rows")
        return cls(**{name: _from_pairs(value) if name in by_name else value for name, value in values.items()})


OPTIONS = {
    each.name: Option(each.name, get_type_hints(RandLoRAConfig)[each.name], each.default, **each.metadata)
    for each in fields(RandLoRAConfig)
}
"""The options of the table by name."""

OPTION_ADVICE = {
    name: f"use {option.name}="
    for option in OPTIONS.values()
    for name in (option.peft, *option.aliases)
    if name and name not in OPTIONS
} | ADVICE
"""Advice about options that PEFT or other libraries have and `inject` does not have."""


def _frozen(value: Any) -> Any:
    """Return a value that cannot be changed and can be hashed, if it is of a kind that can be."""
    if isinstance(value, set | frozenset):
        return tuple(sorted(value, key=str))
    if isinstance(value, list | range):
        return tuple(value)
    return ByPattern({key: _frozen(each) for key, each in value.items()}) if isinstance(value, Mapping) else value


def _from_pairs(value: Any) -> Any:
    """Return the mapping that `RandLoRAConfig.to_dict` returned as a list of pairs, and any other value as it is."""
    if not isinstance(value, list | tuple):
        return value
    is_pair = (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)
    return dict(value) if all(is_pair) else value


def explain_options(
    function: Callable[_Arguments, _Result], name: str = "", verb: Callable[..., Any] | None = None
) -> Callable[_Arguments, _Result]:
    """Wrap a function to refuse unknown options, with a suggestion, and to take those of a ``verb`` that it calls."""
    signature = inspect.signature(function)
    if verb is not None:
        own = {name: each for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD}
        theirs = inspect.signature(verb).parameters
        more = [each for name, each in theirs.items() if each.kind is each.KEYWORD_ONLY and name not in own]
        signature = signature.replace(parameters=[*own.values(), *more])
    known = [name for name in signature.parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        problems = [_unknown_option(option, known) for option in options if option not in known]
        raise_collected(OptionError, problems, doing=f"call {name or function.__name__}")
        if verb is None:
            return function(*args, **options)
        given = signature.bind(*args, **options)
        given.apply_defaults()
        return function(*given.args, **given.kwargs)

    if verb is not None:
        vars(checked)["__signature__"] = signature
    return checked


def further_options(
    verb: Callable[..., Any],
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Return a decorator that adds the options of ``verb`` to a function that passes them on."""
    return functools.partial(explain_options, verb=verb)


def same_options(verb: Callable[_Arguments, Any]) -> Callable[[Callable[..., _Result]], Callable[_Arguments, _Result]]:
    """Return `further_options` of ``verb`` for a function that has no others, which a type checker sees too."""
    return further_options(verb)  # type: ignore[return-value]


def _unknown_option(option: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(option, known, n=3)
    choices = f"the nearest options are {', '.join(near)}" if near else f"the options are {', '.join(known)}"
    advice = OPTION_ADVICE.get(option, f"use {option}=" if option in OPTIONS else choices)
    used = re.match(r"use (\w+)=", advice)
    if "source" in known and used and used[1] not in known:
        advice = "leave it out: files say how their adapter was made"
    return f"unknown option {option}=: {advice}"


RandLoRAConfig.__init__ = explain_options(RandLoRAConfig.__init__, "RandLoRAConfig")  # type: ignore[method-assign]

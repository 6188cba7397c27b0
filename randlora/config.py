"""The options of one adapter: a frozen dataclass that validates itself."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, Self, TypeVar, get_args

from torch import nn

from randlora.choices import BasisKind as BasisKind
from randlora.choices import Experts as Experts
from randlora.choices import InProj as InProj
from randlora.choices import Stream as Stream
from randlora.errors import ConfigError, OptionError, raise_collected
from randlora.hints import is_finite, shortly
from randlora.layer_options import ByPattern
from randlora.meant import OPTIONS

Pattern = str | Sequence[str] | Callable[[str, nn.Module], bool]

ALPHA_PER_RANK = 20.0
"""The default alpha is 20·r, which is PEFT's 640 for r = 32."""

ADDED_SINCE_FORMAT_1 = {"in_proj": "packed", "experts": "each"}
"""Options that the first format of files does not have, with their defaults."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def explain_options(function: Callable[_Arguments, _Result], name: str = "") -> Callable[_Arguments, _Result]:
    """Wrap a function to raise `OptionError`, with a suggestion, for an unknown option. The signature is kept.

    ``name`` is the name to use in the message, if not the function's.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        problems = [_unknown_option(option, known) for option in options if option not in known]
        raise_collected(OptionError, problems, doing=f"call {name or function.__name__}")
        return function(*args, **options)

    return checked


def same_options(verb: Callable[_Arguments, Any]) -> Callable[[Callable[..., _Result]], Callable[_Arguments, _Result]]:
    """Return a decorator that gives a function the signature of ``verb``, and explains its options."""

    def decorate(function: Callable[..., _Result]) -> Callable[_Arguments, _Result]:
        vars(function)["__signature__"] = inspect.signature(verb)
        return explain_options(function)

    return decorate


def further_options(
    verb: Callable[..., Any],
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Return a decorator that adds the options of ``verb`` to the signature of a function that passes them on."""

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        own = inspect.signature(function)
        parameters = {name: each for name, each in own.parameters.items() if each.kind is not each.VAR_KEYWORD}
        theirs = inspect.signature(verb).parameters
        more = [each for name, each in theirs.items() if each.kind is each.KEYWORD_ONLY and name not in parameters]
        vars(function)["__signature__"] = own.replace(parameters=[*parameters.values(), *more])
        return explain_options(function)

    return decorate


def _unknown_option(option: str, known: Iterable[str]) -> str:
    if option in OPTIONS:
        return f"unknown option {option}=: {OPTIONS[option]}"
    near = difflib.get_close_matches(option, known, n=3)
    if near:
        return f"unknown option {option}=: the nearest options are {', '.join(near)}"
    return f"unknown option {option}=: the options are {', '.join(known)}"


NO_REGEX = re.error, OverflowError, RecursionError
"""What the module ``re`` raises for what is no regular expression, counts too far, or is nested too deeply."""

LARGEST_RANK = 2**20
"""The largest r. Above min_dim, a larger r adds rows of the bases and no rank, and no layer is as wide as this."""

LARGEST_FACTOR = 1e15
"""The largest alpha, and the largest weight of an adapter: products of both and zeros are zeros in any dtype."""


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig:
    """The options of one adapter.

    Attributes:
        r: Rank of one random basis. A **smaller** r means **more** trainable parameters: ``num_bases·(r + min_dim)``
            a layer with ``num_bases = ceil(min_dim / r)``. A mapping from patterns to ranks, such as
            ``{"q_proj": 16, ".*": 32}``, gives layers different ranks. A pattern is an FQN or a suffix of FQNs, of
            layers or of modules with layers inside, or else a regex matched with ``fullmatch``. The first pattern that
            matches a layer applies, each layer must have one, and patterns for a part of others come first. There is
            one pair of bases for each rank, with the dims of the layers that have it.
        targets: The layers and weights to adapt. ``"all-linear"`` means all linear layers and the projections of
            attention, ``"all"`` every kind that has an adapter layer, and skips what cannot be adapted; both leave out
            output heads. Any other string is a regex matched with ``fullmatch`` against the FQN. A sequence contains
            FQNs or suffixes of them, each of a layer, of a weight that other code reads, or of a module in which all
            are adapted. A callable is called with ``(fqn, module)``. ``None`` means the query and value projections of
            transformers' models, as of the preset of ``model.config.model_type`` or by names that models share, the
            attention of diffusers' models, and ``"all-linear"`` in others.
        exclude: Layers to exclude from ``targets``, in the same forms, before ``targets`` are checked. Names may be
            those of any modules; a callable is called for the layers that ``targets`` match.
        alpha: The update is scaled by ``alpha / r``; ``None`` means ``20·r``, of each layer's r. The paper's author
            advises values from ``2·r`` to ``20·r``. A larger alpha needs a smaller learning rate. It may be a mapping
            too, with patterns as for ``r``. `randlora.inject` refuses one that is not positive; a file may have it.
        dropout: Probability of zeroing an entry of the adapter's input in training, in [0, 1).
        basis: The kind of the frozen random bases.
        stream: The random stream of the bases, each the same bits on every machine and version: ``"torch"`` is what
            PEFT 0.21.2 draws, ``"torch-2.11"`` is what it draws for ``dense`` under torch 2.11 and older, and
            ``"portable"`` depends on no dims. ``None`` means ``"torch"``, or ``"portable"`` for ``block``, which has no
            other.
        blocks: ``(c, b)``, the numbers of blocks in A and B of ``block`` bases; both divide every r. ``None`` means a
            default that depends on r and the layers, and leaves no entry of an update always zero.
        seed: Seed of the bases, a 64-bit unsigned integer; torch's generator uses its low 32 bits.
        train_also: Modules or parameters that are trained and saved with the adapter: a regex, or a sequence of names
            or suffixes. A default, ``"all"`` and ``"all-linear"`` leave them out of the targets.
        in_proj: How the ``in_proj_weight`` of an `nn.MultiheadAttention` is adapted: ``"packed"``, as one matrix, or
            ``"split"``, with a Λ and a Γ for each of its query, key and value projections.
        experts: How a stack of experts' weights is adapted: ``"each"`` expert with its own Λ and Γ, or all with
            ``"shared"`` ones, so that one update is added to all.

    Raises:
        ConfigError: If values are invalid; the message lists all of them.
        OptionError: For an unknown option, with a suggestion. It is also a `TypeError`.
    """

    r: int | Mapping[str, int] = 32
    targets: Pattern | None = None
    exclude: Pattern | None = None
    alpha: float | Mapping[str, float] | None = None
    dropout: float = 0.0
    basis: BasisKind = "dense"
    stream: Stream | None = None
    blocks: tuple[int, int] | None = None
    seed: int = 0
    train_also: str | Sequence[str] | None = None
    in_proj: InProj = "packed"
    experts: Experts = "each"

    def __post_init__(self) -> None:
        """Convert lists to tuples and mappings to immutable ones, and check every value."""
        for name in ("r", "alpha"):
            if isinstance(value := getattr(self, name), Mapping):
                object.__setattr__(self, name, ByPattern(value))
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list | set | frozenset):
                object.__setattr__(
                    self, field.name, tuple(sorted(value, key=str) if isinstance(value, set | frozenset) else value)
                )
        raise_collected(
            ConfigError,
            [*_number_problems(self), *_basis_problems(self), *_choice_problems(self), *_pattern_problems(self)],
            doing="configure RandLoRA",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON-serializable values. Mappings become lists of pairs, whose order JSON keeps.

        Raises:
            ConfigError: If ``targets`` or ``exclude`` is a callable.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("targets", "exclude"):
            if callable(values[name]):
                raise ConfigError(f"{name} is a callable, which cannot be serialized: give the layers' names instead")
        for name, default in ADDED_SINCE_FORMAT_1.items():
            if values[name] == default:  # so that a file of format 1 has what its readers know
                del values[name]
        values |= {name: [*map(list, value.items())] for name, value in values.items() if isinstance(value, ByPattern)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from the result of `to_dict`.

        Raises:
            ConfigError: For an unknown option or an invalid value.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown options {', '.join(unknown)}: the options are {', '.join(sorted(known))}")
        return cls(**{**values, **{name: _from_pairs(values[name]) for name in ("r", "alpha") if name in values}})


RandLoRAConfig.__init__ = explain_options(RandLoRAConfig.__init__, "RandLoRAConfig")  # type: ignore[method-assign]


def is_integer(value: object) -> bool:
    """Whether ``value`` is a Python integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def _is_rank(value: Any) -> bool:
    return is_integer(value) and 0 < value <= LARGEST_RANK


def _numbers(option: object) -> list[tuple[str, Any]]:
    """Return the values of an option that may differ between layers, each after words for its pattern."""
    if isinstance(option, Mapping):
        return [(f" of {shortly(pattern)}", value) for pattern, value in option.items()]
    return [("", option)]


def _from_pairs(value: Any) -> Any:
    """Return the mapping that `RandLoRAConfig.to_dict` returned as a list of pairs, and any other value as it is."""
    if not isinstance(value, list | tuple):
        return value
    is_pair = (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)
    return dict(value) if all(is_pair) else value


def _by_pattern_problems(name: str, option: object) -> list[str]:
    if not isinstance(option, Mapping):
        return []
    if not option:
        return [f"{name} must be a number or have at least one pattern, got {shortly(option)}"]
    return [
        f"the patterns of {name} must be names or regexes, got {shortly(pattern)}"
        for pattern in option
        if not (isinstance(pattern, str) and pattern)
    ]


def _number_problems(config: RandLoRAConfig) -> list[str]:
    problems = _by_pattern_problems("r", config.r) + _by_pattern_problems("alpha", config.alpha)
    for of, r in _numbers(config.r):
        if is_integer(r) and r > LARGEST_RANK:
            problems.append(f"r{of} must be at most {LARGEST_RANK}, more than any layer is wide, got {shortly(r)}")
        elif not _is_rank(r):
            problems.append(f"r{of} must be a positive integer, got {shortly(r)}")
    problems += [
        f"alpha{of} must be a finite number{'' if of else ' or None for 20·r'}, got {shortly(alpha)}"
        for of, alpha in _numbers(config.alpha)
        if not (_is_real(alpha) or (alpha is None and not of))
    ]
    problems += [
        f"alpha{of} must be at most {LARGEST_FACTOR:g} in size, got {shortly(alpha)}"
        for of, alpha in _numbers(config.alpha)
        if _is_real(alpha) and abs(alpha) > LARGEST_FACTOR
    ]
    if not (_is_real(config.dropout) and 0 <= config.dropout < 1):
        problems.append(f"dropout must be a number in [0, 1), got {shortly(config.dropout)}")
    if not (is_integer(config.seed) and 0 <= config.seed < 2**64):
        problems.append(f"seed must be an integer in [0, 2**64), got {shortly(config.seed)}")
    return problems


def _basis_problems(config: RandLoRAConfig) -> list[str]:
    problems = []
    if config.basis not in get_args(BasisKind):
        problems.append(f"basis must be one of {', '.join(get_args(BasisKind))}, got {shortly(config.basis)}")
    if config.stream not in (None, *get_args(Stream)):
        problems.append(f"stream must be one of {', '.join(get_args(Stream))} or None, got {shortly(config.stream)}")
    if config.basis == "block" and config.stream in ("torch", "torch-2.11"):
        problems.append(f"basis='block' needs stream='portable', got stream={config.stream!r}: omit stream")
    if config.basis in ("sparse", "very_sparse") and config.stream == "torch-2.11":
        problems.append(
            f"stream='torch-2.11' is for basis='dense': every torch draws the same basis={config.basis!r}: omit stream"
        )
    if config.blocks is not None:
        problems.extend(_block_problems(config))
    return problems


def _choice_problems(config: RandLoRAConfig) -> list[str]:
    problems = []
    for name, choices in (("in_proj", get_args(InProj)), ("experts", get_args(Experts))):
        if (value := getattr(config, name)) not in choices:
            problems.append(f"{name} must be one of {', '.join(choices)}, got {shortly(value)}")
    return problems


def _block_problems(config: RandLoRAConfig) -> list[str]:
    if config.basis != "block":
        return [f"blocks={shortly(config.blocks)} needs basis='block', got basis={config.basis!r}"]
    pair = config.blocks
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(is_integer(count) and count > 0 for count in pair)):
        return [f"blocks must be two positive integers (c, b), got {shortly(pair)}"]
    ranks = dict.fromkeys(r for _, r in _numbers(config.r) if _is_rank(r))
    return [f"both of blocks={pair} must divide r={r}" for r in ranks if any(r % count for count in pair)]


def _pattern_problems(config: RandLoRAConfig) -> list[str]:
    problems = []
    for name in ("targets", "exclude", "train_also"):
        pattern = getattr(config, name)
        if isinstance(pattern, str):
            problems.extend(_regex_problems(name, pattern))
        elif isinstance(pattern, tuple):
            if not pattern or not all(isinstance(entry, str) and entry for entry in pattern):
                problems.append(f"{name} must contain at least one name and only names, got {shortly(pattern)}")
        elif pattern is not None and not (callable(pattern) and name != "train_also"):
            problems.append(f"{name} must be a regex or a list of names, got {shortly(pattern)}")
    return problems


def _regex_problems(name: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except NO_REGEX as error:
        return [f"{name}={pattern!r} is not a valid regular expression: {error}"]
    return []

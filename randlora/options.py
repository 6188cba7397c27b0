"""The values that options take, by layer too, and the entries of the table of options.

The table is `RandLoRAConfig`, with one entry for each option. Neither module imports torch, because this takes seconds.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from randlora.hints import mistyped, shortly

BasisKind = Literal["dense", "sparse", "very_sparse", "block"]
Stream = Literal["torch", "torch-2.11", "portable"]
InProj = Literal["packed", "split"]
Experts = Literal["each", "shared"]

Init = Literal["lambda", "gamma"]
"""Which of Λ and Γ starts at zero and moves first."""

Strategy = Literal["ddp", "fsdp2", "tp"]

Format = Literal["peft", "native", "lora", "diff"]
Layout = Literal["peft", "diffusers", "mlx"]
Component = Literal["unet", "transformer", "text_encoder", "text_encoder_2", "diffusion_model"]
"""Attributes of diffusers' pipelines, and ``diffusion_model``, ComfyUI's name for a model with its authors' names."""

Names = str | Sequence[str]
"""A regex for whole names, or names and suffixes of names."""
Pattern = Names | Callable[[str, Any], bool]
"""`Names`, or a function of a name and a module."""

Source = str | os.PathLike[str]
"""A path, or a repository on the Hub."""
Sources = Source | Sequence[Source] | Mapping[str, float] | Mapping[Path, float]
"""One or several, or their factors."""

Check = Callable[[Any], str]
"""Returns the requirement that a value of the right type does not meet, or an empty string."""

NO_REGEX = re.error, OverflowError, RecursionError
"""Errors of the module ``re`` for text that is not a regular expression, counts too far, or is nested too deeply."""

Factor = float | Mapping[str, float]
"""The factor of an active adapter's update: one for all layers, or one for each by FQN. 0 means it does not act."""

_Number = TypeVar("_Number", bound=float)

_Value = TypeVar("_Value")


def entry(
    *, check: Check = lambda _: "", peft: str | None = None, meant: Sequence[str] = (), since: int = 1
) -> dict[str, Any]:
    """Return an option's entry in the table, as metadata of its field.

    Args:
        check: The requirement on its values beside their type. In a mapping, on each value.
        peft: PEFT's name for it, in the JSON of its RandLoRA.
        meant: Further names for it in other libraries.
        since: The first version of the file format that has it. A version above 1 is written only if the option does
            not have its default.
    """
    return {"check": check, "peft": peft, "meant": meant, "since": since}


def between(words: str, least: float, largest: float) -> Check:
    """Return a check that a value is a Python number (as in JSON) within a range, described by ``words``."""
    return lambda value: "" if isinstance(value, int | float) and least <= value <= largest else words


def positive_pair(pair: tuple[int, int]) -> str:
    """Check the numbers of blocks."""
    return "" if min(pair) > 0 else "two positive integers (c, b)"


def names_or_regex(value: Any) -> str:
    """Check a pattern for names, which may be a function too."""
    if isinstance(value, tuple):
        return "" if value and all(value) else "at least one name, and no empty names"
    try:
        re.compile(value if isinstance(value, str) else "")
    except NO_REGEX as error:
        return f"a valid regular expression ({error})"
    return ""


@dataclass(frozen=True)
class Option:
    """An option of the table: the name, type and default of its field, and its `entry`."""

    name: str
    type: Any
    default: Any
    check: Check
    peft: str | None
    meant: tuple[str, ...]
    since: int

    def problems(self, value: Any) -> Iterator[str]:
        """Yield messages about why a value is invalid for this option."""
        if wrong := [*mistyped(value, self.type, self.name)]:
            yield from wrong
        elif isinstance(value, Mapping):
            if not all(value) or not value:
                yield f"{self.name} must have patterns that are names or regexes, got {shortly(value)}"
            for pattern, number in value.items():
                if said := self.check(number):
                    yield f"{self.name}[{shortly(pattern)}] must be {said}, got {shortly(number)}"
        elif value is not None and (said := self.check(value)):
            yield f"{self.name} must be {said}, got {shortly(value)}"


class ByPattern(Mapping[str, _Number]):
    """An option with a number for each pattern of layers; the first pattern that matches a layer applies.

    It is immutable, and equals only mappings with the same entries in the same order.
    """

    def __init__(self, numbers: Mapping[str, _Number]) -> None:
        """Copy a mapping from patterns to numbers."""
        self._numbers: dict[str, _Number] = dict(numbers)

    def __getitem__(self, pattern: str) -> _Number:
        """Return the number of a pattern."""
        return self._numbers[pattern]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the patterns."""
        return iter(self._numbers)

    def __len__(self) -> int:
        """Return the number of patterns."""
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        """Whether the other is a mapping with the same entries in the same order."""
        return isinstance(other, Mapping) and [*self.items()] == [*other.items()]

    def __hash__(self) -> int:
        """Return a hash of the entries."""
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        """Return the entries as a dict shows them."""
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
    return {name: _counted(getattr(own, name) for own in options.values()) for name in LayerOptions._fields}


def _counted(values: Iterable[float]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({count} layer{'s' * (count > 1)})" for value, count in sorted(counts.items()))

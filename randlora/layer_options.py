"""The options that may differ between the layers of an adapter, by pattern and resolved."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

Factor = float | Mapping[str, float]
"""The factor of an active adapter's update: one for all layers, or one for each by FQN. With 0 it does not act."""

_Number = TypeVar("_Number", bound=float)
_Value = TypeVar("_Value")


class ByPattern(Mapping[str, _Number]):
    """An option with a number for each pattern of layers, of which the first that matches a layer applies.

    It cannot be changed, and equals only mappings with the same entries in the same order.
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
        """Return the entries as those of a dict."""
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
    """Return the values of the layers of each r, such as their shapes."""
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

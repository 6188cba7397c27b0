"""What the state machine draws: the options of an adapter, as numbers that any of its models can take."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from randlora.bases import BasisSpec
from randlora.errors import TargetError
from tests.state_machine.models import Kind, Weight
from tests.state_machine.truth import Adapter, drawn, first_values
from tests.strategies import KINDS_AND_STREAMS

Factors = tuple[float | None, ...]
"""Factors of the first adapter, the second, and so on; ``None`` for one that is not active."""
NAMES = "a", "b", "c"
DTYPES = torch.float32, torch.float64, torch.bfloat16


@dataclass(frozen=True)
class Recipe:
    """The options of an adapter.

    Places of weights and parameters are counted round and round; r and alpha are of the first weight and of the others;
    each matrix of a stack may be apart, and no training stirs what is fresh.
    """

    places: tuple[int, ...]
    beside: tuple[int, ...] = ()
    r: tuple[int, int] = (3, 3)
    alpha: tuple[float, float] | None = None
    basis: tuple[Any, Any] = ("dense", "portable")
    seed: int = 0
    dropout: float = 0.0
    apart: bool = True
    is_fresh: bool = False

    def weights(self, kind: Kind) -> tuple[Weight, ...]:
        places = {place % len(kind.weights) for place in self.places}
        return tuple(weight for place, weight in enumerate(kind.weights) if place in places)

    def copies(self, kind: Kind) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind.others[place % len(kind.others)] for place in self.beside))

    def options(self, kind: Kind) -> dict[str, Any]:
        first, *others = (weight.fqn for weight in self.weights(kind))
        return {
            "targets": [first, *others],
            "train_also": [*self.copies(kind)] or None,
            "r": self.r[0] if len(set(self.r)) == 1 else {first: self.r[0], ".*": self.r[1]},
            "alpha": self.alpha and {first: self.alpha[0], ".*": self.alpha[1]},
            "basis": self.basis[0],
            "stream": self.basis[1],
            "seed": self.seed,
            "dropout": self.dropout,
            "in_proj": "split" if self.apart else "packed",
            "experts": "each" if self.apart else "shared",
        }

    def scales(self, kind: Kind) -> dict[str, tuple[int, float]]:
        alpha = self.alpha or tuple(20.0 * r for r in self.r)
        return {weight.fqn: (self.r[place > 0], alpha[place > 0]) for place, weight in enumerate(self.weights(kind))}

    def misfit(self, kind: Kind) -> type[TargetError] | None:
        weights = self.weights(kind)
        is_twice = not {weight.name for weight in weights}.isdisjoint(self.copies(kind))
        is_unknown = self.dropout > 0 and not all(weight.is_called for weight in weights)
        return TargetError if is_twice or is_unknown else None

    def adapter(self, kind: Kind, specs: Iterable[BasisSpec], *, own: Mapping[str, Tensor], trains: bool) -> Adapter:
        """Return the truth of a new adapter. Of the library's report only the specs of the bases are taken."""
        options, scales, weights = self.options(kind), self.scales(kind), self.weights(kind)
        bases = {}
        for spec in specs:
            assert (spec.kind, spec.stream, spec.seed) == (*self.basis, self.seed)
            shapes = [weight.matrices(options)[1] for weight in weights if scales[weight.fqn][0] == spec.r]
            dims = max(map(max, shapes)), max(map(min, shapes))
            bases[spec.r] = drawn(spec, max(spec.max_dim, dims[0]), max(spec.min_dim, dims[1]))
        values = {weight.fqn: first_values(options, weight, scales[weight.fqn][0]) for weight in weights}
        return Adapter(options, scales, bases, values, {name: own[name] for name in self.copies(kind)}, None, trains)


names = st.sampled_from([None, None, None, *NAMES])
slots = st.integers(0, 1)
maybe = st.sampled_from([None, True, False])
ranks = st.tuples(st.integers(2, 6), st.integers(2, 6)) | st.just((4, 4))
recipes = st.builds(
    Recipe,
    places=st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True).map(tuple),
    beside=st.lists(st.integers(0, 5), max_size=3, unique=True).map(tuple),
    r=ranks,
    alpha=st.none() | st.tuples(st.sampled_from([8.0, 3.5]), st.sampled_from([8.0, 20.0, 1e-9])),
    basis=st.sampled_from(KINDS_AND_STREAMS) | st.just(("dense", "torch")),  # so that some share bases
    seed=st.integers(0, 1),
    dropout=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    apart=st.booleans(),
    is_fresh=st.sampled_from([False, False, False, True]),
)
which = st.integers(0, 2)
factors = st.tuples(*[st.sampled_from([1.0, None, 0.5, -2.0, 0.0])] * len(NAMES))

"""``sparse`` and ``very_sparse``: every entry is 0, or plus or minus one number, stored as a sign in int8."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from randlora.bases import portable_stream, torch_stream
from randlora.bases.compact import Matrices
from randlora.bases.dense import DENSE
from randlora.bases.spec import KINDS, BasisSpec, Kind


def _ternary(probability: Callable[[int], float], *, depends_on_dims: bool, peft_flags: tuple[bool, bool]) -> Kind:
    """Return the kind whose entries are +1, and as often -1, with a probability that ``spec.min_dim`` may determine."""

    def draw_portable(spec: BasisSpec, max_dim: int, min_dim: int) -> Matrices:
        share = probability(spec.min_dim)
        signs = partial(portable_stream.signs, probability=share)
        return portable_stream.draw(spec, max_dim, min_dim, to_values=signs, scale=1 / math.sqrt(2 * share))

    torch_signs = partial(torch_stream.signs, probability=probability)
    return replace(
        DENSE,
        draws={"torch": partial(torch_stream.draw, draw_matrix=torch_signs), "portable": draw_portable},
        dtype=torch.int8,
        # all terms share A: a column of zeros in it is one in every update
        expected_rank=lambda spec, _, min_dim: round(min_dim * (1 - (1 - 2 * probability(spec.min_dim)) ** spec.r)),
        depends_on_dims=depends_on_dims,
        peft_flags=peft_flags,
    )


KINDS["sparse"] = _ternary(lambda _: 1 / 6, depends_on_dims=False, peft_flags=(True, False))
KINDS["very_sparse"] = _ternary(lambda m: 1 / (2 * math.sqrt(m)), depends_on_dims=True, peft_flags=(False, True))

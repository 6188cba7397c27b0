"""``dense``: every entry is a uniform random number, stored in bfloat16."""

from functools import partial

import torch

from randlora.bases import portable_stream, torch_stream
from randlora.bases.spec import KINDS, Kind, count_bases
from randlora.functional import DensePair

DENSE = KINDS["dense"] = Kind(
    draws={
        "torch": partial(torch_stream.draw, draw_matrix=torch_stream.uniform),
        "portable": partial(portable_stream.draw, to_values=portable_stream.uniform),
    },
    dtype=torch.bfloat16,
    expected_rank=lambda _spec, _max_dim, min_dim: min_dim,
    sliced=lambda spec, basis_A, basis_B, max_dim, min_dim: DensePair(
        basis_A[:, :min_dim].unsqueeze(0), basis_B[:max_dim, : count_bases(min_dim, spec.r) * spec.r]
    ),
    paired=lambda _spec, basis_A, basis_B, _max_dim, _min_dim: DensePair(basis_A, basis_B),
    peft_flags=(False, False),
)

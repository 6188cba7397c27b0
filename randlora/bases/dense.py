"""``dense``: every entry is a uniform random number, stored in bfloat16."""

from functools import partial

import torch

from randlora.bases import portable_stream, torch_stream
from randlora.bases.spec import KINDS, Kind
from randlora.functional import DensePair
from randlora.functional.region import take_spans

_since_2_12 = partial(torch_stream.uniform, rounded=torch_stream.since_2_12)
_until_2_11 = partial(torch_stream.uniform, rounded=torch_stream.until_2_11)

DENSE = KINDS["dense"] = Kind(
    draws={
        "torch": partial(torch_stream.draw, draw_matrix=_since_2_12),
        "torch-2.11": partial(torch_stream.draw, draw_matrix=_until_2_11),
        "portable": partial(portable_stream.draw, to_values=portable_stream.uniform),
    },
    dtype=torch.bfloat16,
    expected_rank=lambda _spec, _max_dim, min_dim: min_dim,
    sliced=lambda spec, basis_A, basis_B, num_bases, sides: DensePair(
        take_spans(basis_A, sides.small, 1).unsqueeze(0), take_spans(basis_B, sides.large, 0)[:, : num_bases * spec.r]
    ),
    paired=lambda _spec, basis_A, basis_B, _num_bases, _sides: DensePair(basis_A, basis_B),
    peft_flags=(False, False),
)

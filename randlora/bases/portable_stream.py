"""``stream="portable"``: the same bits on every machine, thread count, torch version and chunking.

The numbers come from NumPy's ``Philox``, a counter-based generator whose raw stream NumPy guarantees. Every row of a
basis has its own counter range, read from the start, so a longer row begins with the shorter one, and adding rows
changes no other row. Each 32-bit lane gives one entry, by integer comparisons or exact IEEE 754 float32 operations.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from randlora.bases.compact import CompactMatrix, Matrices
from randlora.bases.spec import KINDS, BasisSpec, count_bases

VERSION = 1
CHUNK_ENTRIES = 2**20
INDEX_A, INDEX_B = 0, 1

Lanes = NDArray[np.uint32]
Values = NDArray[np.generic]


def draw(
    spec: BasisSpec, max_dim: int, min_dim: int, *, to_values: Callable[[Lanes, int], Values], scale: float = 1.0
) -> Matrices:
    """Draw the part of the bases that layers of the given dims use, in chunks of rows to bound memory.

    The dims of the spec do not matter. ``to_values``, which is `uniform` or `signs`, computes the stored values from
    lanes and the number of blocks.
    """

    def draw_matrix(index: int, rows: int, columns: int, stride: int) -> CompactMatrix:
        width = math.ceil(columns / stride)
        values = torch.empty((rows, width), dtype=KINDS[spec.kind].dtype, device="cpu")
        step = max(1, CHUNK_ENTRIES // width)
        for start in range(0, rows, step):
            chunk = range(start, min(start + step, rows))
            lanes = np.stack([_row(spec.seed, index, row, width) for row in chunk])
            values[start : chunk.stop] = torch.from_numpy(to_values(lanes, stride)).to(values.dtype)
        return CompactMatrix(values, columns, float(np.float32(scale)), stride)

    (c, b), columns_B = spec.blocks or (1, 1), count_bases(min_dim, spec.r) * spec.r
    return draw_matrix(INDEX_A, spec.r, min_dim, c), draw_matrix(INDEX_B, max_dim, columns_B, b)


def _row(seed: int, index: int, row: int, width: int) -> Lanes:
    """Return the first ``width`` lanes of one row: the low half of each 64-bit word first, on any machine."""
    philox = np.random.Philox(
        key=np.array([seed, VERSION << 8 | index], dtype=np.uint64), counter=np.array([0, row, 0, 0], dtype=np.uint64)
    )
    words = philox.random_raw(math.ceil(width / 2))
    return words.astype("<u8").view("<u4")[:width]


def signs(lanes: Lanes, stride: int, *, probability: float) -> Values:  # noqa: ARG001
    """Return 1 and -1 with the given probability each, else 0."""
    threshold = round(probability * 2**32)
    high = lanes >= np.uint32(2**32 - threshold)
    return high.astype(np.int8) - (lanes < np.uint32(threshold)).astype(np.int8)


def uniform(lanes: Lanes, stride: int) -> Values:
    """Return uniform numbers, of which one in ``stride`` entries gives a mean square of 1.

    A lane's upper 24 bits are mapped to the odd multiples of 2**-24 in (-1, 1), all exact in float32.
    """
    odd = (lanes >> np.uint32(8)).astype(np.int32) * 2 + 1 - 2**24
    return odd.astype(np.float32) * np.float32(2.0**-24) * np.float32(math.sqrt(3 * stride))

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

from randlora.bases.compact import CompactMatrix
from randlora.bases.spec import BasisSpec, count_bases

VERSION = 1
CHUNK_ENTRIES = 2**20
INDEX_A, INDEX_B = 0, 1

Lanes = NDArray[np.uint32]


def draw(spec: BasisSpec, max_dim: int, min_dim: int) -> tuple[CompactMatrix, CompactMatrix]:
    """Draw the part of the bases that layers of the given dims use.

    Args:
        spec: The spec; its stream is ``portable``. Of its dims only ``min_dim`` matters, and only for ``very_sparse``.
        max_dim: Rows of B.
        min_dim: Columns of A.

    Returns:
        A, ``(r, min_dim)``, and B, ``(max_dim, num_bases·r)``.
    """
    c, b = spec.blocks or (1, 1)
    columns_B = count_bases(min_dim, spec.r) * spec.r
    return _draw_matrix(spec, INDEX_A, spec.r, min_dim, c), _draw_matrix(spec, INDEX_B, max_dim, columns_B, b)


def _draw_matrix(spec: BasisSpec, index: int, rows: int, columns: int, stride: int) -> CompactMatrix:
    if spec.kind in ("sparse", "very_sparse"):
        threshold = round(spec.probability * 2**32)
        values = _fill(spec, index, rows, columns, torch.int8, lambda lanes: _signs(lanes, threshold))
        return CompactMatrix(values, columns, float(np.float32(1 / math.sqrt(2 * spec.probability))))
    bound = np.float32(math.sqrt(3 * stride))  # uniform on ±bound in one of stride entries: mean square 1
    width = math.ceil(columns / stride)
    return CompactMatrix(
        _fill(spec, index, rows, width, torch.bfloat16, lambda lanes: _symmetric(lanes) * bound), columns, stride=stride
    )


def _fill(
    spec: BasisSpec,
    index: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    to_values: Callable[[Lanes], NDArray[np.generic]],
) -> torch.Tensor:
    """Return ``(rows, width)`` values, computed in chunks of rows to bound memory."""
    filled = torch.empty((rows, width), dtype=dtype, device="cpu")
    step = max(1, CHUNK_ENTRIES // width)
    for start in range(0, rows, step):
        chunk = range(start, min(start + step, rows))
        lanes = np.stack([_row(spec.seed, index, row, width) for row in chunk])
        filled[start : chunk.stop] = torch.from_numpy(to_values(lanes)).to(dtype)
    return filled


def _row(seed: int, index: int, row: int, width: int) -> Lanes:
    """Return the first ``width`` lanes of one row: the low half of each 64-bit word first, on any machine."""
    philox = np.random.Philox(
        key=np.array([seed, VERSION << 8 | index], dtype=np.uint64), counter=np.array([0, row, 0, 0], dtype=np.uint64)
    )
    words = philox.random_raw(math.ceil(width / 2))
    return words.astype("<u8").view("<u4")[:width]


def _signs(lanes: Lanes, threshold: int) -> NDArray[np.int8]:
    high = lanes >= np.uint32(2**32 - threshold)
    return high.astype(np.int8) - (lanes < np.uint32(threshold)).astype(np.int8)


def _symmetric(lanes: Lanes) -> NDArray[np.float32]:
    """Map a lane's upper 24 bits to the odd multiples of 2**-24 in (-1, 1), all exact in float32."""
    odd = (lanes >> np.uint32(8)).astype(np.int32) * 2 + 1 - 2**24
    return odd.astype(np.float32) * np.float32(2.0**-24)

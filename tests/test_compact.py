"""How bases are kept: no bit is lost, however many chunks of rows a matrix takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora.bases import compact
from randlora.bases.compact import CompactMatrix

ROWS = 2 * compact.CHUNK_ROWS + 3

FORMS = {
    torch.int8: torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)).sign() * 1.7,
    torch.bfloat16: torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)).bfloat16().float(),
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_matrix_is_kept_in_its_smallest_form(form: torch.dtype) -> None:
    kept = CompactMatrix.from_dense(FORMS[form])
    assert kept.values.dtype == form
    assert torch.equal(kept.to_dense(device="cpu", dtype=torch.float32), FORMS[form])


@pytest.mark.parametrize("row", [0, compact.CHUNK_ROWS - 1, compact.CHUNK_ROWS, ROWS - 1])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_number_that_a_form_cannot_hold_is_enough_to_keep_the_matrix_itself(form: torch.dtype, row: int) -> None:
    matrix = FORMS[form].clone()
    matrix[row, -1] = 1 / 3
    kept = CompactMatrix.from_dense(matrix)
    assert kept.values is matrix


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(0, 40))
def test_chunks_of_rows_are_the_rows(rows: int, columns: int, stride: int, wanted: int) -> None:
    values = torch.randn(rows, -(-columns // stride), generator=torch.Generator().manual_seed(0))
    matrix = CompactMatrix(values, columns, scale=0.5, stride=stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "CHUNK_ROWS", 3)
        chunks = [chunk.clone() for chunk in matrix.dense_chunks(min(wanted, rows))]
    assert all(len(chunk) <= 3 * stride for chunk in chunks)
    expected = matrix.to_dense(device="cpu", dtype=torch.float32)[:wanted]
    assert torch.equal(torch.cat([torch.empty(0, columns), *chunks]), expected)

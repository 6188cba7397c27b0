"""Codes in a file, written out: for every size, type and block size what tables and loops give, to the last bit."""

import tempfile
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from randlora.disk.tensor_file import read_shard
from randlora.files.quantized import StoredCodes, find_codes
from tests.quantized_checkpoints import written_out

NAME = "some.layer.weight"

sides = st.integers(1, 40) | st.sampled_from([32, 48, 64, 96])
"""Of matrices; bitsandbytes has kernels of its own for some multiples of 16."""


def saved(tensors: dict[str, Tensor], directory: Path) -> StoredCodes:
    """Put codes and what stands beside them into a file, and find them there."""
    save_file(tensors, directory / "codes.safetensors")
    return find_codes({entry.name: entry for entry in read_shard(directory / "codes.safetensors").entries})[NAME]


@given(
    shape=st.tuples(sides, sides),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([64, 128, 512]),
    is_nested=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_codes_of_4_bits_are_written_out_exactly(
    shape: tuple[int, int], quant_type: str, blocksize: int, is_nested: bool, dtype: torch.dtype, seed: int
) -> None:
    """Rows may be of any length, even or odd, and blocks may go on from row to row."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=is_nested)
    tensors = {NAME: codes, **{f"{NAME}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}
    with tempfile.TemporaryDirectory() as directory:
        found = saved(tensors, Path(directory))
        assert (found.kind, found.shape, found.dtype) == (quant_type, shape, dtype)
        assert torch.equal(found.read(), written_out(tensors)[NAME])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_codes_of_4_bits_may_be_stored_as_numbers_of_another_dtype(storage: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", quant_storage=storage)
    assert codes.dtype == storage
    tensors = {NAME: codes, **{f"{NAME}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}
    assert torch.equal(saved(tensors, tmp_path).read(), written_out(tensors)[NAME])


@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 20)), seed=st.integers(0, 9))
def test_codes_of_8_bits_are_written_out_exactly(shape: tuple[int, int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=draw)
    tensors = {NAME: codes, "some.layer.SCB": torch.rand(shape[0], generator=draw)}
    with tempfile.TemporaryDirectory() as directory:
        found = saved(tensors, Path(directory))
        assert (found.kind, found.shape, found.dtype) == ("8 bits", shape, None)
        assert torch.equal(found.read(), written_out(tensors)[NAME])

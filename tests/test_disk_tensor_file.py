"""Safetensors files: read as the package reads them, into new memory, and written byte for byte as it writes them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from randlora.disk import formats
from randlora.disk.formats import (
    TORCH_DTYPES,
    Entry,
    Planned,
    bytes_of,
    is_equal,
    open_shard,
    read_pieces,
    read_shard,
    read_tensor,
    write_tensor_file,
)
from randlora.errors import CheckpointError
from tests.kit import all_bits

DTYPES = [*TORCH_DTYPES.values()]


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """Read in pieces of a few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE_BYTES", 16)
        yield


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Draw tensors of any dtype and shape, empty ones and scalars among them, with any bits."""
    tensor = torch.zeros(draw(st.lists(st.integers(0, 5), max_size=3)), dtype=draw(st.sampled_from(DTYPES)))
    raw = draw(st.binary(min_size=tensor.nbytes, max_size=tensor.nbytes))
    values = [byte % 2 if tensor.dtype == torch.bool else byte for byte in raw]
    bytes_of(tensor).copy_(torch.tensor(values, dtype=torch.uint8))
    return tensor


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda name: name != "__metadata__"
)


@given(st.dictionaries(names, tensors(), min_size=1, max_size=6), st.dictionaries(names, names, max_size=1))
def test_every_tensor_is_read_and_written_as_safetensors_does(
    held: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    wrote: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        path, ours = Path(directory, "file"), Path(directory, "ours")
        save_file(held, path, metadata or None)
        with open_shard(path) as (shard, raw):
            assert shard.metadata == metadata
            found = {entry.name: read_tensor(entry, raw) for entry in reversed(shard.entries)}
        again = {entry.name: read_tensor(entry) for entry in read_shard(path).entries}
        assert all_bits(again) == all_bits(found) == all_bits(load_file(path)) == all_bits(held)
        plans = [
            Planned(name, tensor.dtype, tuple(tensor.shape), partial(tensor.flatten().split, 1))
            for name, tensor in held.items()
        ]
        write_tensor_file(ours, plans, metadata, lambda count, _: wrote.append(count))
        assert ours.read_bytes() == path.read_bytes()
    assert sum(wrote) == sum(tensor.nbytes for tensor in held.values())


@given(tensors(), st.data())
def test_a_copy_is_told_from_what_differs_in_one_bit_or_in_kind(tensor: Tensor, data: st.DataObject) -> None:
    changed, six = tensor.clone(), torch.arange(6)
    if tensor.nbytes:
        bits = [1] if tensor.dtype == torch.bool else [1 << bit for bit in range(8)]
        bytes_of(changed)[data.draw(st.integers(0, tensor.nbytes - 1))] ^= data.draw(st.sampled_from(bits))
    pairs = [(tensor, tensor.clone(), True), (tensor, changed, not tensor.nbytes)]
    others = six.view(torch.float64), six.reshape(2, 3), torch.arange(5), torch.arange(7)
    for first, second, same in [*pairs, *((six, other.clone(), False) for other in others)]:
        with tempfile.TemporaryDirectory() as directory:
            save_file({"a": first, "b": second}, Path(directory, "file"))
            with open_shard(Path(directory, "file")) as (shard, raw):
                entries = {entry.name: entry for entry in shard.entries}
                assert is_equal(entries["b"], read_tensor(entries["a"], raw), raw) == same


def test_what_is_read_is_aligned_and_outlives_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3, dtype=torch.int8), "b": torch.arange(5.0)}, tmp_path / "file")
    with open_shard(tmp_path / "file") as (shard, raw):
        found = {entry.name: read_tensor(entry, raw) for entry in shard.entries}
    os.truncate(tmp_path / "file", 0)
    assert (found["a"].tolist(), found["b"].tolist()) == ([0, 1, 2], [0, 1, 2, 3, 4])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    reads: list[Callable[[Entry, FileIO], object]] = [read_tensor, lambda *read: [*read_pieces(*read)]]
    for read in reads:
        path = tmp_path / "file"
        save_file({"a": torch.zeros(20_000), "b": torch.zeros(20_000)}, path)
        with open_shard(path) as (shard, raw):
            first, second = shard.entries
            read(first, raw)
            os.truncate(path, path.stat().st_size // 2)
            with pytest.raises(CheckpointError, match="ends within b: it was truncated while it was being read"):
                read(second, raw)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that is cut anywhere; but not what may not be read, and not for an error of the caller."""
    path = tmp_path / "file"
    save_file({"a.weight": torch.ones(8, 4), "b.weight": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    cut = [whole[:length] for length in range(len(whole))]
    for contents in (b"\0" * 8, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", *cut):
        path.write_bytes(contents)
        with pytest.raises(CheckpointError, match=f"{path} is truncated or damaged"):
            read_shard(path)
    path.write_bytes(whole)
    with pytest.raises(KeyError), open_shard(path):
        raise KeyError("a")

    monkeypatch.setattr("os.open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match=r"^cannot read .*file \(Permission denied\)$"):
        read_shard(path)


def test_a_large_tensor_is_read_in_pieces_of_bounded_size_and_written_after_the_one_before(tmp_path: Path) -> None:
    tensor = torch.randn(3, formats.PIECE_BYTES // 4 + 1)
    save_file({"x": tensor}, tmp_path / "file")
    (entry,) = read_shard(tmp_path / "file").entries
    pieces = [piece.clone() for piece in read_pieces(entry)]
    assert max(piece.nbytes for piece in pieces) <= formats.PIECE_BYTES < tensor.nbytes
    assert torch.equal(torch.cat(pieces).reshape(tensor.shape), tensor)
    asked: list[str] = []

    def ask(name: str) -> Iterator[Tensor]:
        asked.append(name)
        yield torch.ones(2)

    plans = [Planned(name, torch.float32, (2,), partial(ask, name)) for name in "bca"]
    write_tensor_file(tmp_path / "x", plans, {}, lambda _, name: asked.append(f"wrote {name}"))
    assert asked == ["a", "wrote a", "b", "wrote b", "c", "wrote c"]

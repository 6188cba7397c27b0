"""Reading safetensors piece by piece: what safetensors itself reads, in memory of its own, and copies told apart."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from randlora.checkpoint import tensors_file
from randlora.checkpoint.tensors_file import TensorsFile, as_bytes, open_tensors
from randlora.errors import CheckpointError
from tests.checkpoint_files import all_bits

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)
CHUNK = 16


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Let a few bytes take several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors_file, "CHUNK_BYTES", CHUNK)
        yield


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Draw tensors of any dtype and shape, empty ones and scalars among them, with any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    tensor = torch.zeros(shape, dtype=dtype)
    size = tensor.numel() * tensor.element_size()
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte % 2 for byte in raw)
    as_bytes(tensor)[:] = list(raw)
    return tensor


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda name: name != "__metadata__")


@given(st.dictionaries(names, tensors(), min_size=1, max_size=5), st.none() | st.dictionaries(names, names, max_size=2))
def test_every_tensor_is_what_safetensors_reads(written: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        save_file(written, path, metadata)
        with open_tensors(path) as file:
            assert list(file.entries) == sorted(written)
            assert file.metadata == (metadata or {})
            found = {key: file.read(key) for key in reversed(file.entries)}
        assert all_bits(found) == all_bits(load_file(path)) == all_bits(written)


@given(tensors(), st.data())
def test_a_copy_is_told_from_what_differs_in_one_bit(tensor: Tensor, data: st.DataObject) -> None:
    other = tensor.clone()
    size = len(as_bytes(tensor))
    if size:
        bits = [1] if tensor.dtype == torch.bool else [1 << bit for bit in range(8)]
        as_bytes(other)[data.draw(st.integers(0, size - 1))] ^= data.draw(st.sampled_from(bits))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        save_file({"a": tensor, "b": tensor.clone(), "c": other}, path)
        with open_tensors(path) as file:
            first = file.read("a")
            assert file.repeats("b", first)
            assert file.repeats("c", first) == (not size)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_copy_is_compared_to_its_last_byte(length: int, tmp_path: Path) -> None:
    tensor = torch.arange(length, dtype=torch.uint8)
    for place in range(length):
        other = tensor.clone()
        other[place] ^= 0x80
        save_file({"a": tensor, "b": other}, tmp_path / "file")
        with open_tensors(tmp_path / "file") as file:
            assert not file.repeats("b", file.read("a")), place


OTHERS = {
    "dtype": torch.arange(6, dtype=torch.int64).view(torch.float64),
    "shape": torch.arange(6).reshape(2, 3),
    "shorter": torch.arange(5),
    "longer": torch.arange(7),
    "zero of the other sign": torch.tensor([-0.0]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_copy_is_told_from_one_of_another_kind(other: Tensor, tmp_path: Path) -> None:
    tensor = torch.tensor([0.0]) if len(other) == 1 else torch.arange(6)
    save_file({"a": tensor, "b": other}, tmp_path / "file")
    with open_tensors(tmp_path / "file") as file:
        assert not file.repeats("b", file.read("a"))


def test_a_copy_of_what_is_no_number_is_a_copy(tmp_path: Path) -> None:
    nan = torch.full((9,), float("nan"))
    save_file({"a": nan, "b": nan.clone()}, tmp_path / "file")
    with open_tensors(tmp_path / "file") as file:
        assert file.repeats("b", file.read("a"))


def test_what_is_read_is_aligned_and_outlives_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3, dtype=torch.int8), "b": torch.arange(5.0)}, tmp_path / "file")
    with open_tensors(tmp_path / "file") as file:
        found = [file.read(key) for key in file.entries]
    with (tmp_path / "file").open("r+b") as raw:
        raw.truncate(0)
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found)


def read_both(path: Path, second: Callable[[TensorsFile, Tensor], object]) -> None:
    """Read one tensor, cut the file short behind it, and go on to the other."""
    with open_tensors(path) as file:
        first = file.read("a")
        with path.open("r+b") as raw:
            raw.truncate(path.stat().st_size // 2)
        second(file, first)


@pytest.mark.parametrize(
    "second", [lambda file, _: file.read("b"), lambda file, first: file.repeats("b", first)], ids=["read", "held"]
)
def test_a_file_that_shrinks_while_it_is_read_is_called_truncated(
    second: Callable[[TensorsFile, Tensor], object], tmp_path: Path
) -> None:
    save_file({"a": torch.zeros(20_000), "b": torch.zeros(20_000)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"is truncated or damaged \(it has become shorter while it was read\)"):
        read_both(tmp_path / "file", second)


@pytest.mark.parametrize("contents", [b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"], ids=repr)
def test_what_is_no_safetensors_file_is_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(contents)
    with pytest.raises(CheckpointError, match="is truncated or damaged"), open_tensors(tmp_path / "file"):
        pass


def test_an_error_of_the_caller_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "file")
    with pytest.raises(KeyError), open_tensors(tmp_path / "file"):
        raise KeyError("a")

"""Writing tensor by tensor gives the bytes that the library writes from tensors in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from randlora.checkpoint.tensors_file import DTYPES
from randlora.errors import CheckpointError
from randlora.files import tensor_file
from randlora.files.model_directory import SINGLE_FILE, read_model_directory
from randlora.files.tensor_file import Planned, read_pieces, read_tensor, write_tensor_file

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def planned(name: str, tensor: Tensor) -> Planned:
    """Plan a tensor in as many pieces as it has numbers."""
    return Planned(name, tensor.dtype, tuple(tensor.shape), lambda: iter(tensor.flatten().split(1)))


@given(held=st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES.values())), shapes), min_size=1, max_size=6))
def test_the_file_is_byte_for_byte_the_librarys(
    held: dict[str, tuple[torch.dtype, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("model")
    held.pop("__metadata__", None)
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape) for name, (dtype, shape) in held.items()
    }
    wrote: list[int] = []
    write_tensor_file(
        directory / "ours",
        [planned(name, tensor) for name, tensor in tensors.items()],
        {"format": "pt"},
        lambda count, _: wrote.append(count),
    )
    save_file(tensors, directory / "theirs", {"format": "pt"})
    assert (directory / "ours").read_bytes() == (directory / "theirs").read_bytes()
    assert sum(wrote) == sum(tensor.nbytes for tensor in tensors.values())


def test_without_metadata_there_is_none(tmp_path: Path) -> None:
    write_tensor_file(tmp_path / "ours", [planned("x", torch.ones(3))], {}, lambda *_: None)
    save_file({"x": torch.ones(3)}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_tensor_is_read_as_it_was_written(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
    save_file({"before": torch.ones(3), "x": tensor, "y": torch.ones(2, dtype=torch.uint8)}, tmp_path / SINGLE_FILE)
    read = read_tensor(read_model_directory(tmp_path).entries["x"])
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(read.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_large_tensor_is_read_in_pieces_of_bounded_size(tmp_path: Path) -> None:
    tensor = torch.randn(3, tensor_file.CHUNK_BYTES // 4 + 1)
    save_file({"x": tensor}, tmp_path / SINGLE_FILE)
    entry = read_model_directory(tmp_path).entries["x"]
    pieces = [piece.clone() for piece in read_pieces(entry)]
    assert max(piece.nbytes for piece in pieces) <= tensor_file.CHUNK_BYTES < tensor.nbytes
    assert torch.equal(torch.cat(pieces).reshape(tensor.shape), tensor)


def test_a_file_that_is_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(8)}, tmp_path / SINGLE_FILE)
    entry = read_model_directory(tmp_path).entries["x"]
    (tmp_path / SINGLE_FILE).write_bytes((tmp_path / SINGLE_FILE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends within x"):
        read_tensor(entry)


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_tensor_file(tmp_path / "x", [planned("x", torch.ones(3))], {}, lambda *_: None)
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_tensors_are_asked_for_one_after_the_other(tmp_path: Path) -> None:
    asked: list[str] = []

    def pieces(name: str) -> Iterator[Tensor]:
        asked.append(name)
        yield torch.ones(2)

    plans = [Planned(name, torch.float32, (2,), lambda name=name: pieces(name)) for name in "bca"]  # type: ignore[misc]
    write_tensor_file(tmp_path / "x", plans, {}, lambda _, name: asked.append(f"wrote {name}"))
    assert asked == ["a", "wrote a", "b", "wrote b", "c", "wrote c"]

"""Reading headers: what they say is what the library of that name says, and what is wrong is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from randlora.disk.tensor_file import TORCH_DTYPES
from randlora.errors import CheckpointError
from randlora.files.model_directory import INDEX_FILE, SINGLE_FILE, read_model_directory
from tests.model_directories import contents, save_model
from tests.models import BERT, LLAMA, RealModel, every_transformers_model

both_layouts = pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])


@every_transformers_model
@both_layouts
def test_the_entries_are_the_tensors_of_the_files(kind: RealModel, is_sharded: bool, tmp_path: Path) -> None:
    directory = read_model_directory(save_model(kind, tmp_path, is_sharded=is_sharded))
    held = {name: (path, tensor) for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert directory.entries.keys() == held.keys()
    for name, (path, tensor) in held.items():
        entry = directory.entries[name]
        assert (entry.file, entry.dtype, entry.shape) == (path, tensor.dtype, tuple(tensor.shape))
        raw = path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert raw == tensor.flatten().view(torch.uint8).numpy().tobytes()
    assert directory.nbytes == sum(tensor.nbytes for _, tensor in held.values())
    assert directory.model_type == kind.name
    assert (directory.index is not None) == is_sharded == (len(directory.shards) > 1)


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_every_dtype_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3, 2, dtype=dtype)}, tmp_path / SINGLE_FILE, {"origin": "a test"})
    (shard,) = read_model_directory(tmp_path).shards
    (entry,) = shard.entries
    assert (entry.dtype, entry.shape, entry.nbytes) == (dtype, (3, 2), 6 * dtype.itemsize)
    assert shard.metadata == {"origin": "a test"}
    with safe_open(tmp_path / SINGLE_FILE, framework="pt") as file:
        assert TORCH_DTYPES[file.get_slice("x").get_dtype()] == dtype


def cut(path: Path) -> None:
    """Take the last byte off a file."""
    path.write_bytes(path.read_bytes()[:-1])


def lie(directory: Path) -> None:
    """Let the index name a tensor that its file has not."""
    edit_index(directory, lambda weight_map: {**weight_map, "no.such.weight": next(iter(weight_map.values()))})


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    (directory / INDEX_FILE).write_text(json.dumps({**index, "weight_map": edit(index["weight_map"])}), "utf-8")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def repeat(directory: Path) -> None:
    """Hold one tensor in two files."""
    first, second, *_ = shards(directory)
    held = load_file(first)
    save_file({**load_file(second), next(iter(held)): next(iter(held.values()))}, second)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(shards(path)[1]), "00002-of-.* is truncated or damaged .*get an undamaged copy"),
        (lambda path: shards(path)[0].unlink(), "there is no .*00001-of-.*, which the index names"),
        (lie, "lacks no.such.weight, which the index says it holds"),
        (repeat, r" is in model-00001.* and in model-00002"),
        (lambda path: (path / INDEX_FILE).write_text("{"), "cannot read .*index.json"),
        (lambda path: (path / INDEX_FILE).write_text("[1]"), "not a JSON object"),
        (lambda path: (path / INDEX_FILE).write_text("{}"), "index.json is damaged: expected 'weight_map'"),
        (lambda path: edit_index(path, lambda _: []), "index.json is damaged"),
        (lambda path: edit_index(path, lambda _: {"x": "../x.safetensors"}), "index.json is damaged"),
        (lambda path: (path / "config.json").write_text("{"), "cannot read .*config.json"),
    ],
    ids=["cut", "missing", "lie", "twice", "no-json", "list", "empty", "list-of-names", "elsewhere", "config"],
)
def test_what_is_wrong_with_a_sharded_checkpoint_is_named(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    save_model(BERT, tmp_path, is_sharded=True)
    damage(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_model_directory(tmp_path)
    assert contents(tmp_path) == before


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    save_model(BERT, tmp_path, is_sharded=True)
    cut(shards(tmp_path)[0])
    shards(tmp_path)[1].unlink()
    with pytest.raises(CheckpointError, match=r"2 problems:(?s:.*)00001-of.*(?s:.*)00002-of"):
        read_model_directory(tmp_path)


@given(length=st.integers(0, 400))
def test_a_file_cut_anywhere_is_refused(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("model")
    path = directory / SINGLE_FILE
    save_file({"a.weight": torch.ones(8, 4), "b.weight": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: length % len(whole)])
    with pytest.raises(CheckpointError, match=re.escape(f"{path} is truncated or damaged")):
        read_model_directory(directory)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin", "config.json"], r"pickled weights \(pytorch_model.bin\).*write it with save_pretrained"),
        (["model-q4.gguf"], "in the GGUF format"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter, not a model"),
        (["config.json"], "holds no weights"),
    ],
    ids=["pickled", "GGUF", "adapter", "config only"],
)
def test_what_a_directory_holds_in_place_of_a_checkpoint_is_said(
    names: list[str], message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{message}.*expected a directory with model.safetensors"):
        read_model_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("nothing", r"no such directory: .*nothing"), ("file", "file is not a directory")]
)
def test_a_path_that_is_no_directory_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        read_model_directory(tmp_path / name)


def test_a_dtype_that_is_not_known_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(CheckpointError, match=r"x in .* has dtype F4"):
        read_model_directory(tmp_path)


def test_without_config_there_is_no_kind(tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path)
    (tmp_path / "config.json").unlink()
    directory = read_model_directory(tmp_path)
    assert (directory.config, directory.model_type, directory.architecture) == ({}, None, "")

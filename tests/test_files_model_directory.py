"""A model's directory: headers say what safetensors says, what is wrong is named, and what goes along with weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import randlora
from randlora.errors import CheckpointError
from randlora.files.model_directory import INDEX_FILE, SINGLE_FILE, copy_config, find_companions, read_model_directory
from tests.hostile_files import SPECIAL, sparse
from tests.model_directories import contents, save_adapter, save_model
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


CARRIED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "README.md"),
    *("1_Pooling/config.json", "chat_template.jinja", "modeling_own.py"),
}
LEFT_OUT = {
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tf_model.h5"),
    *("onnx/model.onnx", "original/consolidated.00.pth"),
}
PASSED_OVER = {
    ".gitattributes",
    ".cache/x",
    "my-adapter/adapter_config.json",
    "my-adapter/notes.txt",
    "adapter_config.json",
}


def test_what_a_model_needs_goes_along_and_weights_in_other_forms_do_not(tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path, is_sharded=True)
    for name in CARRIED | LEFT_OUT | PASSED_OVER:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("x", encoding="utf-8")
    companions = find_companions(read_model_directory(tmp_path))
    assert {path.as_posix() for path in companions.carried} == CARRIED
    assert {path.as_posix() for path in companions.left_out} == LEFT_OUT


@pytest.mark.parametrize("snapshot", ["snapshot", "snapshots/0123abc"])
def test_files_behind_links_go_along_as_in_the_hubs_cache(snapshot: str, tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path / "blobs")
    (tmp_path / snapshot).mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / snapshot / path.name).symlink_to(path)
    (tmp_path / snapshot / "again.json").symlink_to("config.json")
    (tmp_path / "elsewhere").symlink_to(tmp_path / snapshot)
    companions = find_companions(read_model_directory(tmp_path / "elsewhere"))
    assert {path.name for path in companions.carried} == {"again.json", "config.json", "generation_config.json"}


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "deep/notes.txt"])
def test_a_link_to_a_file_elsewhere_is_not_copied_and_a_merge_says_so_before_it_writes(
    name: str, tmp_path: Path
) -> None:
    base, adapter = save_model(LLAMA, tmp_path / "base"), save_adapter(LLAMA, tmp_path / "adapter")
    link, secret = base / name, tmp_path / "secret"
    secret.write_bytes((base / "config.json").read_bytes())
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret, outside of the directory"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_dtype_is_put_wherever_the_config_names_one(field: str, tmp_path: Path) -> None:
    config = {
        field: "float32",
        "text_config": {field: "float32", "dtype_of_norms": "x"},
        "vision_config": {field: None},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_config(tmp_path / "config.json", tmp_path / "copy.json", torch.bfloat16)
    written = json.loads((tmp_path / "copy.json").read_text(encoding="utf-8"))
    inner = {field: "bfloat16", "dtype_of_norms": "x"}
    assert written == {field: "bfloat16", "text_config": inner, "vision_config": {field: None}}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_not_copied_and_a_merge_says_so_before_it_writes(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    base, adapter = save_model(LLAMA, tmp_path / "base"), save_adapter(LLAMA, tmp_path / "adapter")
    make(base / "tokenizer.json")
    if (base / "tokenizer.json").is_dir() and not (base / "tokenizer.json").is_symlink():
        (base / "tokenizer.json" / "more").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="cannot copy the files of"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_file_in_place_of_a_models_file_is_refused(
    name: str, make: Callable[[Path], object], tmp_path: Path
) -> None:
    base, adapter = save_model(LLAMA, tmp_path / "base"), save_adapter(LLAMA, tmp_path / "adapter")
    if name.endswith("index.json"):
        (base / "model.safetensors").unlink()
    (base / name).unlink(missing_ok=True)
    make(base / name)
    calls: tuple[Callable[[], object], ...] = (
        lambda: randlora.files.plan(base),
        lambda: randlora.files.merge(adapter, tmp_path / "out", base=base),
    )
    for call in calls:
        with pytest.raises(CheckpointError):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_file_as_large_as_weights_is_left_out(tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path)
    sparse(2**30)(tmp_path / "vocabulary")
    sparse(2**30 + 1)(tmp_path / "weights-in-a-new-format")
    companions = find_companions(read_model_directory(tmp_path))
    assert {path.name for path in companions.left_out} == {"weights-in-a-new-format"}
    assert Path("vocabulary") in companions.carried


def test_json_of_a_model_that_is_too_large_is_refused(tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path)
    sparse(3 * 2**30)(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json has 3,221,225,472 bytes, expected at most"):
        read_model_directory(tmp_path)

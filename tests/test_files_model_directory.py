"""A model's directory: headers say what safetensors says, what is wrong is named, and what goes along with weights."""

import json
import re
import shutil
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
from tests.model_directories import save_adapter, save_model
from tests.models import BERT, LLAMA


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def cut_and_lose(directory: Path) -> None:
    first, second, *_ = shards(directory)
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    (directory / INDEX_FILE).write_text(json.dumps({**index, "weight_map": edit(index["weight_map"])}), "utf-8")


def repeat(directory: Path) -> None:
    """Hold one tensor in two files."""
    first, second, *_ = shards(directory)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            cut_and_lose,
            "2 problems:(?s:.*)00001-of-.* is truncated or damaged .*undamaged(?s:.*)there is no .*00002-of",
        ),
        (
            lambda path: edit_index(path, lambda held: {**held, "no.such.weight": next(iter(held.values()))}),
            "lacks no.such.weight, which the index says it holds",
        ),
        (repeat, r" is in model-00001.* and in model-00002"),
        (lambda path: (path / INDEX_FILE).write_text("{"), "cannot read .*index.json"),
        (lambda path: (path / INDEX_FILE).write_text("[1]"), "not a JSON object"),
        (lambda path: (path / INDEX_FILE).write_text("{}"), "index.json is damaged: expected 'weight_map'"),
        (lambda path: edit_index(path, lambda _: []), "index.json is damaged"),
        (lambda path: edit_index(path, lambda _: {"x": "../x.safetensors"}), "index.json is damaged"),
        (lambda path: (path / "config.json").write_text("{"), "cannot read .*config.json"),
        (
            lambda path: sparse(3 * 2**30)(path / "config.json"),
            r"config\.json has 3,221,225,472 bytes, expected at most",
        ),
    ],
    ids=["cut", "lie", "twice", "no-json", "list", "empty", "list-of-names", "elsewhere", "config", "large"],
)
def test_all_that_is_wrong_with_a_sharded_checkpoint_is_named(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    save_model(BERT, tmp_path, is_sharded=True)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_model_directory(tmp_path)


@given(length=st.integers(0, 400))
def test_a_file_cut_anywhere_is_refused(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("model") / SINGLE_FILE
    save_file({"a.weight": torch.ones(8, 4), "b.weight": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: length % len(whole)])
    with pytest.raises(CheckpointError, match=re.escape(f"{path} is truncated or damaged")):
        read_model_directory(path.parent)


HEADER = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"pytorch_model.bin": b"", "config.json": b""},
            r"pickled weights \(pytorch_model.bin\).*with save_pretrained",
        ),
        ({"model-q4.gguf": b""}, "in the GGUF format"),
        ({"adapter_config.json": b"", "adapter_model.safetensors": b""}, "holds an adapter, not a model"),
        ({"config.json": b""}, "holds no weights.*expected a directory with model.safetensors"),
        ({SINGLE_FILE: len(HEADER).to_bytes(8, "little") + HEADER + bytes(2)}, "x in .* has dtype F4"),
    ],
    ids=["pickled", "GGUF", "adapter", "config only", "dtype"],
)
def test_what_a_directory_holds_in_place_of_a_checkpoint_is_said(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    places = {tmp_path: message, tmp_path / "no": "no such directory: .*no", tmp_path / name: "is not a directory"}
    for path, said in places.items():
        with pytest.raises(CheckpointError, match=said):
            read_model_directory(path)


CARRIED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "README.md"),
    *("1_Pooling/config.json", "chat_template.jinja", "modeling_own.py", "vocabulary"),
}
LEFT_OUT = {
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tf_model.h5"),
    *("onnx/model.onnx", "original/consolidated.00.pth", "weights-in-a-new-format"),
}
PASSED_OVER = {
    *(".gitattributes", ".cache/x", "my-adapter/adapter_config.json", "my-adapter/notes.txt", "adapter_config.json")
}


def test_what_a_model_needs_goes_along_and_weights_in_other_forms_do_not(tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path, is_sharded=True)
    sparse(2**30)(tmp_path / "vocabulary")
    sparse(2**30 + 1)(tmp_path / "weights-in-a-new-format")  # as large as weights
    for path in (tmp_path / name for name in CARRIED | LEFT_OUT | PASSED_OVER):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("x", encoding="utf-8")
    companions = find_companions(read_model_directory(tmp_path))
    assert {path.as_posix() for path in companions.carried} == CARRIED
    assert {path.as_posix() for path in companions.left_out} == LEFT_OUT


def test_files_behind_links_go_along_as_in_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in save_model(LLAMA, tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "again.json").symlink_to("config.json")
    (tmp_path / "elsewhere").symlink_to(snapshot)
    companions = find_companions(read_model_directory(tmp_path / "elsewhere"))
    assert {path.name for path in companions.carried} == {"again.json", "config.json", "generation_config.json"}


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "deep/notes.txt"])
def test_a_link_to_a_file_elsewhere_is_not_copied_and_a_merge_says_so_before_it_writes(
    name: str, tmp_path: Path
) -> None:
    base, adapter = save_model(LLAMA, tmp_path / "base"), save_adapter(LLAMA, tmp_path / "adapter")
    link, secret = base / name, shutil.copy(base / "config.json", tmp_path / "secret")
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret, outside of the directory"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_refused_before_anything_is_written(make: Callable[[Path], object], tmp_path: Path) -> None:
    sound, adapter = save_model(LLAMA, tmp_path / "sound"), save_adapter(LLAMA, tmp_path / "adapter")
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"):
        base = Path(shutil.copytree(sound, tmp_path / "base"))
        if name.endswith("index.json"):
            (base / "model.safetensors").unlink()
        (base / name).unlink(missing_ok=True)
        make(base / name)
        if (base / name).is_dir() and not (base / name).is_symlink():
            (base / name / "more").symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match="cannot copy the files of" if name == "tokenizer.json" else None):
            randlora.files.merge(adapter, tmp_path / "out", base=base)
        if name != "tokenizer.json":
            with pytest.raises(CheckpointError):
                randlora.files.plan(base)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "sound"]
        shutil.rmtree(base)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_dtype_is_put_wherever_the_config_names_one(field: str, tmp_path: Path) -> None:
    text, vision = {field: "float32", "dtype_of_norms": "x"}, {field: None}
    config = {field: "float32", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_config(tmp_path / "config.json", tmp_path / "copy.json", torch.bfloat16)
    written = json.loads((tmp_path / "copy.json").read_text(encoding="utf-8"))
    assert written == {field: "bfloat16", "text_config": {**text, field: "bfloat16"}, "vision_config": vision}

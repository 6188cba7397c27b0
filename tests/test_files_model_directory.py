"""A model's directory: headers say what safetensors says, what is wrong is named, and what goes along with weights."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
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


def cut_and_lose(directory: Path) -> None:
    first, second, *_ = sorted(directory.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()


def repeat(directory: Path) -> None:
    """Hold one tensor in two files."""
    first, second, *_ = sorted(directory.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)


def index(edit: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        held = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        (directory / INDEX_FILE).write_text(json.dumps({**held, "weight_map": edit(held["weight_map"])}), "utf-8")

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (
        cut_and_lose,
        "2 problems:(?s:.*)00001-.* is truncated or damaged .*undamaged(?s:.*)there is no .*00002-of",
    ),
    "lie": (
        index(lambda held: {**held, "no.such.weight": next(iter(held.values()))}),
        "lacks no.such.weight, which the index says it holds",
    ),
    "twice": (repeat, r" is in model-00001.* and in model-00002"),
    "no-json": (lambda path: (path / INDEX_FILE).write_text("{"), "cannot read .*index.json"),
    "list": (lambda path: (path / INDEX_FILE).write_text("[1]"), "not a JSON object"),
    "empty": (lambda path: (path / INDEX_FILE).write_text("{}"), "index.json is damaged: expected 'weight_map'"),
    "names": (index(lambda _: []), "index.json is damaged"),
    "elsewhere": (index(lambda _: {"x": "../x.safetensors"}), "index.json is damaged"),
    "config": (lambda path: (path / "config.json").write_text("{"), "cannot read .*config.json"),
    "large": (lambda path: sparse(3 * 2**30)(path / "config.json"), "3,221,225,472 bytes, expected at most"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
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
INSTEAD: dict[str, Mapping[str, bytes]] = {
    r"pickled weights \(pytorch_model.bin\).*with save_pretrained": {"pytorch_model.bin": b"", "config.json": b""},
    "in the GGUF format": {"model-q4.gguf": b""},
    "holds an adapter, not a model": {"adapter_config.json": b"", "adapter_model.safetensors": b""},
    "holds no weights.*expected a directory with model.safetensors": {"config.json": b""},
    "x in .* has dtype F4": {SINGLE_FILE: len(HEADER).to_bytes(8, "little") + HEADER + bytes(2)},
}


@pytest.mark.parametrize(("message", "files"), INSTEAD.items())
def test_what_a_directory_holds_in_place_of_a_checkpoint_is_said(
    message: str, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    places = {tmp_path: message, tmp_path / "no": "no such directory: .*no", tmp_path / name: "is not a directory"}
    for path, said in places.items():
        with pytest.raises(CheckpointError, match=said):
            read_model_directory(path)


CARRIED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "README.md"),
    *("1_Pooling/config.json", "chat_template.jinja", "modeling_own.py", "vocabulary", "again.json"),
}
LEFT_OUT = {
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "tf_model.h5"),
    *("onnx/model.onnx", "original/consolidated.00.pth", "weights-in-a-new-format"),
}
PASSED_OVER = {
    *(".gitattributes", ".cache/x", "my-adapter/adapter_config.json", "my-adapter/notes.txt", "adapter_config.json")
}


def test_what_a_model_needs_goes_along_and_weights_in_other_forms_do_not(tmp_path: Path) -> None:
    """As files, and behind links, as in the cache of the Hub's client."""
    model, snapshot = save_model(LLAMA, tmp_path / "model", is_sharded=True), tmp_path / "snapshots" / "0123abc"
    sparse(2**30)(model / "vocabulary")
    sparse(2**30 + 1)(model / "weights-in-a-new-format")  # as large as weights
    (model / "again.json").symlink_to("config.json")
    for path in (model / name for name in CARRIED | LEFT_OUT | PASSED_OVER):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("x", encoding="utf-8")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(path for path in model.rglob("*") if path.is_file()):
        link, blob = snapshot / path.relative_to(model), tmp_path / "blobs" / str(number)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, blob)
        link.symlink_to("config.json" if path.is_symlink() else blob)
    (tmp_path / "elsewhere").symlink_to(snapshot)
    for place in (model, tmp_path / "elsewhere"):
        companions = find_companions(read_model_directory(place))
        assert {path.as_posix() for path in companions.carried} == CARRIED
        assert {path.as_posix() for path in companions.left_out} == LEFT_OUT


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


def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sound, adapter = save_model(LLAMA, tmp_path / "sound"), save_adapter(LLAMA, tmp_path / "adapter")
    for kind, make in SPECIAL.items():
        for name in ("config.json", SINGLE_FILE, INDEX_FILE, "tokenizer.json"):
            base, is_copied = Path(shutil.copytree(sound, tmp_path / "base")), name == "tokenizer.json"
            if name == INDEX_FILE:
                (base / SINGLE_FILE).unlink()
            (base / name).unlink(missing_ok=True)
            make(base / name)
            if kind == "directory":
                (base / name / "more").symlink_to("/dev/zero")
            with pytest.raises(CheckpointError, match="cannot copy the files of" if is_copied else None):
                randlora.files.merge(adapter, tmp_path / "out", base=base)
            if not is_copied:
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

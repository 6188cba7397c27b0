"""What goes along with a checkpoint's weights, and what does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import randlora
from randlora.errors import CheckpointError
from randlora.files.model_directory import copy_config, find_companions, read_model_directory
from tests.hostile_files import SPECIAL, sparse
from tests.model_directories import save_adapter, save_model
from tests.models import LLAMA

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

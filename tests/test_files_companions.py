"""What goes along with a checkpoint's weights, and what does not."""

import json
from pathlib import Path

import pytest
import torch

from randlora.files.model_directory import copy_config, find_companions, read_model_directory
from tests.model_directories import save_model
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


def test_files_behind_links_go_along_as_in_the_hubs_cache(tmp_path: Path) -> None:
    save_model(LLAMA, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    companions = find_companions(read_model_directory(tmp_path / "snapshot"))
    assert {path.name for path in companions.carried} == {"config.json", "generation_config.json"}


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

"""What can go wrong with a merge into a quantized checkpoint leaves nothing half-written, and is said."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import randlora
from randlora.disk.tensor_file import Planned, header_bytes
from randlora.errors import CheckpointError, MergeError, how_to_install
from randlora.layers import bnb_codes
from tests.model_directories import contents, save_adapter
from tests.models import LLAMA
from tests.quantized_checkpoints import quantize, stored, written_out


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    base = quantize(LLAMA, "nf4 twice", tmp_path / "base", is_sharded=True)
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    before = contents(tmp_path)
    with pytest.raises(MergeError, match=r"_proj.weight has values too large for torch.float16"):
        randlora.files.merge(base, {adapter: 1e6}, tmp_path / "new" / "out", dtype=torch.float16)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_the_disk_must_have_room_for_the_dense_weights(tmp_path: Path) -> None:
    """The codes of this one take half of what is free, as a hole in a file; it stands for four times as much."""
    base = quantize(LLAMA, "nf4", tmp_path / "base", is_sharded=True)
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    space = os.statvfs(tmp_path)
    count = space.f_bavail * space.f_frsize // 64 * 64
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [count]}
    blob = json.dumps(said).encode()
    tensors = [
        Planned("vast.weight.quant_state.bitsandbytes__nf4", torch.uint8, (len(blob),), list),
        Planned("vast.weight", torch.uint8, (count // 2, 1), list),
        Planned("vast.weight.absmax", torch.float32, (count // 64,), list),
        Planned("vast.weight.quant_map", torch.float32, (16,), list),
    ]
    with (base / "vast.safetensors").open("wb") as file:
        file.write(header_bytes(tensors, {"format": "pt"}) + blob)
        file.truncate(file.tell() - len(blob) + sum(tensor.nbytes for tensor in tensors))
    index = json.loads((base / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"] |= {tensor.name: "vast.safetensors" for tensor in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(MergeError, match=r"it needs .*, .* are free"):
        randlora.files.merge(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "base dense"]


def test_codes_of_4_bits_need_the_extra_and_say_so_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = quantize(LLAMA, "nf4", tmp_path / "base")
    adapter = save_adapter(LLAMA, tmp_path / "adapter")
    before = contents(tmp_path)
    with without_bitsandbytes(monkeypatch):
        with pytest.raises(CheckpointError, match=rf"weight \(nf4\) needs .* {re.escape(how_to_install('bnb'))}"):
            randlora.files.merge(base, adapter, tmp_path / "new" / "out")
        assert randlora.files.plan(base, 4).targets  # which looks at headers alone
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_codes_of_8_bits_need_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantize(LLAMA, "8 bits", tmp_path / "base")
    adapter = save_adapter(LLAMA, tmp_path / "adapter", targets=["q_proj"])
    with without_bitsandbytes(monkeypatch):
        out = randlora.files.merge(base, adapter, tmp_path / "out").out
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(stored(out)[name], written_out(stored(base))[name].bfloat16())


@contextmanager
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide that it is installed."""
    with monkeypatch.context() as patch:
        patch.setattr(bnb_codes, "version", not_found)
        patch.setitem(sys.modules, "bitsandbytes", None)  # Python's own way to say that there is no such module
        bnb_codes.missing.cache_clear()
        yield
    bnb_codes.missing.cache_clear()


def not_found(name: str) -> str:
    raise PackageNotFoundError(name)

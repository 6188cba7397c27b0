"""Directories that targets run on: files that the library, PEFT, transformers and bitsandbytes write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import randlora
from tests.checkpoint_files import CASES, CONFIG_FILE, Case, edit_fields, edit_tensors, trained
from tests.fuzz.files import FOLDER, LINK, Files
from tests.test_golden import DATA
from tests.test_golden import FirstBody as GoldenBody

ADAPTER_FILES = (CONFIG_FILE, "adapter_model.safetensors")
BODY = Case("golden", GoldenBody)


def _below(directory: Path, name: str) -> Files:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "README.md")
    return {f"{name}/{path.relative_to(directory).as_posix()}": path.read_bytes() for path in files}


def golden(name: str, folder: str = "adapter") -> Files:
    """Return the files of a golden directory."""
    return {f"{folder}/{file}": (DATA / name / file).read_bytes() for file in ADAPTER_FILES}


@cache
def of_peft(bases: str, folder: str = "adapter") -> Files:
    """Return an adapter as PEFT writes it, with its bases ``"stored"``, or to be ``"drawn"`` from its seed."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        randlora.save(trained(BODY, targets="all-linear"), directory, bases="stored")
        dropped = ("base_model.randlora_A", "base_model.randlora_B") if bases == "drawn" else ()
        edit_tensors(directory, {}, drop=dropped)
        edit_fields(directory, {"save_projection": bases == "stored"})
        return _below(directory, folder)


@cache
def of_case(name: str) -> Files:
    """Return an adapter that the library saves of one of the tests' models."""
    case = next(case for case in CASES if case.name == name)
    with tempfile.TemporaryDirectory() as folder:
        randlora.save(trained(case), folder)
        return _below(Path(folder), "adapter")


def _written(tensors: Mapping[str, Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "x.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        return path.read_bytes()


@cache
def dense_base() -> dict[str, Tensor]:
    """Return the tensors of the model that golden files adapt."""
    return dict(BODY.build().state_dict())


def single(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Files:
    """Return a base of one file."""
    files = {"base/model.safetensors": _written(tensors)}
    return files | ({} if config is None else {"base/config.json": json.dumps(config).encode()})


@cache
def quantized() -> dict[str, Tensor]:
    """Return the same tensors with both layers as bitsandbytes stores NF4."""
    import bitsandbytes as bnb

    tensors = dict(dense_base())
    for name, sides in (("wide", (6, 4)), ("tall", (4, 5))):
        layer: Any = bnb.nn.Linear4bit(*sides, bias=False, compress_statistics=False, quant_type="nf4")
        options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": False, "module": layer}
        layer.weight = bnb.nn.Params4bit(tensors.pop(f"{name}.weight"), **options)
        tensors |= {f"{name}.{key}": value for key, value in layer.to("cpu").state_dict().items()}
    return tensors


NO_TEXT = "\udcff"
"""The name of a directory that is no UTF-8, as Python gives it."""

QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@cache
def llama() -> Files:
    """Return a tiny Llama as transformers writes it."""
    import transformers

    sides = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=4, max_position_embeddings=4, **sides)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
        model.save_pretrained(name)
        return {file: data for file, data in _below(Path(name), "llama").items() if "generation" not in file}


@cache
def prepared() -> Files:
    """Return the directory in which command lines run."""
    return {
        **golden("golden_v1_stored", "ours"),
        **of_peft("stored", "peft"),
        **of_peft("drawn", "drawn"),
        **{name.replace("adapter", "odd", 1): data for name, data in of_case("odd-names-and-parameters").items()},
        **golden("golden_v1", NO_TEXT),
        **single(dense_base(), {"model_type": "none"}),
        **{name.replace("base", "nf4"): data for name, data in single(quantized(), QUANTIZED).items()},
        **llama(),
        "file": b"x",
        "damaged/adapter_config.json": b"{",
        f"{LINK}link": b"nothing",
        f"{LINK}zero": b"/dev/zero",
        f"{FOLDER}empty": b"",
    }

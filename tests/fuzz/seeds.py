"""The inputs that fuzzing begins with: files that the library, PEFT, transformers and bitsandbytes write.

``python -m tests.fuzz.seeds`` writes those that the corpus lacks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import randlora
from tests.checkpoint_files import CASES, CONFIG_FILE, Case, edit_fields, edit_tensors, trained
from tests.fuzz.files import CORPUS, FOLDER, LINK, Files, pack
from tests.test_golden import DATA
from tests.test_golden import FirstBody as GoldenBody

ADAPTER_FILES = (CONFIG_FILE, "adapter_model.safetensors")
GOLDEN = sorted(path.name for path in DATA.glob("golden_v*"))
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
def dense_base(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of the model that golden files adapt."""
    return dict(BODY.build().to(dtype).state_dict())


def single(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Files:
    """Return a base of one file."""
    files = {"base/model.safetensors": _written(tensors)}
    return files | ({} if config is None else {"base/config.json": json.dumps(config).encode()})


def sharded(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Files:
    """Return a base of two files and their index."""
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    files = {f"base/{file}": _written({name: tensors[name] for name in held}) for file, held in shards.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {n: file for file, held in shards.items() for n in held}}
    files["base/model.safetensors.index.json"] = json.dumps(index).encode()
    return files | ({} if config is None else {"base/config.json": json.dumps(config).encode()})


@cache
def quantized(kind: str) -> dict[str, Tensor]:
    """Return the same tensors with both layers as bitsandbytes stores codes of a kind."""
    import bitsandbytes as bnb

    tensors = dict(dense_base())
    for name, sides in (("wide", (6, 4)), ("tall", (4, 5))):
        layer: Any
        if kind == "8 bits":
            layer = bnb.nn.Linear8bitLt(*sides, bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(
                tensors[f"{name}.weight"].half(), requires_grad=False, has_fp16_weights=False
            )
        else:
            layer = bnb.nn.Linear4bit(*sides, bias=False, compress_statistics="twice" in kind, quant_type=kind[:3])
            layer.weight = bnb.nn.Params4bit(
                tensors[f"{name}.weight"],
                requires_grad=False,
                quant_type=kind[:3],
                compress_statistics="twice" in kind,
                module=layer,
            )
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value for key, value in layer.to("cpu").state_dict().items()}
    return tensors


NO_TEXT = "\udcff"
"""The name of a directory that is no UTF-8, as Python gives it."""

QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@cache
def llama() -> Files:
    """Return a tiny Llama as transformers writes it, and an adapter of it."""
    import transformers

    sides = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=4, max_position_embeddings=4, **sides)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
        model.save_pretrained(Path(name, "base"))
        randlora.inject(model, r=2, targets=["q_proj"])
        randlora.save(model, Path(name, "adapter"))
        files = _below(Path(name), "")
    return {name.removeprefix("/"): data for name, data in files.items() if "generation" not in name}


def _adapters() -> dict[str, bytes]:
    found = {name: golden(name) for name in GOLDEN}
    found |= {f"peft_{bases}": of_peft(bases) for bases in ("stored", "drawn")}
    names = ("Conv1D", "head-and-bias", "biases-of-targets", "odd-names-and-parameters", "bfloat16", "float64")
    found |= {f"saved_{name}": of_case(name) for name in names}
    return {name: pack(files) for name, files in found.items()}


def _peft_configs() -> dict[str, bytes]:
    text = of_peft("stored")[f"adapter/{CONFIG_FILE}"]
    fields = json.loads(text)
    return {"saved": json.dumps(fields).encode(), "sparse": json.dumps({**fields, "sparse": True, "r": 2}).encode()}


def _checkpoints() -> dict[str, bytes]:
    ours, theirs = golden("golden_v1_stored"), of_peft("stored")
    config = {"dtype": "float32", "torch_dtype": None}
    plain = {**single(dense_base(), config), "base/tokenizer.json": b"{}", "base/sub/notes.txt": b"x"}
    found = {
        "one_file": ours | plain,
        "index": ours | sharded(dense_base()),
        "bfloat16_peft": theirs | single(dense_base(torch.bfloat16), {}),
        "llama": llama(),
        "options": golden("golden_v2_options") | single(dense_base()),
        **{
            f"bnb_{kind.replace(' ', '_')}": ours | layout(quantized(kind), QUANTIZED)
            for kind, layout in (("nf4", single), ("nf4 twice", sharded), ("fp4", sharded), ("8 bits", single))
        },
    }
    return {name: pack(files) for name, files in found.items()}


OPTIONS: tuple[dict[str, Any], ...] = (
    {"r": 2},
    {"r": {"a": 2, ".*": 3}, "targets": "all-linear", "alpha": {"q": 1.5, ".*": 2}},
    {"r": 4, "targets": ["q", "k", "b.0"], "exclude": ["k"], "train_also": ["n", "b.2.bias"]},
    {"targets": r"a\.(q|k)", "r": 3, "basis": "block", "blocks": [3, 1], "seed": 7},
    {"targets": "all", "exclude": "m.*|e", "r": 1, "stream": "portable", "basis": "sparse", "dropout": 0.0},
    {"targets": ["m"], "in_proj": "split", "r": 2, "name": "x", "active": True, "trainable": False},
    {"targets": [r"b\..", "q"], "r": 2, "train_also": r"n\..*", "experts": "shared"},
)

LINES = (
    "--help",
    "--version",
    "inspect ours",
    "inspect odd",
    "inspect peft --base base --json --no-norms",
    "verify ours --base base",
    "verify drawn --json --base base --prefix wide",
    "convert ours out --to peft",
    "convert drawn out --to native --base base --json",
    "convert ours out --to lora --rank 2 --tolerance 1",
    "convert ours out --to lora --format mlx --tolerance 0.9 --same-rank",
    "convert ours out --to diff --component unet",
    "convert ours peft --to native --overwrite",
    "merge ours peft merged --base base --scale 0.5 --scale 1 --dtype bfloat16",
    "merge ours merged --base nf4 --json",
    "plan base --r 2 --targets wide --basis block --blocks 2 1 --json",
    "plan llama --r q_proj=2 --r .*=3 --targets .*_proj --exclude k_proj --train-also norm --alpha 3",
    "plan llama --targets all --stream portable --seed 5 --in-proj split",
)


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
        **{name.replace("base", "nf4"): data for name, data in single(quantized("nf4"), QUANTIZED).items()},
        **{name.replace("base", "llama"): data for name, data in llama().items() if name.startswith("base")},
        "file": b"x",
        "damaged/adapter_config.json": b"{",
        f"{LINK}link": b"nothing",
        f"{LINK}zero": b"/dev/zero",
        f"{FOLDER}empty": b"",
    }


SEEDS: dict[str, Callable[[], dict[str, bytes]]] = {
    "adapter": _adapters,
    "checkpoint": _checkpoints,
    "peft_config": _peft_configs,
    "patterns": lambda: {f"options_{place}": json.dumps(options).encode() for place, options in enumerate(OPTIONS)},
    "command_line": lambda: {
        line.replace("-", "").replace(" ", "_")[:40]: line.replace(" ", "\n").encode() for line in LINES
    },
}
"""By name of target, what makes its seeds, by name."""


def main() -> None:
    """Write the seeds that the corpus lacks."""
    warnings.simplefilter("ignore")
    for target, make in SEEDS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in make().items():
            if not (path := folder / f"seed_{name}").exists():
                path.write_bytes(data)
                sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()

"""Merging on disk: an adapter into 8 shards of random weights in TinyLlama's shapes, beside copying the files."""

import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.layers import RANK
from benchmarks.models import LLAMA_TARGETS
from benchmarks.processes import in_own_process
from benchmarks.results import Row
from benchmarks.timing import Figure

SCRATCH = Path("build")  # on the disk, which the directory for temporary files may not be
SHARDS = 8
REPEATS = 3
LIMIT = 600e6
TARGETS = {"q and v": ["q_proj", "v_proj"], "all linear": LLAMA_TARGETS}
COMMAND = """
import sys
from benchmarks.processes import peak_bytes
from randlora.__main__ import main
code = main(sys.argv[1:])
print(peak_bytes())
sys.exit(code)
"""
FUNCTIONS = {
    "arithmetic": ("merged",),
    "reading": ("<method 'readinto' of '_io.FileIO' objects>",),
    "writing": ("<method 'write' of '_io.FileIO' objects>",),
    "flushing": ("<built-in method posix.fsync>",),
    "adapter and bases": ("find_changes",),
}
"""Where a merge spends its time: what is reported, and the functions whose time that is."""


def tiny_llama() -> nn.Module:
    """Make the model on the meta device, 1.1 billion numbers in bfloat16."""
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[no-any-return]


def write_checkpoint(directory: Path) -> None:
    """Write the model in shards, each drawn when it is its turn."""
    model = tiny_llama()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = [list(shapes)[shard::SHARDS] for shard in range(SHARDS)]
    weight_map: dict[str, str] = {}
    for shard, held in enumerate(names, 1):
        file = f"model-{shard:05}-of-{SHARDS:05}.safetensors"
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) / 50 for name in held}
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    model.config.save_pretrained(directory)  # type: ignore[operator, union-attr]


def write_adapter(directory: Path, targets: list[str]) -> None:
    """Save an adapter with random values; the model below it has memory that nobody ever writes to."""
    model = tiny_llama().to_empty(device="cpu")
    randlora.inject(model, r=RANK, targets=targets)
    for parameter in randlora.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.01)
    randlora.save(model, directory)


def copy(base: Path, out: Path) -> None:
    """Copy the files as they are, and flush them as a merge does."""
    out.mkdir()
    for file in base.iterdir():
        shutil.copy(file, out)
        with (out / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


def measured_copy(base: Path, out: Path) -> float:
    """Time a copy."""
    start = time.perf_counter()
    copy(base, out)
    return time.perf_counter() - start


def measured_merge(base: Path, adapter: Path, out: Path) -> float:
    """Time a merge."""
    start = time.perf_counter()
    randlora.files.merge(adapter, out, base=base)
    return time.perf_counter() - start


def peak_of_command(*words: str) -> int:
    """Run the command line in a fresh interpreter and return the most memory that it held, torch included."""
    ended = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=True)
    return int(ended.stdout.split()[-1])


def peaks(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Measure the peak of a merge, and that of an interpreter that has imported the same and does nothing."""
    words = ("merge", str(adapter), str(out), "--base", str(base))
    whole = peak_of_command(*words)
    return {"whole": whole, "above": whole - peak_of_command("--version")}


def profile_of_merge(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Return the time that each part of a merge takes, in seconds."""
    profile = cProfile.Profile()
    profile.runcall(randlora.files.merge, adapter, out, base=base)
    stats = pstats.Stats(profile)
    spent = dict.fromkeys(FUNCTIONS, 0.0)
    for (_, _, function), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        for name, functions in FUNCTIONS.items():
            spent[name] += cumulative if function in functions else 0.0
    return {**spent, "all": stats.total_tt}  # type: ignore[attr-defined]


def outs(root: Path) -> Iterator[Path]:
    """Name directories one after the other, and remove each when the next is asked for."""
    while True:
        out = root / "out"
        yield out
        shutil.rmtree(out)


def run(settings: Settings) -> Sequence[Row]:  # noqa: ARG001
    """Copy and merge in turn, each in a process of its own; the files come from the page cache in both."""
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        root = Path(scratch)
        base, out = root / "base", outs(root)
        base.mkdir()
        write_checkpoint(base)
        for name, targets in TARGETS.items():
            in_own_process(write_adapter, root / name, targets)
        found: dict[str, list[float]] = {name: [] for name in ("copy", *TARGETS)}
        for _ in range(REPEATS):
            found["copy"].append(in_own_process(measured_copy, base, next(out)))
            for name in TARGETS:
                found[name].append(in_own_process(measured_merge, base, root / name, next(out)))
        memory = {name: peaks(base, root / name, next(out)) for name in TARGETS}
        profiles = {name: in_own_process(profile_of_merge, base, root / name, next(out)) for name in TARGETS}
    limit = {"600 MB": Figure(LIMIT, LIMIT, "B")}
    return [
        Row("time", {name: Figure.of(seconds, "s") for name, seconds in found.items()}),
        *(Row(f"of which {part}", single(profiles, part, "s")) for part in ("all", *FUNCTIONS)),
        Row("peak of memory above the interpreter's", {**single(memory, "above", "B"), **limit}),
        Row("peak of memory of the whole process", single(memory, "whole", "B")),
    ]


def single(found: dict[str, dict[str, float]], key: str, unit: str) -> dict[str, Figure]:
    """Make figures of what was measured once."""
    return {name: Figure(measured[key], measured[key], unit) for name, measured in found.items()}


if __name__ == "__main__":
    main(("merge", run))

"""What an adapter of many costs: bytes, and the time to load it, remove it, swap it, and to begin a block with it."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.layers import ALPHA, RANK
from benchmarks.models import LLAMA_TARGETS, by_peft, llama
from benchmarks.results import Row
from benchmarks.timing import REPEATS, Figure

SIZES = ((2, 512), (32, 256))
"""Layers and width of each model: of few adapted layers, and of as many as one of 8B parameters has."""


def with_adapters(layers: int, side: int, device: str, directory: Path) -> nn.Module:
    """Make a model that had two adapters, which are saved in a directory, and has one of them now."""
    model = llama(layers, side).to(device).eval()
    for name in "ab":
        randlora.inject(model, r=RANK, alpha=ALPHA, targets=LLAMA_TARGETS, name=name)
        with torch.no_grad():
            for fqn, parameter in model.named_parameters():
                if "randlora_" in fqn:
                    parameter.normal_(std=0.01)
    randlora.save_all(model, directory)
    randlora.remove(model, "b")
    return model


def timed(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, Figure]:
    """Time some steps, one after the other, again and again, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Figure.of(values, "s") for name, values in seconds.items()}


def begin(block: Any) -> None:
    """Begin a block and end it."""
    with block:
        pass


def ours(layers: int, side: int, device: str, directory: Path, repeats: int) -> dict[str, Figure]:
    """Measure ours."""
    model = with_adapters(layers, side, device, directory)
    pool = randlora.serving.AdapterPool(model, {"pooled": directory / "b"}, max_loaded=1)
    state = randlora.adapter_state(model, "a")
    figures = timed(
        {
            "load": partial(randlora.load, model, directory / "b", name="b", active=False),
            "remove": partial(randlora.remove, model, "b"),
            "swap, disk": partial(randlora.swap, model, directory / "b", name="a"),
            "swap, memory": partial(randlora.swap, model, state, name="a"),
            "state": partial(randlora.adapter_state, model, "a"),
            "block": lambda: begin(pool.routed(["pooled"])),
        },
        repeats,
    )
    report = randlora.inject(model, r=RANK, targets=LLAMA_TARGETS, name="c")
    return figures | {"bytes": Figure.of([report.checkpoint_bytes], "B"), "bases": Figure.of([report.basis_bytes], "B")}


def peers(layers: int, side: int, device: str, directory: Path, repeats: int) -> dict[str, Figure]:
    """Measure PEFT's LoRA, of as many parameters in square layers."""
    config = peft.LoraConfig(r=side // (2 * RANK), target_modules=LLAMA_TARGETS, init_lora_weights=False)
    model: Any = by_peft(llama(layers, side), config).to(device).eval()
    model.add_adapter("b", config)
    model.save_pretrained(directory / "lora")
    model.delete_adapter("b")
    load = partial(model.load_adapter, directory / "lora" / "b", "b", torch_device=device)
    figures = timed({"LoRA load": load, "LoRA remove": partial(model.delete_adapter, "b")}, repeats)
    held = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    return figures | {"LoRA bytes": Figure.of([held], "B")}


def name_of(layers: int, side: int) -> str:
    """Return the name of a case."""
    return f"Llama, {layers} layers, d = {side}, {layers * len(LLAMA_TARGETS)} adapted weights"


def row(layers: int, side: int, device: str, repeats: int) -> Row:
    """Measure all that one model's adapters cost."""
    with tempfile.TemporaryDirectory() as directory, nullcontext(Path(directory)) as path:
        found = ours(layers, side, device, path, repeats) | peers(layers, side, device, path, repeats)
    return Row(name_of(layers, side), found)


def run(settings: Settings) -> Sequence[Row]:
    """Measure a model of few weights, in full one of many too."""
    sizes = SIZES[:1] if settings.is_quick else SIZES
    return [row(*size, settings.device, REPEATS) for size in sizes]


if __name__ == "__main__":
    main(("pool", run))

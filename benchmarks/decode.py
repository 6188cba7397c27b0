"""One token at a time, as when text is generated: plain, and with the adapter merged for the while.

Each case has a process of its own. In one that has not freed much memory yet, every token's temporaries are fresh
memory, which weighs on PEFT's most; so it is measured both ways. Those of a layer of 4096 × 4096 are fresh in either.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.layers import MORE_CONTESTANTS, build
from benchmarks.processes import in_own_process
from benchmarks.results import Row
from benchmarks.timing import REPEATS, interleaved

SIDES = ((2048, 2048), (4096, 4096), (1024, 1024), (1024, 4096), (4096, 1024))
MULTIPLY_ADDS = 2**26  # in the base layer, timed together: one call is too short for a clock
NAMES = ("frozen", "LoRA", "PEFT", "dense", "block", "very_sparse")


def measure(in_features: int, out_features: int, dtype: torch.dtype, device: str, *, settle: bool) -> Row:
    """Time one token through one layer."""
    x = torch.randn(1, in_features, dtype=dtype, device=device)
    layers = {name: build(MORE_CONTESTANTS[name], in_features, out_features, dtype, device).eval() for name in NAMES}
    merged = build(MORE_CONTESTANTS["dense"], in_features, out_features, dtype, device).eval()

    def forward(layer: nn.Module) -> Callable[[], object]:
        return lambda: layer(x)

    runs = {name: forward(layer) for name, layer in layers.items()}
    calls = max(1, MULTIPLY_ADDS // (in_features * out_features))
    with torch.inference_mode(), randlora.merged(merged):
        runs["merged"] = forward(merged)
        for name in ("0.weight", "0.bias"):  # so that nothing but who reads it differs, and not where it lies in memory
            layers["frozen"].get_parameter(name).data = merged.get_parameter(name).data
        figures = interleaved(runs, device=device, repeats=3 * REPEATS, calls=calls, settle=settle)
    return Row(f"one token, {in_features}→{out_features}, {'settled' if settle else 'fresh'} memory", figures)


def settled(*arguments: Any) -> Row:
    """Measure in the state that memory has in the middle of a run."""
    return measure(*arguments, settle=True)


def fresh(*arguments: Any) -> Row:
    """Measure in the state that memory has at the start of a process."""
    return measure(*arguments, settle=False)


def run(settings: Settings) -> Sequence[Row]:
    """Measure a square layer, which has targets; in full, other shapes too. A GPU has no memory of the two kinds."""
    on_gpu = settings.device == "cuda"
    dtype, ways = (torch.bfloat16, (settled,)) if on_gpu else (torch.float32, (fresh, settled))
    shapes = SIDES[: 1 if settings.is_quick else None]
    return [in_own_process(way, *sides, dtype, settings.device) for sides in shapes for way in ways]


if __name__ == "__main__":
    main(("decode", run))

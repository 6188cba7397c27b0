"""Whole training steps of whole models: forward, loss, backward and AdamW."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.command import Settings, main
from benchmarks.models import LLAMA_TARGETS, VIT_TARGETS, VOCABULARY, adapt, llama, training_step, vit
from benchmarks.results import BASELINE, Row
from benchmarks.targets import judged
from benchmarks.timing import Figure, interleaved

CONTESTANTS = ("frozen", "full", "LoRA", "PEFT", "dense", "block")
GATED = {"cpu": (512, 4096), "cuda": (2048, 8192)}
"""The side and the number of tokens of the Llama of four layers that has targets."""
SEQUENCE = 256
REPEATS = 11
SWEEP_REPEATS = 3
TOKENS = (512, 1024, 2048, 4096, 8192)
LAYERS = (2, 4, 8)
ADAPTERS = (1, 2, 4)


def ready(model: nn.Module, device: str) -> nn.Module:
    """Return the model on its device, under autocast where it is bfloat16: PEFT's adapters multiply in float32 else."""
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    return model.to(device)


def measure(
    tokens: int,
    *,
    layers: int = 4,
    side: int = 512,
    dtype: torch.dtype,
    device: str,
    repeats: int = SWEEP_REPEATS,
    contestants: Sequence[str] = CONTESTANTS,
) -> dict[str, Figure]:
    """Time a step of a Llama for some contestants."""
    inputs = torch.randint(VOCABULARY, (max(1, tokens // SEQUENCE), min(SEQUENCE, tokens)), device=device)
    steps = {
        name: training_step(ready(adapt(llama(layers, side).to(dtype=dtype), name, LLAMA_TARGETS), device), inputs)
        for name in contestants
    }
    return interleaved(steps, device=device, repeats=repeats)


def measure_vit(images: int, *, dtype: torch.dtype, device: str) -> dict[str, Figure]:
    """Time a step of a ViT of six layers of 384 for all contestants."""
    inputs: Tensor = torch.randn(images, 3, 224, 224, dtype=dtype, device=device)
    steps = {
        name: training_step(ready(adapt(vit(6, 384).to(dtype=dtype), name, VIT_TARGETS), device), inputs)
        for name in CONTESTANTS
    }
    return interleaved(steps, device=device, repeats=REPEATS)


def measure_adapters(count: int, *, dtype: torch.dtype, device: str) -> dict[str, Figure]:
    """Time a step with several adapters of ours active and trained at once."""
    inputs = torch.randint(VOCABULARY, (4, SEQUENCE), device=device)
    steps = {
        name: training_step(
            ready(adapt(llama(4, 512).to(dtype=dtype), name, LLAMA_TARGETS, adapters=count), device), inputs
        )
        for name in ("full", "dense", "block")
    }
    return interleaved(steps, device=device, repeats=SWEEP_REPEATS)


def run(settings: Settings) -> Sequence[Row]:
    """Measure the Llama that has targets; in full, a ViT, and how time grows with tokens, layers and adapters."""
    device = settings.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side, tokens = GATED[device]
    case = f"Llama, 4 layers, d = {side}, T = {tokens}"
    wanted = judged("model", case) | {BASELINE}
    contestants = [name for name in CONTESTANTS if name in wanted or not settings.is_quick]
    gated = measure(tokens, side=side, dtype=dtype, device=device, repeats=REPEATS, contestants=contestants)
    rows = [Row(case, gated, ("tokens", tokens) if device == "cpu" else None)]
    if settings.is_quick:
        return rows
    rows.append(Row("ViT, 6 layers, d = 384, 8 images", measure_vit(8, dtype=dtype, device=device)))
    for tokens in TOKENS:
        if (512, tokens) != GATED[device]:
            case = f"Llama, 4 layers, d = 512, T = {tokens}"
            rows.append(Row(case, measure(tokens, dtype=dtype, device=device), ("tokens", tokens)))
    for layers in LAYERS:
        case = f"Llama, {layers} layers, d = 512, T = 2048, for the number of layers"
        figures = measure(2048, layers=layers, dtype=dtype, device=device)
        rows.append(Row(case, figures, ("layers, T = 2048", layers)))
    for count in ADAPTERS:
        case = f"Llama, 4 layers, d = 512, T = 2048, {count} adapters"
        figures = measure_adapters(count, dtype=dtype, device=device)
        rows.append(Row(case, figures, ("active adapters, T = 2048", count)))
    return sorted(rows, key=lambda row: row.sweep or ("", 0))


if __name__ == "__main__":
    main(("model", run))

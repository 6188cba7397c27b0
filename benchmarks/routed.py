"""Many adapters in one batch: each row through its own, beside one adapter for all and PEFT's mixed batches of LoRA."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.layers import ALPHA, RANK
from benchmarks.models import LLAMA_TARGETS, VOCABULARY, by_peft, llama
from benchmarks.results import Row
from benchmarks.timing import REPEATS, interleaved

LAYERS, SIDE, ROWS = 2, 512, 64
LOADED = {1: 1, 8: 8, 64: 64, 256: 64}
"""How many adapters there are, and how many of them a batch uses."""
TOKENS = {"decode": 1, "prefill": 16}


def name_of(number: int) -> str:
    """Return the name of an adapter."""
    return f"tenant_{number}"


def ours(adapters: int, device: str, **options: Any) -> nn.Module:
    """Make a model with adapters of ours, all on the same bases, with values as after some training."""
    model = llama(LAYERS, SIDE).to(device)
    for number in range(adapters):
        randlora.inject(model, r=RANK, alpha=ALPHA, targets=LLAMA_TARGETS, name=name_of(number), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_" in name:
                parameter.normal_(std=0.01)
    return model.eval()


def peers(adapters: int, device: str) -> nn.Module:
    """Make a model with LoRA adapters of PEFT, of as many parameters as ours."""
    config = peft.LoraConfig(r=RANK // 2, target_modules=LLAMA_TARGETS, init_lora_weights=False)
    model: Any = by_peft(llama(LAYERS, SIDE), config)
    for number in range(adapters):
        model.add_adapter(name_of(number), config)
    return model.to(device).eval()  # type: ignore[no-any-return]


def routed(model: nn.Module, names: Sequence[str], inputs: Tensor) -> None:
    """Run each row through its own adapter."""
    with randlora.routed(model, names):
        model(input_ids=inputs)


def one_by_one(model: nn.Module, names: Sequence[str], inputs: Tensor) -> None:
    """Run the rows of one adapter after those of the other."""
    for name in dict.fromkeys(names):
        randlora.activate(model, name)
        model(input_ids=inputs[[row for row, other in enumerate(names) if other == name]])


def row(phase: str, loaded: int, device: str, repeats: int) -> Row:
    """Time one forward of a batch."""
    names = [name_of(number % LOADED[loaded]) for number in range(ROWS)]
    inputs = torch.randint(VOCABULARY, (ROWS, TOKENS[phase]), device=device)
    alone, many, block, lora = (
        ours(1, device),
        ours(loaded, device),
        ours(loaded, device, basis="block", blocks=(4, 8)),
        peers(loaded, device),
    )
    merged = ours(1, device)
    randlora.merge(merged)
    runs: dict[str, Callable[[], object]] = {
        "merged": partial(merged, input_ids=inputs),
        "one adapter": partial(alone, input_ids=inputs),
        "dense": partial(routed, many, names, inputs),
        "block": partial(routed, block, names, inputs),
        "one by one": partial(one_by_one, ours(loaded, device), names, inputs),
        "LoRA": partial(lora, input_ids=inputs, adapter_names=names),
    }
    with torch.no_grad():
        figures = interleaved(runs, device=device, repeats=repeats)
    return Row(f"{phase}, {loaded} adapters, {LOADED[loaded]} in a batch of {ROWS}", figures)


def run(settings: Settings) -> Sequence[Row]:
    """Measure decoding with 64 adapters, which has targets; in full, prefill and other numbers of adapters too."""
    cases = [("decode", 64)] if settings.is_quick else [(phase, loaded) for phase in TOKENS for loaded in LOADED]
    return [row(phase, loaded, settings.device, REPEATS) for phase, loaded in cases]


if __name__ == "__main__":
    main(("routed", run))

"""Many adapters in one batch: each row through its own, beside one adapter for all and PEFT's mixed batches of LoRA."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
TOKENS = {"decode": 1, "prefill": 32}
FEW_REPEATS = 3
"""Repeats of what has no target."""


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
    """Make a model with LoRA adapters of PEFT, of 1.3 times as many parameters as ours."""
    config = peft.LoraConfig(r=RANK // 4, target_modules=LLAMA_TARGETS, init_lora_weights=False)
    model: Any = by_peft(llama(LAYERS, SIDE), config)
    for number in range(adapters):
        model.add_adapter(name_of(number), config)
    return model.to(device).eval()  # type: ignore[no-any-return]


def routed(model: nn.Module, names: Sequence[str], inputs: Tensor) -> None:
    """Run each row through its own adapter."""
    with randlora.serving.routed(model, names):
        model(input_ids=inputs)


def one_by_one(model: nn.Module, names: Sequence[str], inputs: Tensor) -> None:
    """Run the rows of one adapter after those of the other."""
    for name in dict.fromkeys(names):
        randlora.activate(model, name)
        model(input_ids=inputs[[row for row, other in enumerate(names) if other == name]])


def row(phase: str, loaded: int, device: str, *, is_quick: bool) -> Row:
    """Time one forward of a batch: in a block that has many, as `generate` in one, or in a block of its own."""
    names = [name_of(number % LOADED[loaded]) for number in range(ROWS)]
    inputs = torch.randint(VOCABULARY, (ROWS, TOKENS[phase]), device=device)
    in_blocks: dict[str, Any] = {"basis": "block", "blocks": (4, 8)}
    plain = {"one adapter": ours(1, device), "block, one adapter": ours(1, device, **in_blocks)}
    many = {"dense": ours(loaded, device), "block": ours(loaded, device, **in_blocks)}
    merged, lora = ours(1, device), peers(loaded, device)
    randlora.merge(merged)
    runs: dict[str, Callable[[], object]] = {
        "merged": partial(merged, input_ids=inputs),
        **{name: partial(model, input_ids=inputs) for name, model in {**plain, **many}.items()},
        "LoRA": partial(lora, input_ids=inputs, adapter_names=names),
    }
    with torch.no_grad():
        with ExitStack() as blocks:
            for model in many.values():
                blocks.enter_context(randlora.serving.routed(model, names))
            figures = interleaved(runs, device=device, repeats=REPEATS if is_quick else FEW_REPEATS)
        alone = {
            "dense, a block each": partial(routed, many["dense"], names, inputs),
            "one by one": partial(one_by_one, many["dense"], names, inputs),
        }
        if not is_quick:
            figures |= interleaved(alone, device=device, repeats=1)
    return Row(f"{phase}, {loaded} adapters, {LOADED[loaded]} in a batch of {ROWS}", figures)


def run(settings: Settings) -> Sequence[Row]:
    """Measure decoding with 64 adapters, which has targets; in full, prefill and other numbers of adapters too."""
    cases = [("decode", 64)] if settings.is_quick else [(phase, loaded) for phase in TOKENS for loaded in LOADED]
    return [row(phase, loaded, settings.device, is_quick=settings.is_quick) for phase, loaded in cases]


if __name__ == "__main__":
    main(("routed", run))

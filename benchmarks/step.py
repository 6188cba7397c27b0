"""One training step of single layers: forward and backward, with the gradient of the input."""

from collections.abc import Mapping, Sequence

import torch

from benchmarks.command import Settings, main
from benchmarks.layers import AUTOCAST_CONTESTANTS, MORE_CONTESTANTS, Adapt, build, training_step
from benchmarks.results import BASELINE, Row
from benchmarks.targets import judged
from benchmarks.timing import REPEATS, interleaved

Case = tuple[torch.dtype, int, int, int]  # dtype, tokens, in, out

GATED: tuple[Case, ...] = (
    *((torch.float32, tokens, 1024, 1024) for tokens in (8, 32, 128, 512, 2048, 8192)),
    (torch.float32, 2048, 1024, 4096),
    (torch.float32, 2048, 4096, 1024),
    *((torch.bfloat16, tokens, 1024, 1024) for tokens in (128, 512, 2048, 8192)),
)
GATED_ON_A_GPU: tuple[Case, ...] = (  # smaller layers leave it waiting for the host, of which the overhead benchmark is
    *((torch.bfloat16, tokens, 4096, 4096) for tokens in (128, 2048, 8192)),
    (torch.bfloat16, 2048, 4096, 14336),
    (torch.bfloat16, 2048, 14336, 4096),
    (torch.float32, 2048, 4096, 4096),
)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
SIDES = (256, 512, 1024, 2048)
TIMED_TOGETHER = 2**27  # multiply-adds of the base layer, below which calls are timed together


def name_of(case: Case) -> str:
    """Write a case in words."""
    dtype, tokens, in_features, out_features = case
    return f"{str(dtype).removeprefix('torch.')}, T = {tokens}, {in_features}→{out_features}"


def measure(case: Case, contestants: Mapping[str, Adapt], device: str, sweep: tuple[str, float] | None = None) -> Row:
    """Time contestants on one layer."""
    dtype, tokens, in_features, out_features = case
    x = torch.randn(tokens, in_features, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(tokens, out_features, dtype=dtype, device=device)
    layers = {name: build(adapt, in_features, out_features, dtype, device) for name, adapt in contestants.items()}
    steps = {name: training_step(layer, x, grad) for name, layer in layers.items()}
    work = tokens * in_features * out_features
    repeats = round(
        REPEATS * (5 if work < 2**30 else 3 if work < 2**32 else 1.5)
    )  # what is short is disturbed more easily
    calls = max(1, TIMED_TOGETHER // work)
    return Row(name_of(case), interleaved(steps, device=device, repeats=repeats, calls=calls), sweep)


def all_contestants(case: Case) -> dict[str, Adapt]:
    """Name who can take part in a case: in bfloat16 PEFT's under autocast too."""
    return {**MORE_CONTESTANTS, **(AUTOCAST_CONTESTANTS if case[0] == torch.bfloat16 else {})}


def with_targets(case: Case) -> dict[str, Adapt]:
    """Name those who have targets in a case, and whom the table compares all with."""
    wanted = judged("step", name_of(case)) | {BASELINE}
    return {name: adapt for name, adapt in all_contestants(case).items() if name in wanted}


def run(settings: Settings) -> Sequence[Row]:
    """Measure what has targets; in full, the others too, and how time grows with the tokens and the layer's side."""
    gated = GATED_ON_A_GPU if settings.device == "cuda" else GATED
    if settings.is_quick:
        return [measure(case, with_targets(case), settings.device) for case in gated]
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    sweeps = {
        **{(dtype, tokens, 1024, 1024): ("tokens, 1024→1024", tokens) for tokens in TOKENS},
        **{(dtype, 1024, side, side): ("side of a square layer, T = 1024", side) for side in SIDES},
    }
    cases = dict.fromkeys([*sweeps, *gated])
    return [measure(case, all_contestants(case), settings.device, sweeps.get(case)) for case in cases]


if __name__ == "__main__":
    main(("step", run))

"""Who takes part: ways to fine-tune, each with its settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
from torch import nn

import randlora
from benchmarks.curves.task import Family, Prepared, Targets

RANK = 32

Adapt = Callable[[Prepared, int], object]
"""Makes a model require grad where it is to be trained, the head apart, given a seed; returns what PEFT made of it."""


@dataclass(frozen=True)
class Contestant:
    """A way to fine-tune.

    Attributes:
        family: What it trains.
        adapt: Prepares a model.
    """

    family: Family
    adapt: Adapt


def frozen(prepared: Prepared, _seed: int) -> None:
    """Train the head alone, or nothing."""
    prepared.model.requires_grad_(requires_grad=False)


def full(prepared: Prepared, _seed: int) -> None:
    """Train everything."""
    prepared.model.requires_grad_(requires_grad=True)


def ours(prepared: Prepared, seed: int, **options: Any) -> None:
    """Add an adapter of ours, by default as `randlora.inject` makes it."""
    randlora.inject(prepared.model, **{"r": RANK, "targets": prepared.targets.ours, "seed": seed, **options})


def lora(prepared: Prepared, _seed: int, *, rank: int | None = RANK, **options: Any) -> object:
    """Add PEFT's LoRA with alpha = 2·rank; ``None`` means the rank with about as many parameters as ours has."""
    rank = rank or equal_rank(prepared.model, prepared.targets)
    config = peft.LoraConfig(
        r=rank, lora_alpha=options.pop("alpha", 2 * rank), target_modules=prepared.targets.lora, **options
    )
    return peft.get_peft_model(prepared.model, config)


def peft_randlora(prepared: Prepared, seed: int) -> object:
    """Add PEFT's RandLoRA as it is by default."""
    config = peft.RandLoraConfig(target_modules=prepared.targets.linear, projection_prng_key=seed)
    return peft.get_peft_model(prepared.model, config)


def equal_rank(model: nn.Module, targets: Targets) -> int:
    """Return the rank of a LoRA whose number of parameters is nearest to that of our default adapter."""
    plan = randlora.plan(model, r=RANK, targets=targets.ours)
    of_rank_one = sum(row.count * (row.in_features + row.out_features) for row in plan.rows)
    return max(1, round(plan.trainable_parameters / of_rank_one))


def scaled(scaling: float, **options: Any) -> Adapt:
    """Add an adapter of ours with a scaling ``alpha / r``."""
    rank = options.get("r", RANK)
    return partial(ours, alpha=scaling * rank, **options)


MAIN: Mapping[str, Contestant] = {
    "frozen": Contestant("frozen", frozen),
    "full": Contestant("full", full),
    "LoRA, equal size": Contestant("adapter", partial(lora, rank=None)),
    "LoRA": Contestant("adapter", lora),
    "rsLoRA": Contestant("adapter", partial(lora, alpha=RANK, use_rslora=True)),
    "PEFT": Contestant("adapter", peft_randlora),
    "dense": Contestant("adapter", ours),
    "block": Contestant("adapter", partial(ours, basis="block")),
    "very_sparse": Contestant("adapter", partial(ours, basis="very_sparse")),
}
"""The contest: RandLoRA of both libraries beside LoRA and full fine-tuning."""

SCALES: Mapping[str, Contestant] = {
    **{f"dense, s = {scaling:g}": Contestant("adapter", scaled(scaling)) for scaling in (6.53, 2.0, 0.35)},
    "dense, r = 8": Contestant("adapter", partial(ours, r=8)),
    **{f"dense, r = 8, s = {scaling:g}": Contestant("adapter", scaled(scaling, r=8)) for scaling in (6.53, 2.0)},
}
"""Scales of the update; 6.53 steps as LoRA with r = 32 and alpha = 64 does, 20 is the default."""

GROUPS: Mapping[str, Mapping[str, Contestant]] = {"main": MAIN, "scales": SCALES}

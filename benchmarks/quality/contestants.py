"""Who takes part: ways to fine-tune, each with its settings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
from torch import nn

import randlora
from benchmarks.quality.khatri_rao import KhatriRao
from benchmarks.quality.low_rank import LowRank
from benchmarks.quality.other_bases import OTHER_BASES, add_updates, parametrize_targets
from benchmarks.quality.task import Family, Prepared, Targets
from randlora.bases.spec import count_bases

RANK = 32

Adapt = Callable[[Prepared, int], object]
"""Makes a model require grad where it is to be trained, the head apart, given a seed; returns what PEFT made of it."""


def whole_rate(_name: str, _parameter: nn.Parameter) -> float:
    """Return the share of the learning rate of each parameter where all have the same."""
    return 1.0


@dataclass(frozen=True)
class Contestant:
    """A way to fine-tune.

    Attributes:
        family: What it trains.
        adapt: Prepares a model.
        decay: Weight decay of all but the head.
        limit: The largest norm of the update of a layer, as a share of the norm of its weight, after each step.
        penalty: What is added to the loss for each layer, times the square of that share.
        share: Returns the share of the learning rate that a parameter has, given its name.
    """

    family: Family
    adapt: Adapt
    decay: float = 0.0
    limit: float = math.inf
    penalty: float = 0.0
    share: Callable[[str, nn.Parameter], float] = whole_rate


def frozen(prepared: Prepared, _seed: int) -> None:
    """Train the head alone, or nothing."""
    prepared.model.requires_grad_(requires_grad=False)


def full(prepared: Prepared, _seed: int) -> None:
    """Train everything, in float32: small steps would be lost in the rounding of bfloat16."""
    prepared.model.to(torch.float32).requires_grad_(requires_grad=True)


def ours(prepared: Prepared, seed: int, **options: Any) -> None:
    """Add an adapter of ours, by default as `randlora.inject` makes it."""
    r = {} if "like_lora" in options else {"r": RANK}
    randlora.inject(prepared.model, **{**r, "targets": prepared.targets.ours, "seed": seed, **options})


def lora(prepared: Prepared, _seed: int, *, rank: int | None = RANK, **options: Any) -> object:
    """Add PEFT's LoRA with alpha = 2·rank; ``None`` means the rank with about as many parameters as ours has.

    rsLoRA divides alpha by the root of the rank.
    """
    rank = rank or equal_rank(prepared.model, prepared.targets)
    config = peft.LoraConfig(
        r=rank, lora_alpha=options.pop("alpha", 2 * rank), target_modules=prepared.targets.lora, **options
    )
    return peft.get_peft_model(prepared.model, config)


def lora_once(prepared: Prepared, seed: int, *, rank: int, place: str = "", **options: Any) -> object:
    """Add a LoRA to all weights that ours would adapt, or to those of a place, once each, with alpha = 2·rank.

    rsLoRA has alpha = rank. It is PEFT's unless that would add the update of some weight twice.
    """
    scaling = math.sqrt(rank) if options.get("use_rslora") else 2.0
    if any(isinstance(module, nn.MultiheadAttention) for module in prepared.model.modules()):
        parametrize_targets(prepared, RANK, lambda weight: LowRank(weight.shape, rank, scaling))
        return None
    own = replace(prepared.targets, lora=prepared.targets.places.get(place, prepared.targets.lora))
    alpha = rank if options.get("use_rslora") else 2 * rank
    return lora(replace(prepared, targets=own), seed, rank=rank, alpha=alpha, **options)


def share_of_gamma(share: float, name: str, parameter: nn.Parameter) -> float:
    """Return the share of Γ, which starts at 1 / min_dim, so that it has at most ``share`` / min_dim of the rate."""
    return min(1.0, share / parameter.shape[-1]) if "randlora_gamma" in name else 1.0


def share_of_plus(name: str, _parameter: nn.Parameter) -> float:
    """Return the share in LoRA+: the matrix that starts at zero has 16 times the rate, as its authors advise."""
    return 16.0 if "lora_B" in name else 1.0


def peft_randlora(prepared: Prepared, seed: int) -> object:
    """Add PEFT's RandLoRA as it is by default."""
    config = peft.RandLoraConfig(target_modules=prepared.targets.linear, projection_prng_key=seed)
    return peft.get_peft_model(prepared.model, config)


def hybrid(prepared: Prepared, seed: int) -> object:
    """Add an adapter of ours with twice the rank, and around its layers a LoRA with half the rank of one of equal size.

    Together they have about the size of our default adapter, and more in narrow layers. PEFT's layer for attention
    replaces its weights, which one of ours refuses, so the LoRA is on linear layers alone.
    """
    rank = max(1, equal_rank(prepared.model, prepared.targets) // 2)
    ours(prepared, seed, r=2 * RANK)
    own = list(randlora.trainable_parameters(prepared.model))
    linear = replace(prepared, targets=replace(prepared.targets, lora=prepared.targets.linear))
    adapted = lora(linear, seed, rank=rank)
    for parameter in own:  # PEFT has frozen them
        parameter.requires_grad_()
    return adapted


def khatri_rao(prepared: Prepared, _seed: int) -> None:
    """Add KRAdapter to the weights that ours would adapt."""
    parametrize_targets(prepared, RANK, lambda weight: KhatriRao(weight.shape))


def ours_at(prepared: Prepared, seed: int, place: str) -> None:
    """Add an adapter of ours to one place, with the r that makes it about as large as the default one on q and v."""
    places = prepared.targets.places
    sizes = {
        r: randlora.plan(prepared.model, r=r, targets=places[place]).trainable_parameters for r in range(32, 129, 32)
    }
    wanted = randlora.plan(prepared.model, r=RANK, targets=places["q and v"]).trainable_parameters
    ours(prepared, seed, r=min(sizes, key=lambda r: abs(sizes[r] - wanted)), targets=places[place])


def ours_alone(prepared: Prepared, seed: int, place: str, **options: Any) -> None:
    """Add an adapter of ours to one place, by default the default one."""
    ours(prepared, seed, targets=prepared.targets.places[place], **options)


def lora_at(prepared: Prepared, seed: int, place: str) -> object:
    """Add PEFT's LoRA to one place, about as large as our default adapter on q and v."""
    places = prepared.targets.places
    own = replace(prepared.targets, ours=places[place], lora=places[place])
    wanted = randlora.plan(prepared.model, r=RANK, targets=places["q and v"]).trainable_parameters
    return lora(replace(prepared, targets=own), seed, rank=nearest_rank(prepared.model, own, wanted))


def equal_rank(model: nn.Module, targets: Targets) -> int:
    """Return the rank of a LoRA whose number of parameters is nearest to that of our default adapter."""
    return nearest_rank(model, targets, randlora.plan(model, r=RANK, targets=targets.ours).trainable_parameters)


def nearest_rank(model: nn.Module, targets: Targets, wanted: int) -> int:
    """Return the rank of a LoRA whose number of parameters is nearest to the wanted one."""
    rows = randlora.plan(model, r=RANK, targets=targets.ours).rows
    return max(1, round(wanted / sum(row.count * (row.in_features + row.out_features) for row in rows)))


def scaled(scaling: float, **options: Any) -> Adapt:
    """Add an adapter of ours with a scaling ``alpha / r``."""
    rank = options.get("r", RANK)
    return partial(ours, alpha=scaling * rank, **options)


def as_in_the_paper(prepared: Prepared, seed: int) -> None:
    """Add an adapter of ours with the scaling of the paper's code for language models, 2/√num_bases."""
    plan = randlora.plan(prepared.model, r=RANK, targets=prepared.targets.ours)
    counts = {fqn: count_bases(min(weight_of(prepared.model, fqn).shape[-2:]), RANK) for fqn in plan.targets}
    ours(prepared, seed, alpha={fqn: 2 * RANK / math.sqrt(num_bases) for fqn, num_bases in counts.items()})


def weight_of(model: nn.Module, fqn: str) -> nn.Parameter:
    """Return the parameter that one of our adapters adapts, given the name of its layer or its own."""
    parameters = dict(model.named_parameters())
    return parameters[fqn if fqn in parameters else f"{fqn}.weight"]


MAIN: Mapping[str, Contestant] = {
    "frozen": Contestant("frozen", frozen),
    "full": Contestant("full", full),
    "LoRA, equal size": Contestant("small adapter", partial(lora, rank=None)),
    "rsLoRA, equal size": Contestant("small adapter", partial(lora, rank=None, use_rslora=True)),
    "LoRA": Contestant("adapter", lora),
    "rsLoRA": Contestant("adapter", partial(lora, alpha=RANK, use_rslora=True)),
    "PEFT": Contestant("adapter", peft_randlora),
    "dense": Contestant("adapter", ours),
    "block": Contestant("adapter", partial(ours, basis="block")),
    "very_sparse": Contestant("adapter", partial(ours, basis="very_sparse")),
}
"""The contest: RandLoRA of both libraries beside LoRA and full fine-tuning."""

SCALES: Mapping[str, Contestant] = {
    **{name: MAIN[name] for name in ("LoRA", "dense")},
    "dense, s = 6.53": Contestant("adapter", scaled(6.53)),
    "dense, s = 2": Contestant("small adapter", scaled(2.0)),
    "dense, s = 2/√n": Contestant("small adapter", as_in_the_paper),
    "dense, r = 8": Contestant("adapter", partial(ours, r=8)),
    "dense, r = 8, s = 6.53": Contestant("adapter", scaled(6.53, r=8)),
}
"""Scales of the update; 6.53 steps as LoRA with r = 32 and alpha = 64 does, 20 is the default."""

STARTS: Mapping[str, Contestant] = {
    **{name: MAIN[name] for name in ("LoRA, equal size", "LoRA", "dense", "block")},
    "gamma first": Contestant("adapter", partial(ours, init="gamma")),
    "gamma first, s = 6.53": Contestant("adapter", scaled(6.53, init="gamma")),
    "gamma first, block": Contestant("adapter", partial(ours, basis="block", init="gamma")),
}
"""Γ moves first instead of Λ, with steps as large as those of the others at equal scale."""

SIZES: Mapping[str, Contestant] = {
    "dense": MAIN["dense"],
    **{f"dense, decay {decay:g}": Contestant("adapter", ours, decay=decay) for decay in (0.1, 1.0, 10.0)},
    **{
        f"dense, at most {limit:.0%} of a weight": Contestant("adapter", ours, limit=limit)
        for limit in (0.02, 0.05, 0.2)
    },
    **{f"dense, penalty {penalty:g}": Contestant("adapter", ours, penalty=penalty) for penalty in (1.0, 10.0)},
}
"""Ways to keep the update small."""

RANKS: Mapping[str, Contestant] = {
    **{f"LoRA, r = {rank}": Contestant("small adapter", partial(lora, rank=rank)) for rank in (1, 4)},
    **{f"LoRA, r = {rank}": Contestant("adapter", partial(lora, rank=rank)) for rank in (16, 64)},
    **{f"dense, r = {rank}": Contestant("adapter", partial(ours, r=rank)) for rank in (96, 8, 2)},
    **{f"gamma first, r = {rank}": Contestant("adapter", partial(ours, r=rank, init="gamma")) for rank in (96, 8, 2)},
    **{name: {**MAIN, **STARTS}[name] for name in ("LoRA", "dense", "gamma first")},  # their rank is 32
}
"""Numbers of parameters: of a LoRA they rise with the rank, of ours they fall with it."""

PASSWORDS: Mapping[str, Contestant] = {
    **{f"LoRA, r = {rank}": Contestant("adapter", partial(lora, rank=rank)) for rank in (1, 4)},
    **{f"dense, r = {rank}": Contestant("adapter", partial(ours, r=rank)) for rank in (192, 48)},
    "KRAdapter": Contestant("adapter", khatri_rao),
}
"""Sizes small enough to be filled, in pairs, and one that is not."""

FACTS: Mapping[str, Contestant] = {
    **{f"LoRA, r = {rank}": Contestant("adapter", partial(lora, rank=rank)) for rank in (1, 2, 4, 8)},
    **RANKS,
    **{name: MAIN[name] for name in ("block", "very_sparse", "full")},
    "KRAdapter": Contestant("adapter", khatri_rao),
}
"""Sizes and forms that may store more or less."""

REWARDS: Mapping[str, Contestant] = {
    **{name: MAIN[name] for name in ("frozen", "full", "LoRA, equal size", "LoRA", "dense")},
    "dense, s = 2": SCALES["dense, s = 2"],
    "dense, s = 0.5": Contestant("small adapter", scaled(0.5)),
    "KRAdapter": Contestant("adapter", khatri_rao),
}
"""Scales for reinforcement learning; 0.5 is that of a study by others."""

BASES: Mapping[str, Contestant] = {
    **{name: MAIN[name] for name in ("dense", "very_sparse")},
    **{name: Contestant("adapter", partial(add_updates, make=make, r=RANK)) for name, make in OTHER_BASES.items()},
    "sparse": Contestant("adapter", partial(ours, basis="sparse")),
    **{
        f"block {blocks}": Contestant("adapter", partial(ours, basis="block", blocks=blocks))
        for blocks in ((1, 8), (2, 2), (8, 1))
    },
    "hybrid": Contestant("adapter", hybrid),
    "KRAdapter": Contestant("adapter", khatri_rao),
}
"""Other bases, blocks that leave no entry of an update out where a layer has three bases, and a LoRA beside ours."""

WIDTHS: Mapping[str, Contestant] = {
    name: {**MAIN, **SCALES}[name] for name in ("LoRA", "dense", "dense, r = 8", "dense, s = 6.53")
}
"""Scales whose best learning rate should be the same at every width."""

GAMMAS: Mapping[str, Contestant] = {
    "dense": MAIN["dense"],
    **{
        f"dense, Γ at {share}/m": Contestant("adapter", ours, share=partial(share_of_gamma, share))
        for share in (32, 128, 512)
    },
}
"""A learning rate of Γ's own, lower in wide layers, in which a step of the same size changes it more."""

ATTENTION: Mapping[str, Contestant] = {
    "dense": MAIN["dense"],
    "dense, q, k and v apart": Contestant("adapter", partial(ours, in_proj="split")),
    "dense, no attention": Contestant(
        "adapter", lambda prepared, seed: ours(prepared, seed, targets=prepared.targets.linear)
    ),
}
"""How the input projection of `nn.MultiheadAttention` is adapted: as one weight, as three, or not at all."""

PLACES: Mapping[str, Contestant] = {
    **{name: MAIN[name] for name in ("LoRA, equal size", "dense")},
    **{f"LoRA, {place}": Contestant("small adapter", partial(lora_at, place=place)) for place in ("q and v", "MLP")},
    **{f"dense, {place}": Contestant("adapter", partial(ours_at, place=place)) for place in ("q and v", "MLP")},
}
"""Adapters of one size in two places."""

SIDES: Mapping[str, Contestant] = {
    "dense": MAIN["dense"],
    **{f"dense, {place} alone": Contestant("adapter", partial(ours_alone, place=place)) for place in ("q", "v")},
}
"""Layers of different width in one model: is one rate right for both?"""

LORA_RANKS = (1, 2, 4, 8, 16, 32)
CURVES: Mapping[str, Contestant] = {
    "full fine-tuning": MAIN["full"],
    **{
        f"LoRA {rank}": Contestant("small adapter" if rank <= 4 else "adapter", partial(lora_once, rank=rank))
        for rank in LORA_RANKS
    },
    **{
        f"rsLoRA {rank}": Contestant("adapter", partial(lora_once, rank=rank, use_rslora=True))
        for rank in LORA_RANKS
        if rank != 4  # where it is LoRA itself, as both scale by 2
    },
    **{
        f"{basis} {rank}": Contestant("adapter", partial(ours, like_lora=rank, basis=basis))
        for basis in ("dense", "block")
        for rank in LORA_RANKS
    },
}
"""Sizes by the rank of LoRA, on each weight once, and ours of the same sizes."""

PLACED: Mapping[str, Contestant] = {
    **{
        f"LoRA {rank}, MLP": Contestant("small adapter", partial(lora_once, rank=rank, place="MLP"))
        for rank in (1, 2, 4)
    },
    **{
        f"dense {rank}, MLP": Contestant("adapter", partial(ours_alone, place="MLP", like_lora=rank))
        for rank in (1, 2, 4)
    },
}
"""The same on the MLP alone."""

RELATIVES: Mapping[str, Contestant] = {
    f"{name} {rank}": Contestant("small adapter" if rank <= 4 else "adapter", adapt(rank=rank), share=share)
    for name, adapt, share in (
        ("DoRA", partial(partial, lora_once, use_dora=True), whole_rate),
        ("PiSSA", partial(partial, lora_once, init_lora_weights="pissa"), whole_rate),
        ("LoRA+", partial(partial, lora_once), share_of_plus),
    )
    for rank in (2, 32)
}
"""Relatives of LoRA, by PEFT."""

LAMBDA: Mapping[str, Contestant] = {
    f"{basis}, Λ alone {rank}": Contestant("adapter", partial(ours, like_lora=rank, basis=basis, train="lambda"))
    for rank in (1, 4)
    for basis in ("dense", "block")
}
"""Λ alone, at sizes of the curves."""

RULE: Mapping[str, Contestant] = {
    f"{name}, by the rule": {**REWARDS, **MAIN, **CURVES, **LAMBDA}[name]
    for name in ("dense", "block", "dense, s = 2", "dense, s = 0.5", "dense 1", "block 1", "dense, Λ alone 1")
}
"""What is trained at the rates that the rule of the learning rate might name, beside the other rates of each."""

GROUPS: Mapping[str, Mapping[str, Contestant]] = {
    "main": MAIN,
    "scales": SCALES,
    "starts": STARTS,
    "sizes": SIZES,
    "ranks": RANKS,
    "facts": FACTS,
    "passwords": PASSWORDS,
    "rewards": REWARDS,
    "bases": BASES,
    "widths": {**WIDTHS, **GAMMAS},
    "gammas": GAMMAS,
    "attention": ATTENTION,
    "places": PLACES,
    "sides": SIDES,
    "curves": {**CURVES, **LAMBDA},
    "placed": PLACED,
    "relatives": RELATIVES,
    "lambda": LAMBDA,
    "rule": RULE,
}

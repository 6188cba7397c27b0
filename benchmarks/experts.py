"""Stacks of experts in mixture-of-experts models: steps, single tokens and memory, beside PEFT's LoRA of the stacks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor, nn

import randlora
from benchmarks.command import Settings, main
from benchmarks.held import peak_of
from benchmarks.layers import ALPHA, RANK
from benchmarks.memory import in_bytes, kept_by
from benchmarks.models import VOCABULARY, by_peft, training_step
from benchmarks.results import Row
from benchmarks.timing import interleaved

STACKS = ["gate_up_proj", "down_proj"]
OURS: dict[str, dict[str, Any]] = {
    "dense": {"basis": "dense"},
    "block": {"basis": "block", "blocks": (4, 8)},
    "shared": {"basis": "dense", "experts": "shared"},
    "shared, block": {"basis": "block", "blocks": (4, 8), "experts": "shared"},
}
NAMES = ("frozen", "full", "LoRA", *OURS)
QUICK_NAMES = ("frozen", "full", "LoRA", "dense", "block", "shared")
MODELS = {
    "Mixtral": ("Mixtral", 512, 512, 8, 2),
    "Qwen3-MoE": ("Qwen3-MoE", 512, 256, 32, 4),
    "many": ("Qwen3-MoE", 256, 128, 128, 8),
}
"""Family, hidden size, that of an expert, experts a layer and a token."""
REPEATS = 5
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
TOKENS = 256
GATHERED = 16
"""Tokens for ``batched_mm``, which gathers the weights of every token's experts."""


class Case(NamedTuple):
    """A model, how it multiplies by its experts' weights, and the number of tokens.

    Attributes:
        family: ``Mixtral`` or ``Qwen3-MoE``.
        side: Hidden size.
        inner: Hidden size of an expert.
        experts: Experts a layer.
        chosen: Experts a token.
        implementation: ``eager``, ``grouped_mm`` or ``batched_mm``.
        tokens: Tokens in a step.
        layers: Layers.
    """

    family: str
    side: int
    inner: int
    experts: int
    chosen: int
    implementation: str
    tokens: int
    layers: int = 1

    def __str__(self) -> str:
        """Return the name of the row."""
        return f"{self.family}, {self.experts} experts, {self.implementation}, T = {self.tokens}"

    @property
    def lora_rank(self) -> int:
        """The rank at which LoRA trains as many numbers of a stack as ours, or the next more."""
        small, large = sorted((self.side, self.inner))
        ours = sum(n * (RANK + m) for m in (min(2 * self.inner, self.side), small) for n in [-(-m // RANK)])
        return -(-ours // (2 * self.inner + self.side + small + large))


def cases(*, is_quick: bool) -> list[Case]:
    """Return the cases; ``batched_mm`` gets few tokens. The quick ones are without it, and without 128 experts."""
    return [
        Case(*MODELS[name], implementation, GATHERED if implementation == "batched_mm" else TOKENS)
        for name in [*MODELS][: 2 if is_quick else None]
        for implementation in IMPLEMENTATIONS[: 2 if is_quick else None]
    ]


def build(case: Case) -> Any:
    """Make a model with random weights."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": case.side,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.side // 64,
        "num_key_value_heads": case.side // 64,
        "num_experts_per_tok": case.chosen,
        "use_cache": False,
    }
    torch.manual_seed(0)
    model: Any
    if case.family == "Mixtral":
        config = transformers.MixtralConfig(**common, intermediate_size=case.inner, num_local_experts=case.experts)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            **common, head_dim=64, moe_intermediate_size=case.inner, num_experts=case.experts
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(case.implementation)
    return model


def adapt(model: nn.Module, contestant: str, case: Case) -> nn.Module:
    """Put a contestant on a model's stacks of experts; the rest of the model is frozen, and for *full* too."""
    model.requires_grad_(requires_grad=False)
    if contestant == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in STACKS)
    elif contestant == "LoRA":
        names = [f"mlp.experts.{stack}" for stack in STACKS]
        config = peft.LoraConfig(r=case.lora_rank, target_modules=[], target_parameters=names)
        return by_peft(model, config)
    elif contestant in OURS:
        randlora.inject(model, r=RANK, alpha=ALPHA, targets=STACKS, **OURS[contestant])
    return model


def contestants(case: Case, device: str, names: Sequence[str] = NAMES) -> dict[str, nn.Module]:
    """Return a model for each contestant."""
    return {name: adapt(build(case), name, case).to(device) for name in names}


def tokens_of(case: Case, device: str) -> Tensor:
    """Return the tokens of a step."""
    return torch.randint(VOCABULARY, (1, case.tokens), device=device)


def timed(case: Case, models: Mapping[str, nn.Module], device: str, repeats: int) -> Row:
    """Time a step: forward, loss, backward and AdamW."""
    inputs = tokens_of(case, device)
    steps = {name: training_step(model, inputs) for name, model in models.items()}
    return Row(f"step, {case}", interleaved(steps, device=device, repeats=repeats))


def generated(case: Case, models: Mapping[str, nn.Module], device: str, repeats: int) -> Row:
    """Time one token in inference."""
    inputs = torch.randint(VOCABULARY, (1, 1), device=device)

    def forward(model: nn.Module) -> Callable[[], object]:
        return lambda: model.eval()(inputs)

    with torch.inference_mode():
        runs = {name: forward(model) for name, model in models.items()}
        return Row(f"one token, {case._replace(tokens=1)}", interleaved(runs, device=device, repeats=repeats))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the output for embedded tokens."""
    output: Tensor = model(inputs_embeds=x).logits
    return output


def measured(case: Case, models: Mapping[str, nn.Module], device: str) -> list[Row]:
    """Count bytes: kept from forward to backward, and needed at the height of a step."""
    x = torch.randn(1, case.tokens, case.side, device=device, requires_grad=True)
    inputs = tokens_of(case, device)
    kept, needed = {}, {}
    for name, model in models.items():
        step = training_step(model, inputs)
        step()
        kept[name] = kept_by(model, partial(logits, model, x))
        needed[name] = peak_of(step, device)
    return [Row(f"kept, {case}", in_bytes(kept)), Row(f"needed, {case}", in_bytes(needed))]


def run(settings: Settings) -> Sequence[Row]:
    """Measure the implementations for training; in full, the gathering one, many experts and shared block bases too."""
    names = QUICK_NAMES if settings.is_quick else NAMES
    rows = []
    for case in cases(is_quick=settings.is_quick):
        models = contestants(case, settings.device, names)
        rows.append(timed(case, models, settings.device, REPEATS))
        rows.append(generated(case, models, settings.device, REPEATS))
        rows.extend(measured(case, models, settings.device))
    return rows


if __name__ == "__main__":
    main(("experts", run))

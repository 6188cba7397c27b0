"""Single layers, adapted by each contestant."""

from collections.abc import Callable, Iterable, Sequence

import peft
import torch
from torch import Tensor, nn

import randlora

RANK = 32
ALPHA = 64.0
LAYERS = r"\d"  # of a sequential model

Adapt = Callable[[nn.Sequential], nn.Module]


def frozen(model: nn.Sequential) -> nn.Module:
    """Train nothing: what a layer costs whatever is put on it."""
    return model.requires_grad_(requires_grad=False)


def full(model: nn.Sequential) -> nn.Module:
    """Train the layer itself."""
    return model


def peft_lora(model: nn.Sequential) -> nn.Module:
    """Put PEFT's LoRA on it."""
    return _without_wrapper(peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=LAYERS)))


def peft_randlora(model: nn.Sequential) -> nn.Module:
    """Put PEFT's RandLoRA on it."""
    config = peft.RandLoraConfig(r=RANK, randlora_alpha=int(ALPHA), randlora_dropout=0.0, target_modules=LAYERS)
    return _without_wrapper(peft.get_peft_model(model, config))


def _without_wrapper(wrapped: peft.PeftModel) -> nn.Module:
    adapted: nn.Module = wrapped.base_model.model
    return adapted


def ours(basis: str) -> Adapt:
    """Put our adapter on it, with bases of a kind; block bases in four and eight blocks."""

    def adapt(model: nn.Sequential) -> nn.Module:
        blocks = (4, 8) if basis == "block" else None
        randlora.inject(model, r=RANK, alpha=ALPHA, targets=LAYERS, basis=basis, blocks=blocks)  # type: ignore[arg-type]
        return model

    return adapt


class UnderAutocast(nn.Module):
    """A module whose products are made in bfloat16, as in mixed-precision training."""

    def __init__(self, inner: nn.Module) -> None:
        """Put it around a module."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Compute as the module does, under autocast."""
        with torch.autocast(x.device.type, torch.bfloat16):
            output: Tensor = self.inner(x)
        return output


def under_autocast(adapt: Adapt) -> Adapt:
    """Adapt likewise, to compute under autocast."""
    return lambda model: UnderAutocast(adapt(model))


CONTESTANTS: dict[str, Adapt] = {
    "frozen": frozen,
    "full": full,
    "LoRA": peft_lora,
    "PEFT": peft_randlora,
    "dense": ours("dense"),
    "block": ours("block"),
}
MORE_CONTESTANTS: dict[str, Adapt] = {**CONTESTANTS, "very_sparse": ours("very_sparse")}
AUTOCAST_CONTESTANTS: dict[str, Adapt] = {
    "LoRA, autocast": under_autocast(peft_lora),
    "PEFT, autocast": under_autocast(peft_randlora),
}
"""PEFT's adapters are float32 on a layer of any dtype, and multiply in float32 unless autocast prevents it."""


def build(adapt: Adapt, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Make a layer of fixed random weights and adapt it."""
    torch.manual_seed(0)
    return put_on(nn.Sequential(nn.Linear(in_features, out_features, dtype=dtype)), adapt, device)


def put_on(model: nn.Sequential, adapt: Adapt, device: str) -> nn.Module:
    """Adapt what was made; an adapter gets values as after some training."""
    layer = adapt(model).to(device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and "base_layer" not in name and "lora" in name:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    return layer


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Return forward and backward, with the gradient of the input."""
    leaves: Sequence[Tensor] = [x, *layer.parameters()]

    def step() -> None:
        clear(leaves)
        layer(x).backward(grad)

    return step


def clear(leaves: Iterable[Tensor]) -> None:
    """Let gradients go."""
    for leaf in leaves:
        leaf.grad = None

"""Steps of preparing a model one by one, and what they leave on it."""

from typing import Any

from torch import Tensor, nn

NOTHING = {"full_precision": False, "inputs_require_grad": False, "checkpointing": False, "unpacked": False}


def only(step: str) -> dict[str, bool]:
    return NOTHING | {step: True}


def checkpoint_activations(model: Any, *, is_reentrant: bool) -> None:
    """Switch checkpointing on under the name that the installed transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": is_reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
    }


def output_of(model: nn.Module, fqn: str) -> list[Tensor]:
    """Collect what a module returns from now on, with its gradients."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        found.append(output)

    model.get_submodule(fqn).register_forward_hook(keep)
    return found


def gradient(found: list[Tensor]) -> Tensor:
    (output,) = found
    assert output.grad is not None
    return output.grad

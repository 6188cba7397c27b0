"""Refusing a backward pass through a model whose trained adapters are merged: Λ and Γ would get no gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.functional.scratch import is_transformed
from randlora.layers.diagonals import Diagonal
from randlora.layers.inputs import is_plain_tensor
from randlora.state import ModelState, attached_state


def refuse_backward(root: nn.Module, args: object, output: Any) -> Any:  # noqa: ARG001  # a hook's signature
    """Return the output of a merged model, through which ``backward()`` raises a `MergeError`; a forward hook.

    Gradients of chosen inputs, as `torch.autograd.grad` computes them, are right, and remain possible.
    """
    state = attached_state(root)
    if state is None or not torch.is_grad_enabled() or is_transformed() or not _would_train_nothing(root, state):
        return None
    return _guarded(output)


def _would_train_nothing(root: nn.Module, state: ModelState) -> bool:
    """Whether adapters require grad that are merged, and none that is active on top of them."""
    diagonals = [module._parameters for module in root.modules() if isinstance(module, Diagonal)]

    def are_trained(names: Iterable[str]) -> bool:
        held = (parameters.get(name) for name in names for parameters in diagonals)
        return any(parameter is not None and parameter.requires_grad for parameter in held)

    return are_trained(state.merged) and not are_trained(state.active_unmerged)


def _guarded(output: Any) -> Any:
    """Return an output with the same bits whose tensors also depend on a leaf that refuses a gradient."""
    if is_plain_tensor(output) and output.requires_grad:
        leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        leaf.register_hook(_refuse)
        return output - leaf  # -0.0 + 0.0 would be 0.0
    if isinstance(output, MutableMapping):  # also a ModelOutput of transformers
        for key in [*output]:
            output[key] = _guarded(output[key])
    elif type(output) in (tuple, list):
        return type(output)(map(_guarded, output))
    elif isinstance(output, tuple) and (make := getattr(type(output), "_make", None)) is not None:  # a named tuple
        return make(map(_guarded, output))
    elif is_dataclass(output) and not isinstance(output, type):
        guarded = copy.copy(output)
        for each in fields(output):
            object.__setattr__(guarded, each.name, _guarded(getattr(output, each.name)))  # also of a frozen one
        return guarded
    return output


def _refuse(gradient: Tensor) -> None:  # noqa: ARG001  # a hook's signature
    raise MergeError(
        "cannot run backward through a model whose adapters are merged, because Λ and Γ would get no gradients: call "
        "randlora.unmerge(model) first, or end the `with randlora.merged(model)` block; to train other parameters "
        "alone, call randlora.set_trainable(model, name, False)"
    )

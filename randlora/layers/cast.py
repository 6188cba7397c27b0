"""Parameters that a module has in a wider dtype than it computes with, such as copies trained with an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from randlora.replaced import CASTS

RESIZER = "transformers.modeling_utils"
"""The module whose code resizes embeddings, and puts another output head in the place of one."""


class Cast:
    """The attribute of a class through which code reads such a parameter: cast in a forward, and itself elsewhere.

    Optimizers, checkpoints and code that changes the values of a parameter so have the parameter itself. An attribute
    that is set on a module, as pruning does, takes precedence. What makes an output head in the place of another sees
    the dtype that it must have.
    """

    def __init__(self, attribute: str) -> None:
        """Create the attribute for a parameter of this name."""
        self.attribute = attribute

    def __get__(self, owner: Any, kind: type) -> Any:
        """Return the parameter, or what it is cast to."""
        if owner is None:
            return self
        parameter = owner._parameters.get(self.attribute)
        if parameter is None:  # it was deleted, or is None
            return nn.Module.__getattr__(owner, self.attribute)
        if not torch.compiler.is_compiling():
            reader = sys._getframe(1)
            is_resized = isinstance(owner, nn.Linear) and reader.f_globals.get("__name__") == RESIZER
            if not is_resized and not _is_in_forward(reader):
                return parameter
        return cast(owner, self.attribute, parameter)


def cast(owner: nn.Module, attribute: str, value: Tensor) -> Tensor:
    """Return the value of an attribute in the dtype that its module computes with."""
    dtype = owner.__dict__.get(CASTS, {}).get(attribute)
    return value if dtype is None else value.to(dtype)


@contextmanager
def in_own_dtypes(model: nn.Module) -> Iterator[None]:
    """Have a model hold all parameters in the dtypes that it computes with, inside the block."""
    casts = [(module, name) for module in model.modules() for name in vars(module).get(CASTS, ())]
    held = [(module, name, found) for module, name in casts if (found := module._parameters.get(name)) is not None]
    rounded: dict[int, nn.Parameter] = {}  # a tied one stays tied
    try:
        for module, name, parameter in held:
            if id(parameter) not in rounded:
                value = cast(module, name, parameter.detach())
                rounded[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[name] = rounded[id(parameter)]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


def _is_in_forward(frame: FrameType | None) -> bool:
    """Whether code runs in the forward of anything, however deep in it."""
    while frame is not None and frame.f_code.co_name != "forward":
        frame = frame.f_back
    return frame is not None

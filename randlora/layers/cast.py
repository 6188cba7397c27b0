"""Parameters that a module has in a wider dtype than it computes with, such as copies trained with an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from randlora.replaced import CASTS


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

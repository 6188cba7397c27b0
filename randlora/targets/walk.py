"""The module walker: every module and every parameter of a model, under the names that the model gives them.

Walking sees a model as it was before any adapter: an adapter layer is passed through, and its base layer keeps the name
the model gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from randlora.layers.base import AdapterLayer
from randlora.layers.quantized import QuantizedLayer
from randlora.layers.registry import find_layer


class Visit(NamedTuple):
    """One place at which a walk comes past a module: ``parent.<attribute>`` holds it, or its adapter layer."""

    fqn: str
    module: nn.Module
    parent: nn.Module
    attribute: str
    adapter: AdapterLayer | None


def walk(module: nn.Module, prefix: str = "") -> Iterator[Visit]:
    """Come past every module below one, parents first; a shared module is visited at each of its places."""
    for attribute, child in module._modules.items():
        if child is None:
            continue
        fqn = f"{prefix}{attribute}"
        adapter = child if isinstance(child, AdapterLayer) else None
        inner = child if adapter is None else adapter.base_layer
        yield Visit(fqn, inner, module, attribute, adapter)
        yield from walk(inner, f"{fqn}.")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Go through a model's own parameters as ``(fqn, module, attribute, parameter)``, adapters' left out.

    A tied parameter comes once for every place.
    """
    modules = [("", model), *((f"{visit.fqn}.", visit.module) for visit in walk(model))]
    for prefix, module in modules:
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}{attribute}", module, attribute, parameter


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is codes, which may be stored as words of a floating dtype: then its type tells."""
    layer_class, weight = find_layer(module), module._parameters.get("weight")
    if isinstance(layer_class, type) and issubclass(layer_class, QuantizedLayer):
        return True
    is_foreign = type(weight).__module__.startswith("bitsandbytes.")  # as that of its embeddings
    return weight is not None and (is_foreign or not weight.is_floating_point())


def is_norm(module: nn.Module) -> bool:
    """Tell a norm by its class's name: every library has classes of its own."""
    return "norm" in type(module).__name__.lower()

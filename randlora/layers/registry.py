"""Which adapter layer serves which kind of base layer.

A kind is found by the base layer's type or the nearest of its parents. It is registered by the type itself or by the
type's qualified name, so that a library need not be imported to be known. A kind that looks like a linear layer but
cannot be adapted is registered with the reason, so that no parent answers for it.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from randlora.layers.base import AdapterLayer

Layer = TypeVar("Layer", bound=type[AdapterLayer])

_layers: dict[str, type[AdapterLayer] | str] = {}


def register_layer(base_type: type[nn.Module] | str) -> Callable[[Layer], Layer]:
    """Register the adapter layer for a type of base layer, as a class decorator.

    Args:
        base_type: The type, or its qualified name such as ``"transformers.pytorch_utils.Conv1D"``. Its subclasses are
            served too, unless they have an entry of their own.

    Returns:
        A decorator that returns the class unchanged.

    Example:
        >>> from torch import Tensor, nn
        >>> class Scaled(nn.Linear): ...
        >>> @register_layer(Scaled)
        ... class ScaledAdapter(AdapterLayer):
        ...     @staticmethod
        ...     def features(base_layer: nn.Module) -> tuple[int, int]:
        ...         return base_layer.in_features, base_layer.out_features
        ...     @staticmethod
        ...     def in_storage_layout(delta: Tensor) -> Tensor:
        ...         return delta
    """

    def register(layer: Layer) -> Layer:
        _layers[_name(base_type)] = layer
        return layer

    return register


def refuse_layer(base_type: type[nn.Module] | str, reason: str) -> None:
    """Register that layers of a type cannot be adapted.

    Args:
        base_type: The type or its qualified name.
        reason: Why, and what to do, to be read after the layer's name.
    """
    _layers[_name(base_type)] = reason


def find_layer(module: nn.Module) -> type[AdapterLayer] | str | None:
    """Find what serves a module.

    Returns:
        The adapter layer's class; a reason why its kind is refused; or ``None`` for a module of no known kind.
    """
    for parent in type(module).__mro__:
        if (entry := _layers.get(_name(parent))) is not None:
            return entry
    return None


def registered_layers() -> dict[str, type[AdapterLayer]]:
    """Return every kind that can be adapted, by qualified name."""
    return {name: entry for name, entry in _layers.items() if not isinstance(entry, str)}


def _name(base_type: type | str) -> str:
    return base_type if isinstance(base_type, str) else f"{base_type.__module__}.{base_type.__qualname__}"

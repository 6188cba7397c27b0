"""The registry of adapter layers by type of module, or by name of parameter.

A module gets the adapter layer of its type, or of the nearest base class, registered as a class or by qualified name so
that no library need be imported. A type that cannot be adapted is registered with the reason. Weights that other code
reads are found by the module's type or, if it is not registered, by the parameter's name.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import plain_class

Layer = TypeVar("Layer", bound=type[AdapterLayer])

KINDS = ("linear", "attention", "convolution", "embedding", "experts")
"""The kinds of weights, in the order in which reports list them."""


class Refusal(NamedTuple):
    """Stands in place of an adapter layer for modules that cannot be adapted."""

    reason: str  # as a phrase that follows the module's name


_layers: dict[str, type[AdapterLayer] | Refusal] = {}
_readers: dict[str, dict[str, type[AdapterLayer]]] = {}
_by_parameter: dict[str, list[tuple[Callable[[nn.Module, Tensor], bool], type[AdapterLayer]]]] = {}


def register_layer(base_type: type[nn.Module] | str) -> Callable[[Layer], Layer]:
    """Register the adapter layer for a type of module, as a class decorator.

    Args:
        base_type: The type, or its qualified name such as ``"transformers.pytorch_utils.Conv1D"``. The entry applies to
            subclasses too, unless they have their own.

    Raises:
        TypeError: If the class lacks an abstract method of `AdapterLayer`, or its ``kind`` is not one that
            `AdapterLayer` lists.

    Examples:
        >>> from torch import Tensor, nn
        >>> class Scaled(nn.Linear): ...
        >>> @register_layer(Scaled)
        ... class ScaledAdapter(AdapterLayer):
        ...     @staticmethod
        ...     def features(owner: nn.Module) -> tuple[int, int]:
        ...         return owner.in_features, owner.out_features
        ...     @staticmethod
        ...     def in_storage_layout(delta: Tensor) -> Tensor:
        ...         return delta
    """

    def register(layer: Layer) -> Layer:
        if inspect.isabstract(layer):
            missing = ", ".join(sorted(layer.__abstractmethods__))
            raise TypeError(f"{layer.__name__} cannot be registered without {missing}: define it in the class")
        _require_known_kind(layer)
        if layer.attribute != "weight":
            _readers.setdefault(qualified_name(base_type), {})[layer.attribute] = layer
        else:
            _layers[qualified_name(base_type)] = layer
        return layer

    return register


def refuse_layer(base_type: type[nn.Module] | str, reason: str) -> None:
    """Register the reason why layers of a type cannot be adapted, as a phrase that follows the layer's name."""
    _layers[qualified_name(base_type)] = Refusal(reason)


BY_WEIGHT: dict[str, type[AdapterLayer]] = {}
"""Layers for weights of a type, by its qualified name, among those that the base class of the layer adapts."""


def register_parameter(where: Callable[[nn.Module, Tensor], bool]) -> Callable[[Layer], Layer]:
    """Register the adapter layer for parameters named as its ``attribute``, as a class decorator; the first wins.

    ``where`` is given a module and its parameter, or a tensor of as many dimensions that it is computed from.
    """

    def register(layer: Layer) -> Layer:
        _require_known_kind(layer)
        _by_parameter.setdefault(layer.attribute, []).append((where, layer))
        return layer

    return register


Verdict = Literal["only where read", "untrained", "never"]
"""Of an adapter of a weight that other code reads: right only where it is read, not trained, or never right."""


class Reading(NamedTuple):
    """A module whose weight is read or changed, or is not used, by a module around it."""

    child: nn.Module
    why: str  # an adapter that acts in calls of the child would be wrong, as a phrase after its name
    verdict: Verdict


FINDERS: list[Callable[[nn.Module], Iterable[Reading]]] = []
"""Functions that find, inside a module, the modules whose weight it reads or changes, or does not use."""


FORMS: dict[str, type[AdapterLayer]] = {}
"""The kinds of weights that can be told apart by the shapes in an adapter's file alone, without a module."""


class Kinds(NamedTuple):
    """The adapter layers of one module."""

    called: type[AdapterLayer] | Refusal | None  # as `find_layer` returns it
    read: tuple[type[AdapterLayer], ...]  # as `find_readers` does


def find_layer(module: nn.Module) -> type[AdapterLayer] | Refusal | None:
    """Return the adapter layer of a module's type, a refusal if it cannot be adapted, or ``None`` if it is unknown."""
    names = qualified_names(type(module))
    if (name := next(filter(_layers.__contains__, names), None)) is None:
        return None
    if isinstance(entry := _layers[name], Refusal):
        return entry
    weight = type(_weight_or_source(module, "weight"))
    if weight is not nn.Parameter:
        by_weight = next((BY_WEIGHT[base] for base in qualified_names(weight) if base in BY_WEIGHT), None)
        if by_weight is not None and issubclass(by_weight, entry):
            return by_weight
    own, parent = plain_class(module), type(module).__mro__[names.index(name)]
    forwards = [inspect.getattr_static(kind, "forward", None) for kind in (own, parent)]  # TorchScript's computes
    is_inherited = forwards[0] is forwards[1]
    return entry if entry.as_read is None or is_inherited else entry.as_read


def find_readers(module: nn.Module) -> tuple[type[AdapterLayer], ...]:
    """Return the adapter layers of the other parameters of a module, which code reads."""
    for name in qualified_names(type(module)):
        if (entry := _readers.get(name)) is not None:
            return tuple(kind for kind in entry.values() if _weight_or_source(module, kind.attribute) is not None)
        if isinstance(_layers.get(name), Refusal):
            return ()
    own = module._parameters.keys()  # TorchScript's parameters are no dict, and have keys() alone
    names_read = [name for name in own if name in _by_parameter]
    names_read += [  # parameters that the module computes from others
        name for name in _by_parameter if name not in own and (name in vars(module) or is_parametrized(module, name))
    ]
    kinds: list[type[AdapterLayer]] = []
    for name in names_read:
        if (weight := _weight_or_source(module, name)) is not None:
            kinds += [kind for where, kind in _by_parameter[name] if where(module, weight)][:1]
    return tuple(kinds)


def _weight_or_source(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or, if a parametrization or weight norm computes it, a tensor with as many dimensions."""
    if name in module._parameters:
        return module._parameters[name]
    if is_parametrized(module, name):
        sources = module.get_submodule(f"parametrizations.{name}").parameters()
        return next(sources, None)
    computed = module.__dict__.get(name)  # there by torch.nn.utils.weight_norm
    return computed if isinstance(computed, Tensor) else None


def _require_known_kind(layer: type[AdapterLayer]) -> None:
    if layer.kind not in KINDS:
        raise TypeError(f"{layer.__name__} has kind={layer.kind!r}: expected one of {', '.join(KINDS)}")


_names: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def qualified_names(kind: type) -> tuple[str, ...]:
    """Return the qualified names of a type and of its base classes, in the order in which Python searches them."""
    if (known := _names.get(kind)) is None:
        known = _names[kind] = tuple(map(qualified_name, kind.__mro__))
    return known


def qualified_name(base_type: type | str) -> str:
    """Return the qualified name of a type, or the name that is given for it."""
    return base_type if isinstance(base_type, str) else f"{base_type.__module__}.{base_type.__qualname__}"

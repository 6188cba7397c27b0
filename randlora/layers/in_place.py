"""Adapting modules in place, by changing their class to a subclass as ``fully_shard`` does, and undoing this."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.layers.base import AdapterLayer
from randlora.layers.diagonals import Diagonal
from randlora.layers.scopes import ReadAttribute
from randlora.layers.weight import SPLITTERS, split_of
from randlora.places import loaded_modules
from randlora.replaced import CASTS

FORWARDS = "_old_forward", "forward"
"""Instance attributes that may hold a ``forward``. accelerate sets both, and calls the first from the second."""


class InPlace(nn.Module):
    """Base class of the classes of adapted modules, and of modules whose parameters are cast."""

    # the adapter layers by parameter; never changed: `attach` makes a new dict
    randlora: dict[str, AdapterLayer] = {}  # noqa: RUF012
    # the dtypes that the module computes with, by the names of parameters held in a different one
    randlora_casts: dict[str, torch.dtype] = {}  # noqa: RUF012
    randlora_base: ClassVar[type[nn.Module]]  # the original class
    randlora_input: ClassVar[str]  # the first argument of its forward

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle with the original class, because the adapted class cannot be imported."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        make, args, *state = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"{self.randlora_base.__name__} defines its own pickling: eject its adapters first")
        if args[0] is not adapted_class(self.randlora_base, *_hosts(self)):  # subclassed after adapting
            return make, args, *state
        return _new, (self.randlora_base, *_hosts(self), *args[1:]), *state

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert the module, and with it the dtypes that it computes with and the weights from before a merge."""
        applied = super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for layer in self.randlora.values():
            layer.convert_original(fn)
        if self.randlora_casts:
            self.randlora_casts = {
                name: fn(torch.empty(0, dtype=dtype, device="cpu")).dtype for name, dtype in self.randlora_casts.items()
            }
        return applied

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, except that Λ and Γ stay whole where `parallelize_module` splits all parameters."""
        if "." not in name or name not in dict(self.named_parameters()):
            super().register_parameter(name, param)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules inside, without Λ and Γ while `parallelize_module` or the like splits the weights."""
        was_split = self._is_split()
        for name, module in super().named_modules(*args, **kwargs):
            if not isinstance(module, Diagonal) or self._is_split() is was_split:
                yield name, module

    def _is_split(self) -> bool:
        weights = ((type(layer), layer.find_weight(self)) for layer in self.randlora.values())
        return any(weight is not None and split_of(kind, weight) is not None for kind, weight in weights)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the children, without Λ and Γ while accelerate offloads the modules below this one."""
        is_offloaded = bool(loaded_modules([self]))
        for name, child in super().named_children():
            if not (is_offloaded and isinstance(child, Diagonal)):
                yield name, child

    def children(self) -> Iterator[nn.Module]:
        """Yield all children, as torch does to convert them."""
        for _, child in super().named_children():
            yield child

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        """Save the original weight, since a merged one together with Λ and Γ would apply the update twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._save_originals(destination, prefix)

    def _save_originals(self, destination: dict[str, Any], prefix: str) -> None:
        for layer in self.randlora.values():
            if layer.original is not None:
                layer.save_original(self, destination, prefix)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict, with Λ and Γ even if the class writes its own entries and no others."""
        written = super().state_dict(*args, **kwargs)
        if self.randlora_base.state_dict is not nn.Module.state_dict:
            destination, prefix = kwargs.get("destination", written), kwargs.get("prefix", "")
            keep_vars = kwargs.get("keep_vars", False)
            for name, child in super().named_children():
                if isinstance(child, Diagonal):
                    child.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
            self._save_originals(destination, prefix)
        return written

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a state dict, except into merged weights, because unmerging would undo that."""
        if any(layer.original is not None for layer in self.randlora.values()):
            place = prefix.removesuffix(".") or "this layer"
            raise MergeError(f"cannot load a state dict into {place} while adapters are merged: unmerge them first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the module's own representation, followed by its adapters."""
        own = super().extra_repr()
        return "; ".join([*([own] if own else []), *(layer.description() for layer in self.randlora.values())])

    def __repr__(self) -> str:
        """Return a representation with the adapters, even if the class does not use ``extra_repr`` (``Conv1D``)."""
        own = super().__repr__()
        if self.randlora_base.__repr__ is nn.Module.__repr__:
            return own
        return "; ".join([own, *(layer.description() for layer in self.randlora.values())])


class Adapted(InPlace):
    """An adapted module."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module's own forward with the updates of the active adapters."""
        if not isinstance(self, Adapted):  # a bound method that outlived the adapters
            return type(self).forward(self, *args, **kwargs)
        layers = self.randlora  # one that is called adapts the weight
        layer = layers["weight"] if "weight" in layers else next(iter(layers.values()))
        return layer.forward(self, super().forward, *args, **kwargs)


_Hosts = tuple[tuple[str, ...], type["InPlace"]]  # the arguments of `adapted_class` beside the class

_classes = WeakKeyDictionary[type[nn.Module], WeakValueDictionary[_Hosts, type[InPlace]]]()
"""The classes that modules have. They keep neither themselves nor the classes that they are made of."""


def adapted_class(base: type[nn.Module], reads: tuple[str, ...], kind: type[InPlace]) -> type[InPlace]:
    """Return the subclass of a class, and of a ``kind`` of `InPlace`, with a `ReadAttribute` for some parameters."""
    classes = _classes.setdefault(base, WeakValueDictionary())
    if (known := classes.get((reads, kind))) is not None:
        return known
    body: dict[str, Any] = {attribute: ReadAttribute(attribute) for attribute in reads}
    body |= {"__module__": base.__module__, "__doc__": base.__doc__, "randlora_base": base}
    if kind is Adapted:
        parameters = list(inspect.signature(base.forward).parameters)[1:2]
        body["randlora_input"] = parameters[0] if parameters else ""
    # one that is not adapted keeps its name, by which code may know it
    adapted: type[InPlace] = type(base.__name__ if kind is InPlace else f"Adapted{base.__name__}", (kind, base), body)
    return classes.setdefault((reads, kind), adapted)


def _hosts(owner: nn.Module) -> _Hosts:
    """Return the arguments of `adapted_class` for what a module has."""
    layers: dict[str, AdapterLayer] = vars(owner).get("randlora", {})
    reads = {attribute for attribute, layer in layers.items() if layer.is_read}
    return tuple(sorted(reads.union(vars(owner).get(CASTS, ())))), Adapted if layers else InPlace


def _new(base: type[nn.Module], reads: tuple[str, ...], kind: type[InPlace], *args: Any) -> nn.Module:
    """Create an adapted module without attributes, for pickle or copy to fill."""
    adapted = adapted_class(base, reads, kind)
    return adapted.__new__(adapted, *args)


def adapter_layers_of(module: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers of a module by parameter name; empty for a plain module."""
    return module.randlora if isinstance(module, InPlace) else {}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without adapters."""
    return module.randlora_base if isinstance(module, InPlace) else type(module)


def change_class(owner: nn.Module, base: type[nn.Module]) -> None:
    """Change the class of a module to ``base``, or to its subclass for what the module has."""
    reads, kind = _hosts(owner)
    is_plain = not reads and kind is InPlace
    object.__setattr__(owner, "__class__", base if is_plain else adapted_class(base, reads, kind))


def class_obstacle(owner: nn.Module, layer_class: type[AdapterLayer]) -> str | None:
    """Return why a module's class cannot be replaced, as a phrase that follows its name, or ``None``."""
    if isinstance(owner, InPlace):  # adapting another weight replaces the current class
        layer = owner.randlora.get(layer_class.attribute)
        if layer is None or layer.is_rows is layer_class.is_rows:
            return detach_obstacle(owner) if layer is None else None
        return f"is adapted already, or its rows are trained, by {', '.join(layer.adapters)}: it cannot have both"
    own = type(owner)
    if isinstance(owner, torch.jit.ScriptModule):
        return f"is a {own.__name__}, a TorchScript module, whose class cannot change: adapt it before scripting"
    if taken := [name for name in ("randlora", *layer_class.parameter_names()) if has_attribute(owner, name)]:
        return f"already has an attribute {taken[0]}, where an adapter would be held: rename it, or exclude the layer"
    if (error := _subclass_error(own, (layer_class.attribute,) if layer_class.is_read else (), Adapted)) is None:
        return None
    return f"is a {own.__name__}, whose class cannot be replaced by a subclass ({error}): use a different class"


def _subclass_error(own: type[nn.Module], reads: tuple[str, ...], kind: type[InPlace]) -> Exception | None:
    """Return what a class raises, which may be anything, when it is subclassed, or an instance gets the subclass."""
    try:
        object.__setattr__(object.__new__(own), "__class__", adapted_class(own, reads, kind))
    except Exception as error:
        return error
    return None


def has_attribute(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute. Properties are not computed."""
    own: tuple[Any, ...] = module._modules, module._parameters, module._buffers, vars(module)
    return any(name in table for table in (*own, *map(vars, type(module).__mro__)))


def detach_obstacle(owner: nn.Module) -> str | None:
    """Return why a module's original class cannot be restored, as a phrase that follows its name, or ``None``."""
    if not isinstance(owner, InPlace) or type(owner) is adapted_class(owner.randlora_base, *_hosts(owner)):
        return None
    advice = "undo this first, or save the adapter and load it into a new model"
    return f"changed its class to {type(owner).__name__} after it was adapted, as fully_shard does: {advice}"


def can_cast(owner: nn.Module, attribute: str) -> bool:
    """Whether a change of its class can let a module hold a parameter in a dtype other than its code reads."""
    own = plain_class(owner)
    if isinstance(owner, torch.jit.ScriptModule | nn.RNNBase) or detach_obstacle(owner) is not None:
        return False  # recurrent layers read a list of their parameters
    is_taken = any(attribute in vars(base) for base in own.__mro__)
    return not is_taken and _subclass_error(own, (attribute,), InPlace) is None


def set_casts(owner: nn.Module, casts: dict[str, torch.dtype]) -> None:
    """Have a module's forward read these parameters in these dtypes, and all others as they are."""
    is_own, base = detach_obstacle(owner) is None, plain_class(owner)
    owner.__dict__[CASTS] = casts
    if not casts:
        del owner.__dict__[CASTS]
    if is_own:  # else the subclass that others made reads the parameter as it is
        change_class(owner, base)


def attach(owner: nn.Module, layer: AdapterLayer) -> None:
    """Attach an adapter layer, which has no adapters yet, to a module, and to others that have the same weight."""
    for each in layer.owners(owner):  # diagonals of its own each: torch's functional_call restores no shared module
        diagonals: dict[str, nn.Module] = {
            name: kind(layer) for kind, name in zip(layer.diagonal_classes, layer.names, strict=True)
        }
        for diagonal in diagonals.values():
            diagonal.training = owner.training
            # torch's fused transformer layers read weights without calling their modules, unless a module has a hook
            diagonal.register_forward_pre_hook(_decline_fast_paths)
        each.__dict__["randlora"] = {**adapter_layers_of(each), layer.attribute: layer}
        each._modules.update(diagonals)
        base = plain_class(each)
        change_class(each, base)
        layer.settle(each)
        forward_name = next((name for name in FORWARDS if name in each.__dict__), None)
        if forward_name is None or any(splitter.adopt(each, layer, forward_name) for splitter in SPLITTERS):
            continue
        inner = each.__dict__[forward_name]
        is_base = isinstance(inner, MethodType) and inner.__func__ is base.forward
        if layer.is_called and not is_base:
            layer.own_forward = inner
        if layer.is_called or is_base:
            del each.__dict__[forward_name]
            if forward_name == "_old_forward":  # called by accelerate's wrapper
                each.__dict__[forward_name] = MethodType(type(each).forward, each)


def detach(owner: nn.Module, layer: AdapterLayer) -> None:
    """Remove an adapter layer with Λ and Γ from its modules; removing the last one restores the original class."""
    for each in layer.owners(owner):
        base, attributes = plain_class(each), vars(each)
        layers = {attribute: other for attribute, other in adapter_layers_of(each).items() if other is not layer}
        for name in layer.names:
            del each._modules[name]
        layer.unsettle(each)
        attributes["randlora"] = layers
        if not layers:
            del attributes["randlora"]
        change_class(each, base)
        own_forward = MethodType(type(each).forward, each) if layer.own_forward is None else layer.own_forward
        is_shared = any(other.adopted == layer.adopted for other in layers.values())
        for name in FORWARDS:  # accelerate's hooks may have been added or removed since
            bound = attributes.get(name)
            if layer.adopted is not None and bound is layer.adopted[1] and not is_shared:
                attributes[name] = layer.adopted[0]
            if isinstance(bound, MethodType) and bound.__func__ is Adapted.forward:
                attributes[name] = own_forward
        if layer.own_forward is not None and not any(name in attributes for name in FORWARDS):
            attributes["forward"] = own_forward


def add_adapter(
    owner: nn.Module, layer: AdapterLayer, site_adapter: Any, values: Sequence[Tensor], *, trainable: bool
) -> None:
    """Add an adapter, a `SiteAdapter` or `SiteRows`, to a weight, with its Λ and Γ, or stacks of them, or its rows."""
    name = site_adapter.adapter.name
    if adapter_layers_of(owner).get(layer.attribute) is not layer:
        attach(owner, layer)
    fixed = layer.names[1:] if site_adapter.adapter.config.train == "lambda" else ()
    for diagonal_name, value in zip(layer.names, values, strict=True):
        parameter = nn.Parameter(value, requires_grad=trainable and diagonal_name not in fixed)
        for each in layer.owners(owner):
            diagonal: Any = each._modules[diagonal_name]
            diagonal[name] = parameter
    layer.adapters[name] = site_adapter
    layer.seat(owner)


def drop_adapter(owner: nn.Module, layer: AdapterLayer, name: str) -> None:
    """Remove one adapter from a weight, and the adapter layer with the last adapter."""
    for each in layer.owners(owner):
        for diagonal_name in layer.names:
            diagonal: Any = each._modules[diagonal_name]
            del diagonal[name]
    del layer.adapters[name]
    layer.seat(owner)
    if not layer.adapters:
        detach(owner, layer)


def _decline_fast_paths(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: the presence of a hook is enough."""

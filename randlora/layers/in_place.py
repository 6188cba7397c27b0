"""The class that an adapted module is given, a subclass of its own, and how it is given and taken back.

A module that is adapted stays what and where it is. As `torch.nn.utils.parametrize` and FSDP's ``fully_shard`` do, its
``__class__`` becomes a subclass of itself, made once for each class; Λ and Γ are registered on it. So no name of a
parameter changes, a checkpoint of the plain model loads before and after, hooks run around one module, and
``isinstance`` holds.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.layers.base import AdapterLayer
from randlora.layers.read_weight import ReadWeight
from randlora.state import Adapter

FORWARDS = "_old_forward", "forward"
"""Attributes of a module itself that may hold a ``forward``: accelerate's, which calls the first from the second."""

BOOKKEEPERS = "torch.distributed.", "torch.nn.modules.module", "accelerate."
"""Modules of code that looks a parameter up by name to hold it, shard it, move it or save it, and not to compute."""


class Diagonal(nn.ParameterDict):
    """What every adapter of one weight trains one of, by adapter."""

    def forward(self, name: str) -> nn.Parameter:
        """Return one; only accelerate's offloading, which puts values in place around a call, needs it called."""
        parameter = self._parameters[name]
        assert parameter is not None, "the adapter is on this weight"
        return parameter


class Lambda(Diagonal):
    """Λ of one weight by adapter, each ``(r, num_bases)`` float32."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every Λ to 0, with which an adapter changes nothing, as after ``model.to_empty(...)``."""
        for parameter in self.parameters():
            parameter.zero_()


class Gamma(Diagonal):
    """Γ of one weight by adapter, each ``(num_bases, min_dim)`` float32."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every Γ to 1 / max(num_bases, min_dim), where training starts, as after ``model.to_empty(...)``."""
        for parameter in self.parameters():
            parameter.fill_(1 / max(parameter.shape))


class InPlace(nn.Module):
    """What the class of every adapted module adds to the module's own.

    Attributes:
        randlora: The adapter layers, by the name of the parameter that each adapts.
        randlora_base: The module's own class.
        randlora_input: The name of its forward's first argument.
    """

    randlora: dict[str, AdapterLayer]
    randlora_base: ClassVar[type[nn.Module]]
    randlora_input: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Reduce to the module's own class: that which adapts it is made and not imported."""
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        make, args, *state = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"a {self.randlora_base.__name__} pickles in its own way: eject its adapters first")
        if args[0] is not adapted_class(self.randlora_base, *_hosts(self.randlora)):  # something subclassed it since
            return make, args, *state
        return _new, (self.randlora_base, *_hosts(self.randlora), *args[1:]), *state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        """Save the weight as it is without the adapters: a merged one beside Λ and Γ would count them twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for layer in self.randlora.values():
            if layer.unmerged is not None:
                layer.save_unmerged(self, destination, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as the module does, but refuse what unmerging would undo."""
        if any(layer.unmerged is not None for layer in self.randlora.values()):
            raise MergeError(
                f"cannot load a state dict into {prefix.removesuffix('.')} while the adapters are merged: "
                "call randlora.unmerge(model) first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Name the adapters in ``print(model)``."""
        own = super().extra_repr()
        return "; ".join([*([own] if own else []), *(layer.description() for layer in self.randlora.values())])

    def __repr__(self) -> str:
        """Name the adapters where the module's own class, such as ``Conv1D``, prints without ``extra_repr`` too."""
        own = super().__repr__()
        if self.randlora_base.__repr__ is nn.Module.__repr__:
            return own
        return "; ".join([own, *(layer.description() for layer in self.randlora.values())])


class RunsAdapters(InPlace):
    """A module whose forward is the product with its weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward returns, with what the active adapters add to it."""
        if not isinstance(self, RunsAdapters):  # bound while it was adapted, and called after
            return type(self).forward(self, *args, **kwargs)
        return self.randlora["weight"].forward(self, super().forward, *args, **kwargs)


def _read(attribute: str) -> property:
    """Return a property that reads one adapted weight."""

    def read(owner: InPlace) -> Tensor | None:
        layer = owner.randlora[attribute]
        assert isinstance(layer, ReadWeight), "the class was made for it"
        if not torch.compiler.is_compiling():  # which computes
            reader: str = sys._getframe(1).f_globals.get("__name__", "")
            if reader.startswith(BOOKKEEPERS):
                return layer.weight_of(owner)
        try:
            return layer.read(owner)
        except AttributeError as error:  # which Python would answer with nn.Module's own look-up: the plain parameter
            raise RuntimeError(f"cannot form the adapted {attribute}: {error}") from error

    return property(read)


_classes: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[InPlace]] = {}


def adapted_class(base: type[nn.Module], reads: tuple[str, ...], runs: bool) -> type[InPlace]:  # noqa: FBT001
    """Return the subclass of a module's class that its adapters need, one for each class.

    Args:
        base: The module's own class.
        reads: Names of the parameters that are adapted as they are read.
        runs: Whether adapters act in its forward.
    """
    key = base, reads, runs
    if (known := _classes.get(key)) is not None:
        return known
    body: dict[str, Any] = {attribute: _read(attribute) for attribute in reads}
    body |= {"__module__": base.__module__, "__doc__": base.__doc__, "randlora_base": base}
    if runs:
        parameters = list(inspect.signature(base.forward).parameters)[1:2]
        body["randlora_input"] = parameters[0] if parameters else ""
    adapted: type[InPlace] = type(f"Adapted{base.__name__}", (RunsAdapters if runs else InPlace, base), body)
    return _classes.setdefault(key, adapted)


def _hosts(layers: dict[str, AdapterLayer]) -> tuple[tuple[str, ...], bool]:
    """Return what `adapted_class` asks of some adapter layers."""
    reads = sorted(attribute for attribute, layer in layers.items() if isinstance(layer, ReadWeight))
    return tuple(reads), len(reads) < len(layers)


def _new(base: type[nn.Module], reads: tuple[str, ...], runs: bool, *args: Any) -> nn.Module:  # noqa: FBT001
    """Make an adapted module without values, for a pickle or a copy to fill."""
    adapted = adapted_class(base, reads, runs)
    return adapted.__new__(adapted, *args)


def adapter_layers_of(module: nn.Module) -> dict[str, AdapterLayer]:
    """Return the adapter layers of a module by the parameter that each adapts; of a plain module, none."""
    return module.randlora if isinstance(module, InPlace) else {}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as it was before any adapter."""
    return module.randlora_base if isinstance(module, InPlace) else type(module)


def change_class(owner: nn.Module, base: type[nn.Module]) -> None:
    """Give an adapted module another class of its own, which stays under that of its adapters."""
    object.__setattr__(owner, "__class__", adapted_class(base, *_hosts(adapter_layers_of(owner))))


def class_obstacle(owner: nn.Module, layer_class: type[AdapterLayer]) -> str | None:
    """Return why a module's class cannot be subclassed in place, to be read after its name, or ``None``."""
    if isinstance(owner, InPlace):  # another weight of it needs another class, in the place of what it is now
        return None if layer_class.attribute in owner.randlora else detach_obstacle(owner)
    own = type(owner)
    if isinstance(owner, torch.jit.ScriptModule):
        return f"is a {own.__name__}, which TorchScript compiled and whose class is fixed: adapt it before scripting"
    reads = (layer_class.attribute,) if issubclass(layer_class, ReadWeight) else ()
    try:
        object.__setattr__(object.__new__(own), "__class__", adapted_class(own, reads, not reads))
    except Exception as error:  # a class may object to being subclassed in any way
        return f"is a {own.__name__}, whose class cannot become a subclass of itself ({error}): use a plain subclass"
    return None


def detach_obstacle(owner: nn.Module) -> str | None:
    """Return why a module cannot be given its own class back, to be read after its name, or ``None``."""
    if not isinstance(owner, InPlace) or type(owner) is adapted_class(owner.randlora_base, *_hosts(owner.randlora)):
        return None
    return (
        f"became a {type(owner).__name__} after it was adapted, as by fully_shard or a parametrization: "
        "undo that first, or save the adapter and load it into a fresh model"
    )


def attach(owner: nn.Module, layer: AdapterLayer) -> None:
    """Let an adapter layer act on a module; it has no adapters yet."""
    layers = {**adapter_layers_of(owner), layer.attribute: layer}
    owner.__dict__["randlora"] = layers
    for held, name in zip((Lambda(), Gamma()), layer.parameter_names(), strict=True):
        held.training = owner.training
        # torch's fused transformer layers read weights without calling their modules, but not where there is a hook
        held.register_forward_pre_hook(_decline_fast_paths)
        owner._modules[name] = held
    base = plain_class(owner)
    object.__setattr__(owner, "__class__", adapted_class(base, *_hosts(layers)))
    layer.settle(owner)
    if isinstance(layer, ReadWeight):
        return
    held_as = next((name for name in FORWARDS if name in owner.__dict__), None)
    if held_as is None:
        return
    inner = owner.__dict__.pop(held_as)
    if not (isinstance(inner, MethodType) and inner.__func__ is base.forward):
        layer.own_forward = inner
    if held_as == "_old_forward":  # accelerate's hooks run around it
        owner.__dict__[held_as] = MethodType(RunsAdapters.forward, owner)


def detach(owner: nn.Module, layer: AdapterLayer) -> None:
    """Take an adapter layer off a module, with Λ and Γ; without others left, the module has its own class again."""
    base = plain_class(owner)
    layers = {attribute: other for attribute, other in adapter_layers_of(owner).items() if other is not layer}
    for name in layer.parameter_names():
        del owner._modules[name]
    layer.unsettle(owner)
    if layers:
        owner.__dict__["randlora"] = layers
        object.__setattr__(owner, "__class__", adapted_class(base, *_hosts(layers)))
    else:
        del owner.__dict__["randlora"]
        object.__setattr__(owner, "__class__", base)
    own_forward = MethodType(base.forward, owner) if layer.own_forward is None else layer.own_forward
    for name in FORWARDS:  # accelerate may have come, or gone, after the adapter
        bound = owner.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is RunsAdapters.forward:
            owner.__dict__[name] = own_forward
    if layer.own_forward is not None and not any(name in owner.__dict__ for name in FORWARDS):
        owner.__dict__["forward"] = own_forward


def add_adapter(
    owner: nn.Module, layer: AdapterLayer, adapter: Adapter, lam: Tensor, gamma: Tensor, *, trainable: bool
) -> None:
    """Add an adapter to a weight, with its Λ, ``(r, num_bases)``, and Γ, ``(num_bases, min_dim)``."""
    if adapter_layers_of(owner).get(layer.attribute) is not layer:
        attach(owner, layer)
    for held, value in zip(_held(owner, layer), (lam, gamma), strict=True):
        held[adapter.name] = nn.Parameter(value, requires_grad=trainable)
    layer.adapters[adapter.name] = adapter


def drop_adapter(owner: nn.Module, layer: AdapterLayer, name: str) -> None:
    """Take one adapter off a weight, and the adapter layer with the last one."""
    for held in _held(owner, layer):
        del held[name]
    del layer.adapters[name]
    if not layer.adapters:
        detach(owner, layer)


def _held(owner: nn.Module, layer: AdapterLayer) -> list[nn.ParameterDict]:
    return [held for name in layer.parameter_names() if isinstance(held := owner._modules[name], nn.ParameterDict)]


def _decline_fast_paths(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing; that there is a hook is what torch asks about."""

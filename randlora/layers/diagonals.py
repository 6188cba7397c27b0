"""Λ and Γ of one weight: a parameter per adapter, found by name, and by position for compiled code.

A compiler makes one program for each adapter name that it sees, so compiled code reads the active parameters from a
list. The list follows them however they are replaced: `nn.Module.to`, FSDP, `torch.func.functional_call` and accelerate
assign to ``_parameters``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from randlora.bases.spec import Shape, count_bases
from randlora.config import Init
from randlora.errors import AdapterError
from randlora.layers.scopes import is_in_call


class Slots(list[nn.Parameter | None]):
    """A list that two objects may hold: torch.export replaces plain lists among a module's attributes by copies."""


class Values(dict[str, nn.Parameter | None]):
    """The ``_parameters`` of Λ or Γ, which keep a list, always the same, of those of the active adapters up to date."""

    acting: tuple[str, ...] = ()

    def __init__(self) -> None:
        """Create it empty."""
        super().__init__()
        self.slots = Slots()

    def seat(self, names: tuple[str, ...]) -> None:
        """Set the names of the active adapters."""
        self.acting = names
        self.slots.clear()
        self.fill()

    def fill(self) -> None:
        """Update `slots`, after any change."""
        if self.acting:  # not while it is unpickled, which sets entries before attributes
            self.slots[:] = [self.get(name) for name in self.acting]

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        """Set a parameter. Compilers trace this, as they trace `torch.func.functional_call`."""
        was_away = (before := self.get(name)) is not None and before.is_meta
        super().__setitem__(name, value)
        self.fill()
        if was_away and value is not None and not value.is_meta and value.requires_grad and is_in_call():
            value.register_hook(_refuse_gradient)


def _filling(method: str) -> Callable[..., Any]:
    """Return a method of dict that also updates the slots."""

    def change(self: Values, *args: Any, **kwargs: Any) -> Any:
        result = getattr(super(Values, self), method)(*args, **kwargs)
        self.fill()
        return result

    change.__name__ = method
    return change


for _method in ("__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(Values, _method, _filling(_method))


class Diagonal(nn.ParameterDict):
    """Λ or Γ of one weight. Adapters may have names that are no attributes, so ours begin with ``randlora``."""

    randlora_index: ClassVar[int]  # 0 for Λ, 1 for Γ
    randlora_acting: tuple[str, ...] = ()  # the names of the active adapters
    # their parameters; if not held by `Values`, as in nn.DataParallel and DeepSpeed's ZeRO-3, they are found by name
    randlora_slots: Slots | None
    randlora_layer: Any  # the adapter layer of the weight

    def __init__(self, layer: Any) -> None:
        """Create it without parameters."""
        super().__init__()
        self._parameters = Values()
        self.randlora_layer = layer

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; whatever holds the parameters says where the active ones are."""
        super().__setattr__(name, value)
        if name == "_parameters":
            self.randlora_seat(self.randlora_acting)  # `Values` that were away may list others

    def randlora_seat(self, names: Iterable[str]) -> None:
        """Set the names of the active adapters."""
        values = self._parameters
        self.__dict__["randlora_acting"] = tuple(names)
        self.__dict__["randlora_slots"] = values.slots if type(values) is Values else None
        if isinstance(values, Values):
            values.seat(self.randlora_acting)

    def randlora_at(self, position: int) -> nn.Parameter | None:
        """Return the parameter of an active adapter, or ``None`` if it must be found by name."""
        slots = None if "_hf_hook" in self.__dict__ else self.randlora_slots
        return None if slots is None else slots[position]

    def randlora_named(self, name: str) -> nn.Parameter:
        """Return the parameter of one adapter."""
        if name not in self._parameters:  # nn.DataParallel's replicas hold parameters as plain attributes
            return getattr(self, name)  # type: ignore[no-any-return]
        parameter = self._parameters[name]  # not get(), in which ZeRO-3 would not gather it
        assert parameter is not None, "the weight is adapted"
        if parameter.is_meta and "_hf_hook" in self.__dict__:  # accelerate loads offloaded values only during a call
            return self.forward(name)
        return parameter

    def forward(self, name: str) -> nn.Parameter:
        """Return the parameter of one adapter. accelerate's offloading loads the values only during this call."""
        parameter: nn.Parameter = self[name]
        return parameter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value, for use after ``model.to_empty(...)``."""
        for name, parameter in self.named_parameters():
            site_adapter = self.randlora_layer.adapters[name]
            parameter.fill_(initial_values(site_adapter.adapter.init, site_adapter.shape)[self.randlora_index])


class Lambda(Diagonal):
    """Λ of one weight, ``(r, num_bases)``, or a stack, float32 per adapter."""

    randlora_index = 0


class Gamma(Diagonal):
    """Γ of one weight, ``(num_bases, min_dim)``, or a stack, float32 per adapter."""

    randlora_index = 1


TAKEN_NAMES = frozenset({*dir(nn.ParameterDict()), *dir(Gamma), *Diagonal.__annotations__})
"""The attributes of the modules that hold Λ and Γ, which are no names for adapters."""


def _refuse_gradient(gradient: Tensor) -> None:  # noqa: ARG001  # a hook's signature
    """Raise an error before the gradient of a Λ or Γ goes to a copy that is dropped."""
    raise AdapterError(
        "cannot train an adapter whose Λ and Γ accelerate offloads, because their gradients would be lost: call "
        "accelerate.hooks.remove_hook_from_submodules(model), and offload the model without preload_module_classes and "
        "without hooks on Λ and Γ themselves"
    )


def diagonal_shapes(shape: Shape, r: int) -> tuple[Shape, Shape]:
    """Return the shapes of Λ and Γ of an update: ``(r, num_bases)`` and ``(num_bases, min_dim)``, or stacks of them."""
    *matrices, out_features, in_features = shape
    min_dim = min(out_features, in_features)
    num_bases = count_bases(min_dim, r)
    return (*matrices, r, num_bases), (*matrices, num_bases, min_dim)


def initial_values(init: Init, shape: Shape) -> tuple[float, float]:
    """Return the initial values of all entries of Λ and of Γ, for an update of this shape or a stack of them."""
    constant = 1 / min(shape[-2:])  # the other is zero, so that the update is, and the first gradient of this one
    return (0.0, constant) if init == "lambda" else (constant, 0.0)

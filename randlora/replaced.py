"""A model's own parameters and buffers, with values and flags, followed by name if code replaces them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora.places import place_at, place_of, values_within, whole, whole_only_inside

Slot = tuple[nn.Module, str]  # a module and the name of one of its parameters or buffers

CASTS = "randlora_casts"  # of a module: the dtypes that it computes with, by the names of parameters in different ones

WRAPPED_AS = {
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "OptimizedModule": "_orig_mod",
}
"""Types of torch that wrap a submodule, and the attribute that holds it, which is left out of names."""


def path_to(root: nn.Module, fqn: str) -> list[nn.Module]:
    """Return the modules from a model to the one that has a parameter, given its FQN; empty if there is none."""
    modules = [root]
    for name in fqn.split(".")[:-1]:
        if (module := modules[-1]._modules.get(name)) is None:
            return []
        modules.append(unwrapped(module))
    return modules


def held_at(module: nn.Module, wrappers: Mapping[str, str]) -> str | None:
    """Return the attribute in which a wrapper, or a subclass, holds its module, given the attributes by type."""
    for base in type(module).__mro__:
        if base.__qualname__ in wrappers:
            return wrappers[base.__qualname__]
    return None


def unwrapped(module: nn.Module, wrappers: Mapping[str, str] = WRAPPED_AS) -> nn.Module:
    """Return a module without wrappers of these types around it."""
    while (attribute := held_at(module, wrappers)) is not None:
        module = getattr(module, attribute)
    return module


def table_of(module: nn.Module, attribute: str) -> dict[str, Any]:
    """Return the dict in which a module holds a parameter or buffer of this name."""
    return module._buffers if attribute in module._buffers else module._parameters


def like(own: Tensor, value: Tensor, *, requires_grad: bool = False) -> Tensor:
    """Return a tensor to replace ``own``: a parameter with this flag if ``own`` is a parameter, else a buffer."""
    return nn.Parameter(value, requires_grad) if isinstance(own, nn.Parameter) else value


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape, even if DeepSpeed's ZeRO-3 has emptied the parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(eq=False)
class ReplacedParameter:
    """A parameter of the model that adapters train copies of, or a buffer that they have copies of."""

    slots: dict[str, Slot]  # where the model has it, by FQN; several if it is tied
    original: Tensor  # the model's own
    installed: Tensor  # last
    is_lost: bool = False  # whether the model no longer has any of the slots

    @property
    def name(self) -> str:
        """Its FQN, the first of several."""
        return next(iter(self.slots))

    @property
    def live(self) -> Tensor:
        """The parameter or buffer that the model has now."""
        module, attribute = next(iter(self.slots.values()))
        held: Tensor | None = table_of(module, attribute)[attribute]
        assert held is not None, f"{attribute} was deleted while an adapter has a copy of it"
        return held

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer, which is not trained."""
        return not isinstance(self.original, nn.Parameter)

    @property
    def cast_dtype(self) -> torch.dtype | None:
        """The dtype that the model computes with if it differs from trained copies, else ``None``."""
        module, attribute = next(iter(self.slots.values()))
        dtype: torch.dtype | None = vars(module).get(CASTS, {}).get(attribute)
        return dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes with."""
        return self.cast_dtype or self.live.dtype

    @property
    def is_fixed(self) -> bool:
        """Whether an engine of DeepSpeed's ZeRO-3 has the parameter and would not run with a replacement."""
        held = [(module, attribute) for module, attribute in self.slots.values() if attribute in module._parameters]
        return any(place_of(module, attribute).exchanges == "nothing" for module, attribute in held)

    @torch.inference_mode(mode=False)  # parameters must not be inference tensors
    def install(self, parameter: Tensor) -> None:
        """Set the model's parameter or buffer to ``parameter``, on the device and in the dtype of the current one."""
        leaving = self.live
        if leaving is not parameter and self.is_fixed:
            place_at(leaving).write(whole(parameter).detach())
            return
        if leaving is not parameter and not leaving.is_meta:
            is_cast = self.cast_dtype is not None and parameter is not self.original
            dtype = parameter.dtype if is_cast else self.dtype
            parameter.data = parameter.data.to(device=leaving.device, dtype=dtype)
            if isinstance(parameter, nn.Parameter):
                place_at(leaving).follow(parameter)
        for module, attribute in self.slots.values():
            table_of(module, attribute)[attribute] = parameter
        self.installed = parameter

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def exchange_values(self, parameter: Tensor) -> Tensor:
        """Give the model's parameter the values and the flag of another, and return a tensor with the previous ones."""
        slot = self.live  # it stays, because `fully_shard` keeps references and would ignore a replacement
        place, given = place_at(slot), place_at(parameter)
        leaving = like(slot, slot.detach().clone(), requires_grad=slot.requires_grad)
        values, part = given.read(), place.part
        place.write(values if part is None or given.part is not None else values_within(values, part))
        slot.requires_grad_(parameter.requires_grad)
        self.installed = slot
        return leaving

    def followed(self, root: nn.Module) -> list[ReplacedParameter]:
        """Return it as the model has it now: in different modules with the same names, or in parts if it was untied."""
        parts: dict[int, dict[str, Slot]] = {}
        for fqn in self.slots:
            modules, attribute = path_to(root, fqn), fqn.rpartition(".")[2]
            if modules and (held := table_of(modules[-1], attribute).get(attribute)) is not None:
                parts.setdefault(id(held), {})[fqn] = modules[-1], attribute
        if not parts:
            return [ReplacedParameter(self.slots, self.original, self.installed, is_lost=True)]
        return [ReplacedParameter(slots, self.original, self.installed) for slots in parts.values()]

    @torch.inference_mode(mode=False)
    def adopt(self) -> None:
        """If code has replaced `installed` by `live`, make `live` the installed one, in the same role."""
        was, live = self.installed, self.live
        is_new = live is not was
        if self.original is was:
            self.original = live
        elif whole_shape(live) != whole_shape(self.original) and (is_new or _may_be_whole(live, self.original)):
            # the own values of a module that was put in or resized later are those that it has when that is noticed
            self.original = like(live, live.detach().clone())
        if is_new and was.requires_grad:
            live.requires_grad = True
        self.installed = live

    def fits(self, copy: Tensor) -> bool:
        """Whether a trained copy, possibly with only a shard left, has the shape of the model's own tensor."""
        return not _may_be_whole(copy, self.original) or whole_shape(copy) == whole_shape(self.original)


def _may_be_whole(parameter: Tensor, original: Tensor) -> bool:
    is_left = whole_only_inside(parameter) is not None or not parameter.numel()
    return not is_left and parameter.dim() == original.dim()

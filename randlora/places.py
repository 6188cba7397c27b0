"""The place of a parameter: where its values are, how they are read and written, and how they are restored.

The values of most parameters are in the parameter itself, which is `Plain`. A feature that keeps others elsewhere, such
as in the shards of several processes, registers a `Keeper` that finds their places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from randlora.functional.region import Spans, take_spans
from randlora.ranks import Ranks

Part = tuple[Spans, ...]
"""The part of a parameter that a process holds: which entries of each dimension."""


Exchanges = Literal["parameters", "values", "nothing"]
"""Whether a module can have another parameter in the place of one, or that must stay and take the values of another, as
what keeps it would not see another, or neither."""


class Place(ABC):
    """Where the values of one parameter, or of a tensor that stands alone, are.

    Attributes:
        is_lasting: Whether values that are written stay: not if an optimizer has copies that it would write back.
        exchanges: How the parameter is exchanged for a copy of it.
    """

    is_lasting: bool = True
    exchanges: Exchanges = "parameters"

    @property
    def part(self) -> Part | None:
        """What of it this process holds; ``None`` for all."""
        return None

    @property
    def is_complete(self) -> bool:
        """Whether there are values, and all of them can be read and written."""
        return True

    @property
    def folder(self) -> str | None:
        """The folder to which writing adds a file, if it does."""
        return None

    @property
    def is_away(self) -> bool:
        """Whether the values are not in memory now, and are loaded for each call of the module."""
        return False

    @property
    def identities(self) -> tuple[object, ...]:
        """Keys, one of which is equal for places of the same values, beside the memory of parameters."""
        return ()

    @abstractmethod
    def read(self) -> Tensor:
        """Return the values of that part, a plain tensor. This may be a collective."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return all values; a collective if this process holds a part. Gradients flow through it if they can."""

    @abstractmethod
    def write(self, value: Tensor) -> None:
        """Set the values of that part. This may be a collective."""

    @abstractmethod
    def stored(self, values: Any) -> Tensor | None:
        """Return kept values in the form in which a state dict has the parameter; ``None`` if it has none."""

    def keep(self) -> Kept:
        """Return what `restore` needs to restore the present values, bit for bit: a copy."""
        return Kept(self.read().clone(), self)

    def restore(self, values: Any) -> None:
        """Restore the ``values`` of what `keep` returned."""
        self.write(values)

    def follow(self, parameter: nn.Parameter) -> None:  # noqa: B027  # most need nothing
        """Have what keeps this parameter keep another, which is put in its place, if it does not find that itself."""


class Kept(NamedTuple):
    """The values of a parameter from before it was merged into.

    Attributes:
        values: The values, as `restore` of their place takes them.
        place: Their place, if values are written there in place; ``None`` if the parameter was exchanged for another.
    """

    values: Any
    place: Place | None = None

    def put_back(self, now: Place) -> None:
        """Restore the values in the place that the parameter has now, which may be of another kind than it was."""
        if self.place is None and not isinstance(now, Plain):  # it has been offloaded since
            now.write(self.values)
        else:
            (self.place if self.place is not None and isinstance(now, Plain) else now).restore(self.values)

    def stored(self, now: Place) -> Tensor | None:
        """Return the values in the form in which a state dict has the parameter; ``None`` if it has none."""
        if self.place is None:
            values: Tensor = self.values
            return values
        return (self.place if isinstance(now, Plain) else now).stored(self.values)


class Whole(Place):
    """The place of a tensor that stands alone and whose data are all its values, such as Λ. They change in place."""

    def __init__(self, tensor: Tensor) -> None:
        """Take the tensor."""
        self._tensor = tensor

    @property
    def is_complete(self) -> bool:
        """Whether the tensor has values."""
        return not self._tensor.is_meta and type(self._tensor.data) is Tensor

    def read(self) -> Tensor:
        """Return the values, which share the memory of the tensor."""
        return self._tensor.detach()

    def whole(self) -> Tensor:
        """Return the tensor."""
        return self._tensor

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Change the values, in place."""
        self._tensor.copy_(value)

    def stored(self, values: Tensor) -> Tensor:
        """Return kept values."""
        return values


class Plain(Whole):
    """The place of an ordinary parameter of a module, whose data are all its values.

    To write is to put another parameter in its place: a program that was exported or traced from the model may hold
    this one, which must not change.
    """

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        """Take a module and the name of its parameter."""
        self._owner, self._attribute = owner, attribute
        self._own: nn.Parameter = owner._parameters[attribute]  # type: ignore[assignment]  # it has one
        super().__init__(self._own)

    def write(self, value: Tensor) -> None:
        """Put a parameter with these values in the place of the present one.

        It does not require grad even if the present one does: what it would be trained to is dropped by `restore`.
        """
        held = nn.Parameter(value, requires_grad=False)
        held.__dict__.update(vars(self._own))  # what libraries set on parameters
        self._owner._parameters[self._attribute] = held

    def keep(self) -> Kept:
        """Return the parameter."""
        return Kept(self._own)

    def restore(self, values: Any) -> None:
        """Put a parameter back, on the device and in the dtype of the present one."""
        if values.device != self._own.device or values.dtype != self._own.dtype:
            values.data = values.data.to(device=self._own.device, dtype=self._own.dtype)
        self._owner._parameters[self._attribute] = values


class Keeper:
    """What keeps the values of some parameters elsewhere. A subclass, registered by `register_keeper`, says where."""

    def place_at(self, tensor: Tensor) -> Place | None:  # noqa: ARG002  # for those that keep no such tensors
        """Return the place of a tensor, whatever module has it, if it is kept here."""
        return None

    def place_of(self, owner: nn.Module, attribute: str) -> Place | None:  # noqa: ARG002
        """Return the place of a module's parameter if that depends on the module and it is kept here."""
        return None

    def lent(self, tensor: Tensor) -> str | None:  # noqa: ARG002
        """Return what to do to have all values of a tensor, if its data are these only for a while."""
        return None

    def withheld(self, model: nn.Module) -> str | None:  # noqa: ARG002
        """Return why a model, given with what wraps it, has not all values here, as an advice; else ``None``."""
        return None

    def own_class(self, kind: type[nn.Module]) -> type[nn.Module]:
        """Return the class that a module had before what keeps its parameters changed it."""
        return kind

    def holders(self, owner: nn.Module) -> list[object]:  # noqa: ARG002
        """Return the objects whose attributes change when a parameter of a module is written to where it is kept."""
        return []

    def is_hooked(self, module: nn.Module) -> bool:  # noqa: ARG002
        """Whether a hook of a module may load or move its parameters."""
        return False

    def loads(self, modules: Iterable[nn.Module]) -> dict[int, str | None]:  # noqa: ARG002
        """Return which of some modules are loaded for each call; see `loaded_modules`."""
        return {}

    def ranks_of(self, parameters: Iterable[Tensor], *, is_written: bool) -> Ranks | None:  # noqa: ARG002
        """Return the processes that hold some of these parameters together; see `ranks_of`."""
        return None

    def settle(self, model: nn.Module) -> None:
        """Have a model hold its parameters as they are between its calls."""


KEEPERS: list[Keeper] = []
"""What finds places that are not plain, in the order in which they are asked."""


def register_keeper(kind: type[Keeper]) -> type[Keeper]:
    """Add a keeper; a decorator of its class."""
    KEEPERS.append(kind())
    return kind


def place_of(owner: nn.Module, attribute: str) -> Place:
    """Return the place of a module's parameter or buffer."""
    buffer = owner._buffers.get(attribute)
    tensor = owner._parameters[attribute] if buffer is None else buffer
    for keeper in KEEPERS:
        found = keeper.place_of(owner, attribute)
        if found is None and tensor is not None:
            found = keeper.place_at(tensor)
        if found is not None:
            return found
    return Plain(owner, attribute) if buffer is None else Whole(buffer)


def place_at(tensor: Tensor) -> Place:
    """Return the place of a tensor that stands alone, such as Λ, or a copy that an adapter trains."""
    found = (keeper.place_at(tensor) for keeper in KEEPERS)
    return next((place for place in found if place is not None), None) or Whole(tensor)


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's own data are all its values, for good."""
    return isinstance(place_at(tensor), Whole) and lent(tensor) is None


def lent(tensor: Tensor) -> str | None:
    """Return what to do to have all values of a tensor, if its data are these only for a while; else ``None``."""
    return next((remedy for keeper in KEEPERS if (remedy := keeper.lent(tensor)) is not None), None)


def withheld(model: nn.Module) -> str | None:
    """Return why a model, given with what wraps it, has not all values here, and what to do; else ``None``."""
    return next((problem for keeper in KEEPERS if (problem := keeper.withheld(model)) is not None), None)


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before what keeps its parameters changed it."""
    for keeper in KEEPERS:
        kind = keeper.own_class(kind)
    return kind


def holders(owner: nn.Module) -> list[object]:
    """Return the objects beside a module whose attributes change when one of its parameters is written to."""
    return [each for keeper in KEEPERS for each in keeper.holders(owner)]


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of a module may load or move its parameters."""
    return any(keeper.is_hooked(module) for keeper in KEEPERS)


def loaded_modules(modules: Iterable[nn.Module]) -> dict[int, str | None]:
    """Return which modules, by id, have parameters that are loaded for each call of them or of one around them.

    Args:
        modules: Modules and all that are around them.

    Returns:
        The name of the class of the module that each is loaded with; ``None`` for one that is loaded by itself.
    """
    modules = list(modules)
    return {key: around for keeper in KEEPERS for key, around in keeper.loads(modules).items()}


def whole(tensor: Tensor) -> Tensor:
    """Return all values of a tensor, itself if they are its data; else a collective."""
    return place_at(tensor).whole()


def copied(tensor: Tensor, *, is_kept: bool) -> Tensor | None:
    """Return a copy of all values of a tensor in the CPU's memory, or ``None`` if this process keeps none.

    A collective if other processes hold a part of it. Nothing of it stays on the tensor's device.
    """
    values = whole(tensor)
    return values.detach().to("cpu", copy=True) if is_kept else None


def values_within(values: Tensor, part: Part) -> Tensor:
    """Return a part of all values of a parameter."""
    for dim, spans in enumerate(part):
        values = take_spans(values, spans, dim)
    return values


def ranks_of(parameters: Iterable[Tensor], *, is_written: bool = False) -> Ranks | None:
    """Return the processes that hold some parameters together; ``None`` if each has all of them.

    If values are written, parameters count too that are all here at present, as small ones of ZeRO-3 always are,
    because every process writes its own piece. An `AdapterError` is raised if no mesh has all of these processes.
    """
    parameters = list(parameters)
    found = (keeper.ranks_of(parameters, is_written=is_written) for keeper in KEEPERS)
    return next((ranks for ranks in found if ranks is not None), None)


def settle(model: nn.Module) -> None:
    """Have a model hold its parameters as they are between its calls, whatever keeps them."""
    if isinstance(model, nn.Module):  # the caller refuses others
        for keeper in KEEPERS:
            keeper.settle(model)

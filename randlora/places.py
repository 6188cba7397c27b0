"""The place of a parameter: where its values are, and how they are read, written and restored.

Most values are in the parameter itself, a `Plain` place. A feature that keeps values elsewhere, such as in shards on
several processes, has a `Keeper` that finds their places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from randlora.functional.region import Spans, take_spans
from randlora.ranks import Ranks

Part = tuple[Spans, ...]  # the part of a parameter that a process holds: which entries of each dimension

Exchanges = Literal["parameters", "values", "nothing"]
"""Whether a parameter can be replaced, or must stay and take the values of its replacement (because its keeper would
not see a new one), or neither."""

NOT_LASTING = "is partitioned by ZeRO-3, whose optimizer has copies of the values and would write them back"


class Place(ABC):
    """The place of the values of one parameter, or of a tensor outside of modules."""

    is_lasting: bool = True  # whether written values stay: no optimizer has copies that it would write back
    is_loaded_on_call: bool = False  # for each call of the module, from where they can only be read
    is_gathered_by_use: bool = False  # where a forward uses them, on all processes in the same order
    exchanges: Exchanges = "parameters"

    @property
    def part(self) -> Part | None:
        """The part on this process; ``None`` means all."""
        return None

    @property
    def is_complete(self) -> bool:
        """Whether there are values, and all of them can be read and written."""
        return True

    @property
    def identities(self) -> tuple[object, ...]:
        """Keys by which places of the same values can be recognized if they do not share the parameters' memory."""
        return ()

    @abstractmethod
    def read(self) -> Tensor:
        """Return the values of this process's part as a plain tensor. This may be a collective."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return all values; a collective if this process holds a part. Gradients flow through it if they can."""

    @abstractmethod
    def write(self, value: Tensor) -> None:
        """Set the values of this process's part. This may be a collective."""

    def stored(self, values: Any) -> Tensor | None:
        """Return kept values in the form in which a state dict has the parameter; ``None`` if it has none."""
        return values  # type: ignore[no-any-return]

    def keep(self) -> Kept:
        """Return a copy with which `restore` can restore the current values bit for bit."""
        return Kept(self.read().clone(), self)

    def restore(self, values: Any) -> None:
        """Restore the ``values`` of a result of `keep`."""
        self.write(values)

    def follow(self, parameter: nn.Parameter) -> None:  # noqa: B027  # most need nothing
        """Have the keeper of this parameter keep its replacement too, if it does not find it by itself."""


class Kept(NamedTuple):
    """The values of a parameter from before it was merged into."""

    values: Any  # as `restore` of their place takes them
    place: Place | None = None  # if values are written in place; None if the parameter itself was exchanged

    def put_back(self, now: Place) -> None:
        """Restore the values in the current place of the parameter, which may be of a different kind than before."""
        (self.place if self.place is not None and isinstance(now, Plain) else now).restore(self.values)

    def stored(self, now: Place) -> Tensor | None:
        """Return the values in the form in which a state dict has the parameter; ``None`` if it has none."""
        if self.place is None:
            return self.values  # type: ignore[no-any-return]
        return (self.place if isinstance(now, Plain) else now).stored(self.values)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: it is not on the meta device, and not fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def converted(tensor: Tensor, convert: Any) -> Tensor:
    """Return a tensor with values outside of modules, converted as `nn.Module._apply` converts those inside."""
    if tensor.is_meta:
        return tensor
    holder = nn.Module()
    tensors: dict[str, Any] = holder._parameters if isinstance(tensor, nn.Parameter) else holder._buffers
    tensors["tensor"] = tensor
    holder._apply(convert)
    return tensors["tensor"]  # type: ignore[no-any-return]


class Whole(Place):
    """The place of a tensor whose data are all its values, such as Λ. They change in place."""

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


class Plain(Whole):
    """The place of an ordinary parameter of a module, whose data are all its values."""

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        """Take a module and the name of its parameter."""
        self._owner, self._attribute = owner, attribute
        self._tensor = owner._parameters[attribute]  # type: ignore[assignment]  # it has one

    def write(self, value: Tensor) -> None:
        """Replace the current parameter, which an exported program may hold, by one with these values, not trained."""
        parameter = nn.Parameter(value, requires_grad=False)
        parameter.__dict__.update(vars(self._tensor))  # what libraries set on parameters
        self._owner._parameters[self._attribute] = parameter

    def keep(self) -> Kept:
        """Return the parameter."""
        return Kept(self._tensor)

    def restore(self, values: Any) -> None:
        """Put a parameter back, on the device and in the dtype of the current one."""
        own = self._tensor
        if values.device != own.device or values.dtype != own.dtype:
            values.data = values.data.to(device=own.device, dtype=own.dtype)
        self._owner._parameters[self._attribute] = values


_asked: dict[str, list[Callable[..., Any]]] = defaultdict(list)  # methods of keepers by name, as they registered


class Keeper:
    """Answers functions of this file that ask about values kept elsewhere, by methods of their names in subclasses."""

    def __init_subclass__(cls) -> None:
        keeper = cls()
        for question in vars(cls):
            if not question.startswith("_"):
                assert question in globals(), f"no function here asks {question}"
                _asked[question].append(getattr(keeper, question))


def place_of(owner: nn.Module, attribute: str) -> Place:
    """Return the place of a module's parameter or buffer."""
    for ask in _asked["place_of"]:
        found: Place | None = ask(owner, attribute)
        if found is not None:
            return found
    buffers = owner._buffers  # without a get() in TorchScript's modules
    if attribute in buffers and (buffer := buffers[attribute]) is not None:
        return place_at(buffer)
    parameter = owner._parameters[attribute]
    place = None if parameter is None else place_at(parameter)
    return Plain(owner, attribute) if place is None or type(place) is Whole else place


def place_at(tensor: Tensor) -> Place:
    """Return the place of a tensor that is not a parameter of the model, such as Λ or a copy that an adapter trains."""
    is_marked = type(tensor) not in (Tensor, nn.Parameter) or bool(vars(tensor))  # as all that are kept elsewhere are
    for ask in _asked["place_at"] if is_marked else ():
        place: Place | None = ask(tensor)
        if place is not None:
            return place
    return Whole(tensor)


def identities(owner: nn.Module, attribute: str, tensor: Tensor) -> tuple[object, ...]:
    """Return keys of a module's parameter, one of which is equal for those that share, or shared, its memory."""
    if is_lazy(tensor):
        return ()
    if not tensor.is_meta:
        is_plain = type(tensor.data) is Tensor and tensor.numel() > 0
        return ((tensor.device, tensor.data_ptr()) if is_plain else id(tensor),)
    place = place_of(owner, attribute) if tensor.numel() > 0 else None
    return (id(tensor), *(place.identities if place is not None and place.is_loaded_on_call else ()))


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's own data are always all its values."""
    return isinstance(place_at(tensor), Whole) and whole_only_inside(tensor) is None


def whole_only_inside(tensor: Tensor) -> str | None:
    """Return what to do to have all values of a tensor, if its data are these only for a while; else ``None``."""
    return next((advice for ask in _asked["whole_only_inside"] if (advice := ask(tensor)) is not None), None)


def why_incomplete(model: nn.Module) -> str | None:
    """Return why a model, given with what wraps it, has not all values here, and what to do; else ``None``."""
    return next((problem for ask in _asked["why_incomplete"] if (problem := ask(model)) is not None), None)


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before a keeper of its parameters changed it."""
    for ask in _asked["own_class"]:
        kind = ask(kind)
    return kind


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of a module may load or move its parameters."""
    return any(ask(module) for ask in _asked["is_hooked"])


def loaded_modules(modules: Iterable[nn.Module]) -> dict[int, str | None]:
    """Return the modules that are loaded for each call, by id, with the class that each is loaded with, if any."""
    modules = list(modules)
    return {key: around for ask in _asked["loaded_modules"] for key, around in ask(modules).items()}


def whole(tensor: Tensor) -> Tensor:
    """Return all values of a tensor: the tensor itself if its data are all values; else a collective."""
    return place_at(tensor).whole()


def values_within(values: Tensor, part: Part) -> Tensor:
    """Return a part of a parameter, given all its values."""
    for dim, spans in enumerate(part):
        values = take_spans(values, spans, dim)
    return values


def ranks_of(parameters: Iterable[Tensor], *, is_written: bool = False) -> Ranks | None:
    """Return the processes that together hold some parameters; ``None`` if each has all of them.

    If values are written, parameters that are whole on this process now (as small ones of ZeRO-3 always are) count too,
    because every process writes its own piece. An `AdapterError` is raised if no mesh has all of these processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    parameters = list(parameters)
    found = (ask(parameters, is_written=is_written) for ask in _asked["ranks_of"])
    return next((ranks for ranks in found if ranks is not None), None)


def settle(model: nn.Module) -> None:
    """Have a model hold its parameters as they are between its calls, whichever keepers they have."""
    if isinstance(model, nn.Module):  # the caller refuses others
        for ask in _asked["settle"]:
            ask(model)

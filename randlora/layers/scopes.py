"""Where code that reads a parameter gets it with updates: in a call of its module, or of a module around it.

There the attribute includes the updates of a `ReadWeight`, and has the dtype that the module computes with. Everywhere
else it is the parameter itself, for code that saves, moves, shards, resizes or initializes a model. In compiled code
every read counts as in a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora.bases.basis import is_exporting
from randlora.errors import AdapterError
from randlora.functional.scratch import is_in_backward
from randlora.places import loaded_modules
from randlora.replaced import CASTS

Weights = dict[tuple[int, str, bool, int, bool], Tensor]
"""Values that a forward has read and keeps until it ends, by the owner's id, attribute, and all they depend on."""


class Forward(NamedTuple):
    """A forward of a module that has weights that are read."""

    owner: nn.Module
    read: Weights


_here = threading.local()
"""``calls``: the number of running calls of modules around such weights. ``forward``: the innermost `Forward`."""
_here.calls = 0  # in the thread that imports, or the first program that it compiles would be compiled again


def begin_call(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001  # a hook's signature
    """Begin a call of a module around weights that are read. Traced by the compiler, for code that is not compiled."""
    if not is_exporting():
        _here.calls = getattr(_here, "calls", 0) + 1


def end_call(module: nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG001
    """End such a call, even if it raised, perhaps before `begin_call`; after an interrupt, no hooks run."""
    if not is_exporting():
        _here.calls = max(getattr(_here, "calls", 0) - 1, 0)


def is_in_call() -> bool:
    """Whether this thread is in a call of an adapted model, or of a module around weights that are read."""
    return getattr(_here, "calls", 0) > 0


def has_updates(owner: nn.Module) -> bool:
    """Whether reading a weight of a module includes its updates."""
    if torch.compiler.is_compiling() or is_in_backward():  # which computes what is checkpointed again
        return True
    forward: Forward | None = getattr(_here, "forward", None)
    if forward is not None and (owner is forward.owner or any(each is owner for each in forward.owner.children())):
        return True
    return is_in_call() and not loaded_modules([owner])  # for a call, it is loaded before the forward, without updates


@contextmanager
def forward_of(owner: nn.Module) -> Iterator[Weights]:
    """Within the block, read the weights of a module and of modules in it with updates; yield what was read so far."""
    outer = getattr(_here, "forward", None)
    _here.forward = forward = Forward(owner, {})
    try:
        yield forward.read
    finally:
        _here.forward = outer


def run_forward(owner: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a forward that reads the module's weights, and return its result."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    outer, _here.forward = getattr(_here, "forward", None), Forward(owner, {})  # `forward_of`, without its generator
    try:
        return forward(*args, **kwargs)
    finally:
        _here.forward = outer


def read_so_far() -> Weights | None:
    """Return what the innermost forward has read, if one runs."""
    forward: Forward | None = getattr(_here, "forward", None)
    return None if forward is None else forward.read


class ReadAttribute:
    """A descriptor through which code reads a parameter: in a call with updates and cast, else as it is."""

    def __init__(self, attribute: str) -> None:
        """Create the attribute for a parameter of this name."""
        self.attribute = attribute

    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return self
        name, parameters = self.attribute, owner._parameters
        layer = owner.randlora.get(name)
        if name in owner.__dict__:
            if layer is not None and layer.active() and has_updates(owner):
                raise AdapterError(
                    f"the {name} of an adapted {owner.randlora_base.__name__} is now a plain tensor without the "
                    "updates of its adapters, such as in a replica of nn.DataParallel, or after pruning or "
                    "weight_norm: use DistributedDataParallel, or merge or eject the adapters first"
                )
            return owner.__dict__[name]
        parameter = parameters[name] if name in parameters else None  # noqa: SIM401  # ZeRO-3 does not see a get()
        if parameter is None:
            return nn.Module.__getattr__(owner, name)
        if not has_updates(owner):
            return parameter
        try:
            return cast(owner, name, parameter if layer is None else layer.read(owner))
        except AttributeError as error:  # else Python would call nn.Module.__getattr__, which returns the parameter
            raise RuntimeError(f"cannot compute the adapted {name}: {error}") from error

    def __set__(self, owner: nn.Module, value: Any) -> None:
        """Set something else than a parameter, which `nn.Module` registers."""
        owner.__dict__[self.attribute] = value

    def __delete__(self, owner: nn.Module) -> None:
        try:
            del owner.__dict__[self.attribute]
        except KeyError:
            raise AttributeError(self.attribute) from None


def cast(owner: nn.Module, attribute: str, value: Tensor) -> Tensor:
    """Return the value of a module's attribute in the dtype that the module computes with."""
    dtype = owner.__dict__.get(CASTS, {}).get(attribute)
    return value if dtype is None else value.to(dtype)

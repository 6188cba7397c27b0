"""Running the code of a model so that nothing remains of it: values, attributes and random states are as before."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.model.change import Attributes, set_requires_grad


class Snapshot:
    """What running a model may change, to be restored bit for bit.

    It has the class and the attributes of each object, with the entries of those that are dicts or lists; of each
    parameter and buffer the same, the values and ``requires_grad``; and the states of the random number generators.
    What a forward changes inside other objects, such as a cache that a module holds, is not included.
    """

    def __init__(
        self, modules: Iterable[nn.Module], others: Iterable[object] = (), copies: Snapshot | None = None
    ) -> None:
        """Take a snapshot.

        Args:
            modules: Modules, with all inside them.
            others: Further objects.
            copies: An earlier snapshot, whose copies of values are taken where nothing has changed since.
        """
        inside = {id(each): each for module in modules for each in module.modules()}
        tensors = {
            id(tensor): tensor
            for module in inside.values()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None and not is_lazy(tensor)
        }
        self._values: list[_Values]
        self._objects = [Attributes(each) for each in (*inside.values(), *tensors.values(), *others)]
        earlier = {} if copies is None else {id(held.tensor): held for held in copies._values}
        self._values = [_Values(tensor, earlier.get(key)) for key, tensor in tensors.items()]
        devices = {tensor.device for tensor in tensors.values()} - {torch.device("meta")}
        self._random = _RandomStates(device for device in devices if device.type != "cpu")

    def restore(self, *, thoroughly: bool = False) -> None:
        """Restore everything; unless ``thoroughly``, of values only those that torch knows to have been written."""
        for attributes in self._objects:
            attributes.restore()
        for values in self._values:
            values.restore(thoroughly=thoroughly)
        self._random.restore()


@contextmanager
def undone(modules: Iterable[nn.Module], others: Iterable[object] = ()) -> Iterator[Snapshot]:
    """Run a block and restore everything that it has changed in some modules, also if it raises."""
    snapshot = Snapshot(modules, others)
    try:
        yield snapshot
    finally:
        snapshot.restore(thoroughly=True)


class _Values:
    """The values of one tensor, and whether it requires grad."""

    def __init__(self, tensor: Tensor, earlier: _Values | None) -> None:
        self.tensor, self.data, self.requires_grad = tensor, tensor.data, tensor.requires_grad
        self.version = _version(tensor)
        is_plain = type(self.data) is Tensor and not tensor.is_meta
        is_as_earlier = earlier is not None and earlier.is_untouched()
        self.copy: Tensor | None = None
        if is_as_earlier and earlier is not None:
            self.copy = earlier.copy
        elif is_plain:
            self.copy = self.data.to("cpu", copy=True)

    def is_untouched(self) -> bool:
        """Whether torch knows of no change of the values."""
        is_same = self.tensor.data_ptr() == self.data.data_ptr() and self.tensor.dtype == self.data.dtype
        return is_same and self.version is not None and _version(self.tensor) == self.version

    def restore(self, *, thoroughly: bool) -> None:
        """Restore the values."""
        if self.copy is not None and (thoroughly or not self.is_untouched()):
            if self.tensor.data_ptr() != self.data.data_ptr() or self.tensor.dtype != self.data.dtype:
                self.tensor.data = self.data
            if not torch.equal(_bits(self.data).to("cpu"), _bits(self.copy)):
                with torch.inference_mode(self.tensor.is_inference()):
                    self.data.copy_(self.copy)
            self.version = _version(self.tensor)
        set_requires_grad(self.tensor, self.requires_grad)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class _RandomStates:
    """The states of all generators that a forward may draw from."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.python, self.cpu = random.getstate(), torch.get_rng_state()
        self.numpy = np.random.get_state()  # noqa: NPY002  # models draw from it
        self.devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Restore them."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            module: Any = torch.get_device_module(device)
            module.set_rng_state(state, device)

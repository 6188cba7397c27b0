"""Parameters and buffers whose values accelerate keeps in RAM or on disk, and loads for each call of their module.

Such a parameter is on the meta device between calls. Its values are in the ``weights_map`` of a hook of the module,
which is a dict or a loader of files. They are read there, and never written. accelerate is imported only if a module
has one of its hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.layers.in_place import plain_class
from randlora.places import Keeper, Place
from randlora.replaced import table_of

HOOK = "_hf_hook"  # the attribute of a module in which accelerate keeps its hook, or several hooks combined


class StoredAt(NamedTuple):
    """Where one hook finds the values of a parameter: under a key of a dict or of accelerate's loader of files."""

    store: Any
    key: str

    @property
    def identity(self) -> object:
        """A key that is equal for entries with the same memory or the same tensor in a file."""
        in_memory = self.store if isinstance(self.store, dict) else self.store.state_dict
        if self.key in in_memory:
            return in_memory[self.key].device, in_memory[self.key].data_ptr()
        kept = self.store.index[self.key]
        path = kept.get("safetensors_file")
        return (self.store.save_folder, self.key) if path is None else (str(path), kept.get("weight_name", self.key))


class Offloaded(Place):
    """The place of a parameter or buffer that accelerate offloads: its entry in the map that a hook loads it from."""

    is_loaded_on_call = True

    def __init__(
        self, owner: nn.Module, attribute: str, tensor: Tensor, entries: list[StoredAt], device: torch.device
    ) -> None:
        """Take a module, its parameter or buffer, an entry for each of its hooks, and the device that it runs on."""
        self._owner, self._attribute, self._tensor = owner, attribute, tensor
        self._entries, self._device = entries, device

    @property
    def identities(self) -> tuple[object, ...]:
        """Keys of the entries, and of parameters that a hook records as tied (but not to which others)."""
        tied = (
            (id(hook.tied_params_map), self._tensor.shape, self._tensor.dtype)
            for hook in offloading_hooks(self._owner)
            if self._attribute in hook.tied_params_names
        )
        return (*(entry.identity for entry in self._entries), *tied)

    def read(self) -> Tensor:
        """Return the values as the module's forward would get them."""
        store, key = self._entries[-1]  # accelerate loads from one hook after the other
        return store[key].detach().to(self._device, self._tensor.dtype)  # type: ignore[no-any-return]

    whole = read

    def write(self, value: Tensor) -> None:  # noqa: ARG002
        """Refuse to write, because other models may read the same map or files."""
        raise MergeError("accelerate offloads the weight: call accelerate.hooks.remove_hook_from_submodules(model)")


def offloading_hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks with which accelerate offloads a module's parameters, if there are any."""
    if (hook := module.__dict__.get(HOOK)) is None:
        return
    from accelerate.hooks import AlignDevicesHook  # type: ignore[import-untyped]  # noqa: PLC0415

    for each in getattr(hook, "hooks", [hook]):
        if isinstance(each, AlignDevicesHook) and each.offload:
            yield each


def _entry(weights_map: Any, name: str) -> StoredAt | None:
    """Return where a map has a parameter, or ``None`` if it is a map of a different kind."""
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset  # type: ignore[import-untyped]  # noqa: PLC0415

    while isinstance(weights_map, PrefixedDataset):
        weights_map, name = weights_map.dataset, f"{weights_map.prefix}{name}"
    if isinstance(weights_map, OffloadedWeightsLoader):  # which would load a tensor to say whether it has it
        is_here = name in weights_map.state_dict or name in weights_map.index
    else:
        is_here = isinstance(weights_map, dict) and name in weights_map
    return StoredAt(weights_map, name) if is_here else None


class Offloading(Keeper):
    """Keeps parameters where a hook of accelerate loads them from."""

    def place_of(self, owner: nn.Module, attribute: str) -> Offloaded | None:
        """Return the place of a module's parameter or buffer if accelerate offloads it by itself, else ``None``.

        ``None`` too if it is loaded together with a whole module around it, or from a map of a different kind.
        """
        if HOOK not in vars(owner) or not (hooks := list(offloading_hooks(owner))):
            return None
        entries = [entry for hook in hooks if (entry := _entry(hook.weights_map, attribute)) is not None]
        if len(entries) < len(hooks) or (tensor := table_of(owner, attribute).get(attribute)) is None:
            return None
        device = hooks[-1].execution_device
        device = torch.device("cpu") if device is None else torch.empty(0, device=device).device
        return Offloaded(owner, attribute, tensor, entries, torch.device("cpu") if device.type == "meta" else device)

    def is_hooked(self, module: nn.Module) -> bool:
        """Whether a module has a hook of accelerate."""
        return HOOK in module.__dict__

    def loaded_modules(self, modules: Iterable[nn.Module]) -> dict[int, str | None]:
        """Return which modules have parameters that accelerate loads."""
        found: dict[int, str | None] = {}
        for module in modules:
            for hook in offloading_hooks(module) if HOOK in vars(module) else ():
                if hook.place_submodules:
                    found |= dict.fromkeys(map(id, module.modules()), plain_class(module).__name__)
                else:
                    found.setdefault(id(module), None)
        return found

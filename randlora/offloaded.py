"""Parameters and buffers whose values accelerate keeps in RAM or on disk, and loads for each call of their module.

Such a parameter is on the meta device between calls. Its values are in the ``weights_map`` of a hook of the module,
which is a dict or a loader of files. Values are written into the dict. Existing files are left as they are, because
they may be a checkpoint or a folder that another model reads too: new values go to a new file, which the loader is told
to read. accelerate is imported only if a module has one of its hooks.
"""

from __future__ import annotations

import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.layers.in_place import plain_class
from randlora.model.install import register_check
from randlora.places import Keeper, Kept, Place, loaded_modules, register_keeper
from randlora.state import attached_state
from randlora.targets.census import Census

HOOK = "_hf_hook"
"""The attribute of a module in which accelerate keeps its hook, or several hooks combined."""


class MergedFile(str):
    """The path of a file that is deleted when nothing refers to it any more (not even a copy of the model)."""

    def __init__(self, path: str) -> None:
        """Take the path of an existing file."""
        super().__init__()
        weakref.finalize(self, _delete, Path(path), os.getpid())

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedFile:
        """Return the object itself, so that the file lives as long as any copy."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain path, because only the process that wrote the file deletes it."""
        return str, (str(self),)


class Entry(NamedTuple):
    """Where one hook finds the values of a parameter: under a key of a dict or of accelerate's loader of files."""

    store: Any
    key: str

    @property
    def is_file(self) -> bool:
        """Whether the values are in a file."""
        return not isinstance(self.store, dict) and self.key not in self.store.state_dict

    @property
    def held(self) -> dict[str, Any]:
        """The dict that has the values or, for a file, the loader's entry about it."""
        if isinstance(self.store, dict):
            return self.store
        found: dict[str, Any] = self.store.index if self.is_file else self.store.state_dict
        return found

    @property
    def identity(self) -> object:
        """A key that is equal for entries with the same memory or the same tensor in a file."""
        kept = self.held[self.key]
        if not self.is_file:
            return kept.device, kept.data_ptr()
        path = kept.get("safetensors_file")
        return (self.store.save_folder, self.key) if path is None else (str(path), kept.get("weight_name", self.key))

    @property
    def folder(self) -> str:
        """The folder for a file with new values: the folder of the offloaded weights, else one for temporary files."""
        return str(self.store.save_folder or tempfile.gettempdir())

    def read(self, kept: Any) -> Tensor:
        """Return the values that an entry of `held` stands for."""
        if not self.is_file:
            return kept  # type: ignore[no-any-return]
        loader = type(self.store)(save_folder=self.store.save_folder, index={self.key: kept})
        return loader[self.key]  # type: ignore[no-any-return]

    def put(self, kept: Any) -> None:
        """Set the entry of `held`."""
        if self.is_file:  # the index may be an argument of the caller's, who would load the values into other models
            self.store.index = {**self.store.index, self.key: kept}
        else:
            self.held[self.key] = kept

    def write(self, value: Tensor) -> None:
        """Set the values."""
        self.put(_in_a_file(self.folder, self.key, value) if self.is_file else value)


Entries = tuple[tuple[Entry, Any], ...]
"""The former entries of a parameter."""


class Offloaded(Place):
    """The place of a parameter or buffer that accelerate offloads: its entry in the map that a hook loads it from.

    Attributes:
        entries: The entry of each hook of the module; a module used in two places has two hooks.
    """

    def __init__(self, owner: nn.Module, attribute: str, entries: tuple[Entry, ...], device: torch.device) -> None:
        """Take a module, the name of a parameter or buffer, its entries and the device that the module runs on."""
        self._owner, self._attribute, self.entries, self._device = owner, attribute, entries, device

    @property
    def folder(self) -> str | None:
        """The folder to which `write` adds a file, or ``None`` if the values are in RAM."""
        return next((entry.folder for entry in self.entries if entry.is_file), None)

    @property
    def is_away(self) -> bool:
        """Whether the parameter is not loaded now."""
        return self._tensor.is_meta

    @property
    def identities(self) -> tuple[object, ...]:
        """Keys of the entries, and of parameters that a hook records as tied (but not to which others)."""
        tied = (
            (id(hook.tied_params_map), self._tensor.shape, self._tensor.dtype)
            for hook in offloading_hooks(self._owner)
            if self._attribute in hook.tied_params_names
        )
        return (*(entry.identity for entry in self.entries), *tied)

    def read(self) -> Tensor:
        """Return the values as the module's forward would get them."""
        return self._read(self._now())

    def whole(self) -> Tensor:
        """Return the values."""
        return self.read()

    def keep(self) -> Kept:
        """Return the entries: tensors, or the places of files."""
        return Kept(self._now(), self)

    def _now(self) -> Entries:
        return tuple((entry, entry.held[entry.key]) for entry in self.entries)

    def write(self, value: Tensor) -> None:
        """Set the values: in the dict, or in a new file."""
        value = value.detach().to("cpu")
        for entry in self.entries:
            entry.write(value)
        self._renew(value)

    def restore(self, values: Entries) -> None:
        """Restore kept entries, or write their values if the parameter has been offloaded again since."""
        value = self._read(values)
        if not self.has_stores_of(entry for entry, _ in values):
            self.write(value)
            return
        for entry, each in values:
            entry.put(each)
        self._renew(value)

    def has_stores_of(self, entries: Iterable[Entry]) -> bool:
        """Whether a hook loads the parameter from where some entries are, so it has not been offloaded again since."""
        return [id(entry.store) for entry in entries] == [id(entry.store) for entry in self.entries]

    def stored(self, values: Entries) -> Tensor | None:
        """Return kept values if the parameter is loaded now. Otherwise a state dict has no values for it."""
        return None if self._tensor.is_meta else self._read(values)

    @property
    def _tensor(self) -> Tensor:
        found = _tensor(self._owner, self._attribute)
        assert found is not None, "it is offloaded"
        return found

    def _read(self, values: Entries) -> Tensor:
        entry, value = values[-1]  # accelerate loads from one hook after the other
        return entry.read(value).detach().to(self._device, self._tensor.dtype)

    def _renew(self, value: Tensor) -> None:
        """Set the values of a parameter that is loaded, as inside ``accelerate.utils.align_module_device``."""
        if not self._tensor.is_meta:
            self._tensor.data = value.to(self._tensor.device, self._tensor.dtype)


def offloading_hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks with which accelerate offloads a module's parameters, if there are any."""
    if (hook := module.__dict__.get(HOOK)) is None:
        return
    from accelerate.hooks import AlignDevicesHook  # type: ignore[import-untyped]  # noqa: PLC0415

    for each in getattr(hook, "hooks", [hook]):
        if isinstance(each, AlignDevicesHook) and each.offload:
            yield each


def _tensor(owner: nn.Module, attribute: str) -> Tensor | None:
    held = owner._parameters.get(attribute)
    return owner._buffers.get(attribute) if held is None else held


def _entry(weights_map: Any, name: str) -> Entry | None:
    """Return where a map has a parameter, or ``None`` if it cannot be written there."""
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset  # type: ignore[import-untyped]  # noqa: PLC0415

    while isinstance(weights_map, PrefixedDataset):
        weights_map, name = weights_map.dataset, f"{weights_map.prefix}{name}"
    if isinstance(weights_map, OffloadedWeightsLoader):  # which would load a tensor to say whether it has it
        is_here = name in weights_map.state_dict or name in weights_map.index
    else:
        is_here = isinstance(weights_map, dict) and name in weights_map
    return Entry(weights_map, name) if is_here else None


def _in_a_file(folder: str, key: str, value: Tensor) -> dict[str, Any]:
    """Write values to a new file, and return what accelerate's loader needs to know of it."""
    name = re.sub(r"[^\w.-]", "_", key)[-100:]
    descriptor, path = tempfile.mkstemp(prefix=f"randlora-merged-{name}-", suffix=".safetensors", dir=folder)
    os.close(descriptor)
    owned = MergedFile(path)  # deleted at once if it cannot be written
    save_file({key: value.contiguous()}, path)
    return {"safetensors_file": owned, "weight_name": key, "dtype": str(value.dtype).removeprefix("torch.")}


def _delete(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a process forked from this one ends earlier
        path.unlink(missing_ok=True)


@register_keeper
class Offloading(Keeper):
    """Keeps parameters where a hook of accelerate loads them from."""

    def place_of(self, owner: nn.Module, attribute: str) -> Offloaded | None:
        """Return the place of a module's parameter or buffer if accelerate offloads it by itself, else ``None``.

        ``None`` too if it is loaded together with a whole module around it, or from a map that cannot be written to.
        """
        if HOOK not in vars(owner) or not (hooks := list(offloading_hooks(owner))):
            return None
        entries = [_entry(hook.weights_map, attribute) for hook in hooks]
        found = tuple(entry for entry in entries if entry is not None)
        if _tensor(owner, attribute) is None or not found or len(found) < len(entries):
            return None
        device = hooks[-1].execution_device
        device = torch.device("cpu") if device is None else torch.empty(0, device=device).device
        return Offloaded(owner, attribute, found, torch.device("cpu") if device.type == "meta" else device)

    def is_hooked(self, module: nn.Module) -> bool:
        """Whether a module has a hook of accelerate."""
        return HOOK in module.__dict__

    def holders(self, owner: nn.Module) -> list[object]:
        """Return the maps and loaders that hooks load a module's parameters from."""
        found: dict[int, object] = {}
        for hook in offloading_hooks(owner) if HOOK in vars(owner) else ():
            holder = hook
            within = hook.weights_map
            while (inner := getattr(within, "dataset", None)) is not None:
                holder, within = within, inner
            is_plain = not isinstance(getattr(within, "__dict__", None), dict)
            found[id(within)] = holder if is_plain else within  # a dict is the attribute of another object
        return list(found.values())

    def loads(self, modules: Iterable[nn.Module]) -> dict[int, str | None]:
        """Return which modules have parameters that accelerate loads; see `loaded_modules`."""
        found: dict[int, str | None] = {}
        for module in modules:
            for hook in offloading_hooks(module) if HOOK in vars(module) else ():
                if hook.place_submodules:
                    found |= dict.fromkeys(map(id, module.modules()), plain_class(module).__name__)
                else:
                    found.setdefault(id(module), None)
        return found


@register_check(lambda module: attached_state(module) is not None)
def require_merged_weights(root: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001  # a hook's signature
    """Raise a `MergeError` if accelerate loads the original weights of a model whose adapters are merged.

    accelerate takes what `state_dict` returns. While adapters are merged reversibly, these are the original weights.
    """
    state = attached_state(root)
    if HOOK not in root.__dict__ or state is None or not state.is_merged:
        return
    census = Census.of(root)
    loaded = loaded_modules(census.modules)
    for site in census.adapted:
        unmerged = site.layer.unmerged
        if unmerged is None or id(site.owner) not in loaded:
            continue
        before, now = unmerged.place, site.place
        if not (isinstance(before, Offloaded) and isinstance(now, Offloaded) and now.has_stores_of(before.entries)):
            raise MergeError(
                f"{site.fqn}: accelerate offloaded the model while its adapters were merged reversibly, and loads the "
                "original weights, without the updates: call randlora.unmerge(model), or offload the model before "
                "the merge, or merge with reversible=False"
            )

"""Averaging the gradients of adapters that were added to a model after `fully_shard`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from randlora.placement.averaged import DataMeshes, average
from randlora.placement.dtensor import all_fsdp_modules, fsdp_modules, is_dtensor
from randlora.replaced import ReplacedParameter
from randlora.state import ModelState
from randlora.targets.match import shortened

Part = tuple[nn.Module, AdapterLayer, str]
"""An adapter of one weight: the module, its adapter layer, and the adapter's name."""


class Averaging:
    """What of a model's adapters is averaged, and over which mesh, at the end of every backward.

    A hook on each parameter notices a backward. Before each forward of the model, or of a part that is sharded by
    itself, parameters that are new since, as from ``to_empty`` or ``load_state_dict(assign=True)``, get the hook too.

    Attributes:
        meshes: The mesh of each adapter of each weight.
    """

    def __init__(self, root: nn.Module) -> None:
        """Watch the forward of the model that has the adapters, and of its parts that `fully_shard` was called on."""
        self.meshes: dict[tuple[AdapterLayer, str], Any] = {}
        self._root = root
        self._backward: int | None = None
        watched = dict.fromkeys([root, *fsdp_modules(root.modules())])
        self._handles: list[RemovableHandle] = [each.register_forward_pre_hook(self) for each in watched]

    def __call__(self, part: nn.Module, *args: object) -> None:  # noqa: ARG002  # of a hook
        """Have the gradients averaged of what a part of the model trains now."""
        for parameter, _ in self._trained(part):
            hooks = parameter._post_accumulate_grad_hooks or {}  # private, for want of another
            if self._notice not in hooks.values():
                parameter.register_post_accumulate_grad_hook(self._notice)

    def end(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def _notice(self, parameter: Tensor) -> None:  # noqa: ARG002  # of a hook
        """Average at the end of the backward that runs; one that failed before its end is not waited for."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            engine: Any = Variable._execution_engine  # as fully_shard itself does
            engine.queue_callback(self._average)

    def _average(self) -> None:
        by_mesh: dict[Any, list[nn.Parameter]] = {}
        for parameter, mesh in self._trained(self._root):
            by_mesh.setdefault(mesh, []).append(parameter)
        for mesh, parameters in by_mesh.items():
            average(parameters, mesh)

    def _trained(self, part: nn.Module) -> Iterator[tuple[nn.Parameter, Any]]:
        """Yield Λ and Γ of a part of the model that are trained and whole in every process, each with its mesh."""
        for owner in part.modules():
            for layer in adapter_layers_of(owner).values():
                for name in layer.adapters:
                    if (mesh := self.meshes.get((layer, name))) is None:
                        continue
                    for parameter in layer.diagonals_of(owner, name):
                        if parameter.requires_grad and not is_dtensor(parameter):
                            yield parameter, mesh


def average_gradients(
    root: nn.Module, state: ModelState, added: Sequence[Part], replaced: Iterable[ReplacedParameter]
) -> None:
    """Have the gradients of adapters that are added averaged, if `fully_shard` has sharded a part of the model.

    Raises:
        AdapterError: If the adapters train copies of parameters that are not sharded, which nothing would average.
    """
    require_averaged(root, added, replaced)
    meshes = _meshes_of(root, added)
    if meshes:
        state.averaging = state.averaging or Averaging(root)
        state.averaging.meshes |= meshes
        state.averaging(root)


def require_averaged(root: nn.Module, trained: Sequence[Part], replaced: Iterable[ReplacedParameter]) -> None:
    """Check that the copies of parameters that adapters train are sharded, if `fully_shard` has sharded another part.

    Raises:
        AdapterError: If they are not.
    """
    copies = [entry.name for entry in replaced if not entry.is_lost and not is_dtensor(entry.live)]
    if copies and _meshes_of(root, trained):
        raise AdapterError(
            f"cannot train copies of {shortened(copies)}, not sharded in a model of which fully_shard has sharded "
            "another part, because every process would train its own: inject before fully_shard"
        )


def _meshes_of(root: nn.Module, parts: Sequence[Part]) -> dict[tuple[AdapterLayer, str], Any]:
    """Return the mesh of each adapter of each weight, if `fully_shard` has sharded a part of the model."""
    if not all_fsdp_modules(root):
        return {}
    found = DataMeshes.of(root)
    meshes = {(layer, name): found.mesh_for(layer.weight_of(owner)) for owner, layer, name in parts}
    return {key: mesh for key, mesh in meshes.items() if mesh is not None}

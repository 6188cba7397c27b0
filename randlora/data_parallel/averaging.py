"""Averaging the gradients of adapters that were added to a model after `fully_shard`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from randlora.data_parallel.average import DataMeshes, average
from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from randlora.model.engines import Engine, Parts, register_engine
from randlora.placement.dtensor import all_fsdp_modules, fsdp_modules, is_dtensor
from randlora.replaced import ReplacedParameter
from randlora.state import ModelState
from randlora.targets.match import shortened


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

    def rename(self, layers: Container[AdapterLayer], name: str, to: str) -> None:
        """Follow a new name of the adapter of some layers."""
        self.meshes = {
            (layer, to if layer in layers and known == name else known): mesh
            for (layer, known), mesh in self.meshes.items()
        }

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


@register_engine
class FullyShard(Engine):
    """`fully_shard`, which averages gradients of the parameters that it has sharded, and of no others."""

    def require_averaged(self, root: nn.Module, parts: Parts, replaced: Iterable[ReplacedParameter]) -> None:
        """Check that the copies that adapters train are sharded, if another part of the model is."""
        copies = [entry.name for entry in replaced if not entry.is_lost and not is_dtensor(entry.live)]
        if copies and _meshes_of(root, parts):
            raise AdapterError(
                f"cannot train copies of {shortened(copies)}, not sharded in a model of which fully_shard has sharded "
                "another part, because every process would train its own: inject before fully_shard"
            )

    def added(self, root: nn.Module, state: ModelState, parts: Parts) -> None:
        """Have the gradients of Λ and Γ averaged, if a part of the model is sharded."""
        if meshes := _meshes_of(root, parts):
            state.averaging = state.averaging or Averaging(root)
            state.averaging.meshes |= meshes
            state.averaging(root)


def _meshes_of(root: nn.Module, parts: Parts) -> dict[tuple[AdapterLayer, str], Any]:
    """Return the mesh of each adapter of each weight, if `fully_shard` has sharded a part of the model."""
    if not all_fsdp_modules(root):
        return {}
    found = DataMeshes.of(root)
    meshes = {(layer, name): found.mesh_for(layer.weight_of(owner)) for owner, layer, name in parts}
    return {key: mesh for key, mesh in meshes.items() if mesh is not None}

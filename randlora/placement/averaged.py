"""Averaging gradients of parameters that were added to a module after `fully_shard`, which does not know them.

`fully_shard` averages the gradients of the parameters that a module had when it was called. Those that are added later
stay whole in every process, and without an average each process would train its own, silently.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.placement.dtensor import all_fsdp_modules


class DataMeshes(NamedTuple):
    """The meshes over which `fully_shard` averages the gradients of a model; the data differ on their processes.

    Attributes:
        by_weight: Those of sharded parameters, by their identity.
        others: All that there are in the model.
    """

    by_weight: dict[int, Any]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> DataMeshes:
        """Find the meshes of a model that holds its shards, also of what a module around it has sharded."""
        within = {id(module) for module in model.modules()}
        by_weight: dict[int, Any] = {}
        others: dict[Any, None] = {}
        for module in all_fsdp_modules(model):
            for group in _groups(module):
                mesh = group.mesh_info.mesh
                by_weight |= {id(each.sharded_param): mesh for each in group.fsdp_params}
                if id(module) in within:
                    others[mesh] = None
        return cls(by_weight, tuple(others))

    def mesh_for(self, weight: Tensor | None) -> Any:
        """Return the mesh for what is trained beside a weight; ``None`` if no part of the model is sharded.

        Raises:
            AdapterError: If the weight is not sharded, and the rest of the model is over more than one mesh.
        """
        if (mesh := self.by_weight.get(id(weight))) is not None or not self.others:
            return mesh
        if len(self.others) > 1:
            raise AdapterError(
                "cannot train an adapter of a weight that is not sharded in a model that fully_shard has sharded over "
                "several meshes, because it cannot be told over which to average gradients: inject before fully_shard"
            )
        return self.others[0]


def _groups(module: Any) -> list[Any]:
    """Return what `fully_shard` keeps of the parameters that it manages for a module; private, for want of another."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if groups is None and state._fsdp_param_group else list(groups or ())


def average_gradient(parameter: nn.Parameter, mesh: Any, index: int) -> None:
    """Have every backward average the gradient of a parameter over a mesh; nothing if it does so already.

    The average of a gradient that was accumulated from averages is that gradient, so steps can be accumulated.

    Args:
        parameter: A parameter that is whole in every process.
        mesh: The mesh.
        index: A number that the parameter, and no other, has in every process.
    """
    hooks = parameter._post_accumulate_grad_hooks or {}  # private, for want of another
    if not any(isinstance(hook, _Average) for hook in hooks.values()):
        parameter.register_post_accumulate_grad_hook(_Average(mesh, index))


class _Average:
    """Averages the gradient of a parameter, in place."""

    def __init__(self, mesh: Any, index: int) -> None:
        self._mesh, self._index = mesh, index

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None, "it was accumulated"
        # of a weight that is offloaded to the CPU, where NCCL does not communicate
        there = grad.to(self._mesh.device_type)
        # processes that have gradients of different parameters, as of experts that are modules, would mix them
        bounds = torch.tensor([self._index, -self._index], device=there.device)
        for group in self._mesh.get_all_groups():
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
            if bounds.tolist() != [self._index, -self._index]:
                raise AdapterError(
                    "this backward gave gradients to different adapted layers in different processes, so they cannot "
                    "be averaged: inject before fully_shard, or have every process use every layer in each step"
                )
            dist.all_reduce(there, group=group)
        grad.copy_(there.div_(self._mesh.size()))

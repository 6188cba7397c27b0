"""Averaging gradients of parameters that were added to a module after `fully_shard`, which does not know them.

`fully_shard` averages the gradients of the parameters that a module had when it was called. Those that are added later
stay whole in every process, and without an average each process would train its own, silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.placement.dtensor import all_fsdp_modules

BUCKET = 2**24
"""About how many numbers are averaged in one collective; 64 MiB in float32."""


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


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter], mesh: Any) -> None:
    """Average the gradients of parameters over the processes of a mesh, in place; a collective for each bucket of them.

    A process that has no gradient of a parameter counts as zero, and gets the average where another process has one, as
    when each uses other experts. The average of a gradient that was accumulated from averages is that gradient, so
    steps can be accumulated. The host waits for the device only where a gradient is missing.

    Args:
        parameters: Parameters that are whole in every process, the same ones in the same order.
        mesh: The mesh.
    """
    for bucket in _buckets(parameters):
        # of a weight that is offloaded to the CPU, where NCCL does not communicate
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in bucket]
        there = [each.to(mesh.device_type).flatten() for each in gradients]
        has_one = [float(each.grad is not None) for each in bucket]
        joined = torch.cat([*there, there[0].new_tensor(has_one)])
        for group in mesh.get_all_groups():
            dist.all_reduce(joined, group=group)
        *averages, counts = joined.split([*(each.numel() for each in bucket), len(bucket)])
        torch._foreach_div_(averages, mesh.size())
        anywhere = has_one if all(has_one) else counts.tolist()
        for parameter, gradient, mean, count in zip(bucket, gradients, averages, anywhere, strict=True):
            if count:
                parameter.grad = gradient.copy_(mean.view_as(gradient))


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Split parameters into lists with about `BUCKET` numbers each."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        bucket.append(parameter)
        held += parameter.numel()
        if held >= BUCKET:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket

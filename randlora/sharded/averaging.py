"""Averages the gradients of adapters that were added to a model after `fully_shard`, which does not know them.

The average is one collective at the end of a backward, for up to 64 MiB of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from randlora.sharded.places import fsdp_modules, is_dtensor

BUCKET = 2**24
"""About how many numbers are averaged in one collective: 64 MiB in float32."""


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter], mesh: Any) -> None:
    """Average the gradients of parameters, whole in every process of a mesh, in place: one collective for each bucket.

    A process without a gradient of a parameter counts as zero, and gets the average if a different one has it, as with
    experts. Steps can be accumulated: averages stay as they are. The host waits only if a gradient is missing.
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


class Averaging:
    """Averages the gradients of a model's adapters, each over its mesh, once at the end of every backward.

    A hook on each parameter notices a backward; before a forward, new parameters get it too. Reentrant checkpointing
    runs a backward for each of its blocks, inside of the one that was called: only the end of the outermost counts.

    Attributes:
        meshes: The mesh of each adapter of each weight.
    """

    def __init__(self, root: nn.Module) -> None:
        """Watch the forward of the model that has the adapters, and of its parts that `fully_shard` was called on."""
        self.meshes: dict[tuple[AdapterLayer, str], Any] = {}
        self._root = root
        self._noticed: set[int] = set()
        watched = dict.fromkeys([root, *fsdp_modules(root.modules())])
        self._handles: list[RemovableHandle] = [each.register_forward_pre_hook(self) for each in watched]

    def __call__(self, part: nn.Module, *args: object) -> None:  # noqa: ARG002  # of a hook
        """Have the gradients averaged for all parameters that a part of the model trains now."""
        for parameter, _ in self._trained(part):
            hooks = parameter._post_accumulate_grad_hooks or {}  # private, for want of another
            if self._notice not in hooks.values():
                parameter.register_post_accumulate_grad_hook(self._notice)

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _notice(self, *_: object) -> None:
        """Have `_end` called at the end of the backward that runs now; one that fails before is not waited for."""
        backward = torch._C._current_graph_task_id()
        if backward not in self._noticed:
            self._noticed.add(backward)
            engine: Any = Variable._execution_engine  # as fully_shard itself does
            engine.queue_callback(self._end)

    def _end(self) -> None:
        """Average, or have the next operations of the backward around the one that has ended notice it.

        Where there are none, the average is taken now: one more changes no result.
        """
        operation: Any = torch._C._current_autograd_node()
        following = [] if operation is None else [each for each, _ in operation.next_functions if each is not None]
        for each in following:
            _once_before(each, self._notice)
        if not following:
            self._noticed.clear()
            self._average()

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


def _once_before(operation: Any, call: Callable[[], object]) -> None:
    """Call a function before the next run of an operation of a backward."""

    def before(*_: object) -> None:
        handle.remove()
        call()

    handle: RemovableHandle = operation.register_prehook(before)

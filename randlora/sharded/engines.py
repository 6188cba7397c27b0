"""Engines that average gradients over processes: `fully_shard`, `DistributedDataParallel` and DeepSpeed's.

They average those of the parameters that a model had when they were made. Without more, processes would silently train
different copies of others: after `fully_shard`, their gradients are averaged here; other engines are made anew.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from randlora.errors import AdapterError, warn
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from randlora.model.install import Engine, Parts
from randlora.replaced import ReplacedParameter
from randlora.sharded.places import all_fsdp_modules, flattening, fsdp_modules, is_dtensor, is_spread
from randlora.state import ModelState
from randlora.targets.match import shortened

BUCKET = 2**24  # about how many numbers are averaged in one collective: 64 MiB in float32


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
    bucket, held = list[nn.Parameter](), 0
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
    """

    def __init__(self, root: nn.Module) -> None:
        """Watch the forward of the model that has the adapters, and of its parts that `fully_shard` was called on."""
        self.meshes: dict[tuple[AdapterLayer, str], Any] = {}  # of each adapter of each weight
        self._root = root
        self._noticed: set[int] = set()
        self._handles = [each.register_forward_pre_hook(self) for each in {root, *fsdp_modules(root.modules())}]

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
        if following:
            return
        self._noticed.clear()
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


def _groups(module: Any) -> list[Any]:
    """Return what `fully_shard` keeps of the parameters that it manages for a module; private, for want of another."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if groups is None and state._fsdp_param_group else list(groups or ())


class FullyShard(Engine):
    """`fully_shard`, which averages only the gradients of parameters that it has sharded."""

    def require_averaged(self, root: nn.Module, parts: Parts, replaced: Sequence[ReplacedParameter]) -> None:
        """Check that the copies that adapters train are sharded, if any other part of the model is."""
        copies = [entry.name for entry in replaced if not entry.is_lost and not is_dtensor(entry.live)]
        if copies and _meshes_of(root, parts):
            raise AdapterError(
                f"cannot train copies of {shortened(copies)}: they are not sharded, but fully_shard has sharded other "
                "parts of the model, so every process would train a different copy; inject before fully_shard"
            )

    def added(self, root: nn.Module, state: ModelState, parts: Parts) -> None:
        """Have the gradients of Λ and Γ averaged, if a part of the model is sharded."""
        if meshes := _meshes_of(root, parts):
            state.averaging = state.averaging or Averaging(root)
            state.averaging.meshes |= meshes
            state.averaging(root)


def _meshes_of(root: nn.Module, parts: Parts) -> dict[tuple[AdapterLayer, str], Any]:
    """Return the mesh over which `fully_shard` averages gradients for each adapter of each weight, if it does.

    It is the mesh of the weight, which a module around the model may have sharded, else the only mesh in the model.
    """
    within = {id(module) for module in root.modules()}
    by_weight: dict[int, Any] = {}
    others: dict[Any, None] = {}
    for module in all_fsdp_modules(root):
        for group in _groups(module):
            mesh = group.mesh_info.mesh
            by_weight |= {id(each.sharded_param): mesh for each in group.fsdp_params}
            others |= {mesh: None} if id(module) in within else {}
    meshes: dict[tuple[AdapterLayer, str], Any] = {}
    for owner, layer, name in parts:
        if (mesh := by_weight.get(id(layer.find_weight(owner)))) is None and len(others) > 1:
            raise AdapterError(
                "cannot train an adapter of a weight that is not sharded in a model that fully_shard has sharded over "
                "several meshes, because it is unknown over which to average gradients: inject before fully_shard"
            )
        if mesh is not None or others:
            meshes[layer, name] = next(iter(others)) if mesh is None else mesh
    return meshes


_SEEN: weakref.WeakSet[Any] = weakref.WeakSet()
"""Engines that were found before, so that switching between adapters need not look for them each time."""


class Reducers(Engine):
    """`DistributedDataParallel` and engines of DeepSpeed, which know only the parameters that they were made with."""

    def changed(self, root: nn.Module) -> None:
        """Warn of parameters that require grad and that the engine around the model does not know."""
        if not _are_several():
            return  # then there is no engine, or nothing to average
        wanting = ((name, each) for name, each in root.named_parameters() if each.requires_grad)
        trained = {name: each for name, each in wanting if type(each.data) is Tensor}  # a DTensor needs no wrapper
        own = {id(parameter) for parameter in root.parameters()}
        if not trained or _unknown(trained, own) == []:
            return
        _look_for_engines()
        if _unknown(trained, own):
            gc.collect()  # an engine that was given up may still be here, as part of a cycle
        if unknown := _unknown(trained, own):
            warn(
                f"{shortened(unknown)} requires grad, and the {type(_of(own)[0]).__name__} around the model was made "
                "before and does not know it: every process would train a different copy. Wrap the model again after "
                "this call"
            )

    def is_first_copy(self, model: nn.Module) -> bool:
        """Whether this is the first of the processes that train copies of a model, as the engines around it say."""
        if not _are_several():
            return True
        _look_for_engines()
        own = {id(parameter): parameter for parameter in model.parameters()}
        is_one = any(map(is_spread, own.values()))  # which the processes of ZeRO-3 hold together
        engines = [each for each in _of({*own}) if isinstance(each, DistributedDataParallel) or not is_one]
        engines += flattening(model)
        return all(dist.get_rank(_group(engine)) == 0 for engine in engines)


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _group(engine: Any) -> Any:
    """Return the group of the processes that an engine runs in; ``None`` means all."""
    names = "process_group", "seq_data_parallel_group"  # of torch's engines, of DeepSpeed's
    return next((group for name in names if (group := getattr(engine, name, None)) is not None), None)


def _look_for_engines() -> None:
    """Find all engines that there are."""
    library: Any = sys.modules.get("deepspeed")
    kinds = [DistributedDataParallel] if library is None else [DistributedDataParallel, library.DeepSpeedEngine]
    every = tuple(_with_subclasses(kinds))
    _SEEN.update(each for each in gc.get_referrers(*every) if type(each) in every)


def _with_subclasses(kinds: Iterable[type]) -> Iterator[type]:
    for kind in kinds:
        yield kind
        yield from _with_subclasses(kind.__subclasses__())


def _of(own: set[int]) -> list[Any]:
    """Return the engines that hold some of these parameters."""
    return [each for each in _SEEN if not own.isdisjoint(map(id, each.parameters()))]


def _unknown(trained: Mapping[str, nn.Parameter], own: set[int]) -> list[str] | None:
    """Return which parameters no engine knows or was told to ignore; ``None`` if the model is in no engine."""
    if not (engines := _of(own)):
        return None
    known: set[int] = set()
    for engine in engines:
        known.update(_averaged(engine) if isinstance(engine, DistributedDataParallel) else _optimized(engine))
    return [name for name, parameter in trained.items() if id(parameter) not in known]


def _averaged(wrapper: DistributedDataParallel) -> Iterator[int]:
    """Yield the ids of the parameters whose gradients DDP averages, and of those that it was told to ignore."""
    for bucket in wrapper.reducer._get_zeros_like_grad_buckets():
        yield from map(id, bucket.parameters())
    ignored = wrapper.parameters_to_ignore
    yield from (id(each) for name, each in wrapper.module.named_parameters() if name in ignored)


def _optimized(engine: Any) -> Iterator[int]:
    """Yield the ids of the parameters that DeepSpeed trains: with ZeRO its optimizer has them in groups beside it."""
    optimizer = engine.optimizer
    for groups in ("bit16_groups", "fp16_groups"):  # ZeRO 1 and 2; ZeRO 3 and its fp16 optimizer
        yield from (id(each) for group in getattr(optimizer, groups, ()) for each in group)
    for group in getattr(optimizer, "param_groups", ()):
        yield from map(id, group["params"])

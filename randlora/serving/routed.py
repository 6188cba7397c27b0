"""`routed`: each row of a batch through its own adapter, and the calls of a model or its parts in such a block.

A call may be of any module with adapted layers inside: transformers' ``generate`` calls an encoder itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.hooks import RemovableHandle

from randlora.blocks import uncompiled
from randlora.errors import AdapterError, raise_collected
from randlora.hints import shortly
from randlora.layers.in_place import adapter_layers_of
from randlora.model.install import lost_sites, offloaded_diagonals
from randlora.model.listing import adapter_parameters
from randlora.model.switch import without_active
from randlora.model.view import require_own
from randlora.places import is_whole, place_at
from randlora.ranks import agree, agreeing
from randlora.serving.labels import first_dimension
from randlora.serving.routing import CALL, Routing, RunningCall
from randlora.serving.run import RowByRow
from randlora.serving.tracking import RowTracking
from randlora.state import CHANGING, ModelState, adapted_root, require_unmerged
from randlora.targets.census import Census

BATCHES = "input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids"
"""Names of inputs of transformers' models that have a batch."""

WITHOUT_ROWS = ("cache_position",)  # names of inputs without a batch, even if they have as many entries

GROWING = "mask", "past", "cache"
"""Parts of the names of inputs that grow in each step of ``generate``, while their rows stay in place."""

REPEATING = "num_beams", "num_return_sequences"
"""Options with which ``generate`` makes several sequences of each row, one after the other."""

SEQUENCES_PER_ROW: ContextVar[int] = ContextVar("SEQUENCES_PER_ROW", default=0)
"""How many sequences the ``generate`` that this thread or task is in makes of each row; 0 outside of it."""


def routed(model: nn.Module, names: Sequence[str | None]) -> AbstractContextManager[None]:
    """Run each row of a batch through its own adapter inside a ``with`` block, whichever adapters are active.

    A linear layer computes the base once for the whole batch, and adapters with the same bases share the product with
    them. Convolutions, attention and experts run once for each adapter, with its rows. Gradients are the same as with
    single adapters. If parts of the model are checkpointed, call ``backward`` inside the block. All processes that hold
    parts of a sharded model enter the block together.

    Inside transformers' ``generate``, a row may become several, such as for beams. Blocks can be nested, including with
    `randlora.disabled`; the innermost counts. Each thread and each task of asyncio has its own blocks. In a copy or a
    pickle of the model that is made inside, no adapter is active, and a warning says so; starting a process that would
    get one raises an `AdapterError`.

    Args:
        model: A model with adapters.
        names: The adapter of each row, or ``None`` for the base alone.

    Raises:
        AdapterError: If a name is unknown, an adapter trained further parameters with ``train_also``, the adapters are
            merged, or processes that hold the model together have rows of adapters that they would mix up. Inside the
            block: if a call of the model has a different number of rows, or a layer's rows are unknown.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, name="a")
        >>> _ = randlora.inject(model, r=4, name="b", seed=1)
        >>> with randlora.serving.routed(model, ["a", "b", None]):
        ...     y = model(torch.randn(3, 8))
    """
    return block_of(model, routing_of(names))


@contextmanager
def block_of(model: nn.Module, routing: RowByRow) -> Iterator[None]:
    """Run a block of `routed` for some rows, in which the model's calls are watched and compiled code runs as it is."""

    def checked(census: Census, state: ModelState) -> RowByRow:
        require_unmerged(state, "route")
        require_own(census, state, "route")
        problems = state.unknown(routing.adapters) + [
            f"{name!r} trained {', '.join(trained)} with train_also or train_rows, and the model can use only one copy "
            "for all rows: activate it alone"
            for name in routing.adapters
            if name in state.adapters and (trained := [*state.adapters[name].trained, *state.adapters[name].rows])
        ]
        raise_collected(AdapterError, problems, doing="route")
        used = [state.adapters[name] for name in routing.adapters]
        raise_collected(AdapterError, [*lost_sites(census, used), *offloaded_diagonals(census)], doing="route")
        state.require_exchangeable([], "route")
        parameters = [*adapter_parameters(census, *used)]
        routing.keeps = all(map(is_whole, {type(part): part for part in parameters}.values()))
        _require_alike(census, state, routing)
        return routing

    with without_active(model, checked), uncompiled():
        entries = _Entries(*adapted_root(model), routing)
        try:
            yield
        finally:
            entries.close()


def routing_of(names: Any) -> RowByRow:
    """Return the routing for some names, of whatever type was given."""
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str) and bool(names)
    strange = [each for each in names if each is not None and not isinstance(each, str)] if is_sequence else [names]
    if strange:
        raise AdapterError(f"expected for each row the name of an adapter or None, got {shortly(strange[0])}")
    return RowByRow(names)


def _require_alike(census: Census, state: ModelState, routing: RowByRow) -> None:
    """Raise an `AdapterError` in all processes if they would mix up values or gradients of the adapters of their rows.

    Values that a forward gathers must be used in the same order, and gradients of shards are mixed up if a process has
    none. A backward without any adapter averages no gradients of whole Λ and Γ, for which other processes would wait.
    """
    if agreeing() is None:
        return
    used = {name: [*adapter_parameters(census, state.adapters[name])] for name in routing.adapters}
    trained = {
        name: {place_at(each).part is not None for each in parameters if each.requires_grad}
        for name, parameters in (used.items() if torch.is_grad_enabled() else ())
    }
    is_gathered = any(place_at(each).is_gathered_by_use for parameters in used.values() for each in parameters)
    order = (routing.adapters, routing.index.tolist()) if is_gathered else None
    sharded = sorted(name for name, are_sharded in trained.items() if True in are_sharded)
    is_averaged = state.averaging is not None and any(False in are_sharded for are_sharded in trained.values())
    own = order, sharded, is_averaged
    if any(each != own for each in agree(own)):
        raise AdapterError(
            "cannot route: the processes that hold this model together have rows of different adapters, whose values "
            "or gradients would be mixed up: name the same adapter for each row in all of them or, without ZeRO-3, "
            "inject after the model is sharded and give each a row of any adapter, or route under torch.no_grad()"
        )


class _Hook:
    """A hook of a module. In a copy or a pickle of the module it does nothing."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args) if self.call is not None else None

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


class _Entries:
    """The hooks that watch, in one block, the calls of each module that has adapted ones inside."""

    def __init__(self, root: nn.Module, state: ModelState, routing: RowByRow) -> None:
        self.state, self.routing = state, routing
        self.handles: list[RemovableHandle] = []
        self.methods: list[_Method] = []
        for module in root.modules():
            is_adapted = module is not root and adapter_layers_of(module)
            if is_adapted or not any(map(adapter_layers_of, module.modules())):
                continue
            libraries = {parent.__module__.partition(".")[0] for parent in type(module).__mro__}
            for (library, name), call in METHODS.items():
                if library in libraries and hasattr(type(module), name):
                    self.methods.append(_Method.put(module, name, call))
            self.handles.append(module.register_forward_pre_hook(_Hook(self.begin), with_kwargs=True))
            self.handles.append(module.register_forward_hook(_Hook(self.end), always_call=True))

    def close(self) -> None:
        self.leave()  # calls that an interrupt has left running
        for handle in self.handles:
            handle.remove()
        for method in self.methods:
            method.remove()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Begin a call, unless it is inside another one. Without ``kwargs``, another thread has removed this hook."""
        routing = self.routing
        if self.state.run is not routing or kwargs is None:  # the innermost block of this thread counts
            return
        if torch.compiler.is_compiling():
            raise AdapterError(
                "a program cannot be exported or compiled in a block of routed: export one adapter, or merge it; "
                "compile before the block, in which compiled models run uncompiled"
            )
        running = [call.module for call in routing.calls()]
        if running and module not in running:  # an interrupt may have left one of this module, and one inside of it
            return
        self.leave()
        name, inputs = type(module).__name__, {**dict(enumerate(args)), **kwargs}
        tensors = [*_tensors(inputs)]
        if not tensors:
            raise AdapterError(f"routed expects a tensor with a batch, but {name} was called without one")
        shape = tensors[0][1].shape
        index = routing.index.repeat_interleave(_times(routing, shape, name))
        own = [(key, x) for key, x in tensors if x.shape[0] == len(index) and key not in WITHOUT_ROWS]
        lengths = tuple((key, x.shape) for key, x in own if not any(part in str(key) for part in GROWING))
        flags = tuple((key, each) for key, each in inputs.items() if each is None or isinstance(each, bool | str))
        kind = module, module.training, len(index), lengths, flags
        call = RunningCall(routing, module, kind, index, outer=CALL.get())
        CALL.set(call)
        if routing.is_uniform or kind in routing.followed:
            return
        call.tracking = RowTracking()
        for _, x in own:
            call.tracking.set(x, first_dimension(x.shape))
        call.tracking.__enter__()

    def end(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG002
        """End a call, even if it raised."""
        call = self.routing.call
        if call is None or call.module is not module:
            return
        self.leave()
        if call.tracking is not None and output is not None:
            self.routing.followed.add(call.kind)

    def leave(self) -> None:
        while (call := self.routing.call) is not None:
            if call.tracking is not None:
                if _get_current_dispatch_mode() is call.tracking:
                    call.tracking.__exit__(None, None, None)
                call.tracking.stop()
            CALL.set(call.outer)


class _Method:
    """A replacement for a module's method while blocks are open. A copy of the module has the method itself."""

    def __init__(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        """Put it there; ``call`` is given this object, and the arguments."""
        self.module, self.name, self.call, self.blocks = module, name, call, 0
        self.own: Callable[..., Any] = getattr(module, name)
        self.before = vars(module).get(name)
        vars(module)[name] = self

    @classmethod
    def put(cls, module: nn.Module, name: str, call: Callable[..., Any]) -> _Method:
        """Return the replacement for one more block, which is there already if another block is open."""
        with CHANGING:
            found = vars(module).get(name)
            method = found if isinstance(found, _Method) else cls(module, name, call)
            method.blocks += 1
            return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, args, kwargs)

    def remove(self) -> None:
        """Put the method back, unless another block is open."""
        with CHANGING:
            self.blocks -= 1
            if self.blocks:
                return
            if self.before is None:
                del vars(self.module)[self.name]
            else:
                vars(self.module)[self.name] = self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.name)  # a copy has no attributes then


def _generate(method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a model's ``generate``, taking into account how many sequences it makes of each row."""
    model: Any = method.module
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = given, getattr(model, "generation_config", None)  # not every model that generates has one
    before = times = SEQUENCES_PER_ROW.get()
    for name in REPEATING:  # given by name or in a config, or the model's own
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        times = max(times, next((value for value in values if value is not None), 1))
    SEQUENCES_PER_ROW.set(times)
    try:
        return method.own(*args, **kwargs)
    finally:
        SEQUENCES_PER_ROW.set(before)


def _refuse_to_sort(method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:  # noqa: ARG001
    """Refuse to call a method that sorts texts."""
    raise AdapterError(
        f"{method.name} of sentence-transformers sorts texts by length, and routed cannot tell the rows of its "
        "batches: call the model with model.preprocess(texts), or activate one adapter at a time"
    )


METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    ("transformers", "generate"): _generate,
    **dict.fromkeys([("sentence_transformers", "encode"), ("sentence_transformers", "predict")], _refuse_to_sort),
}
"""What is called in place of methods of a library's models."""


def _tensors(inputs: Mapping[Any, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yield the tensors of a call with dimensions, and their names, those first that are known to have a batch."""
    positional = [name for name in inputs if isinstance(name, int)]
    names = [*positional, *(name for name in BATCHES if name in inputs)]
    for name in [*names, *(name for name in inputs if name not in names)]:
        value = inputs[name]
        if isinstance(value, Tensor):
            if not value.is_nested and value.dim():
                yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, list | tuple):
            yield from ((name, x) for _, x in _tensors(dict(enumerate(value))))


def _times(routing: Routing, shape: torch.Size, name: str) -> int:
    """Return how many times the batch of a call of a module has each row, one after the other."""
    rows, size, times = len(routing.index), shape[0], SEQUENCES_PER_ROW.get()
    if size == rows or (times and (size == rows * times or (size % rows == 0 and routing.is_uniform))):
        return size // rows
    if times and size % rows == 0:
        raise AdapterError(
            f"routed was given names for {rows} rows, of which generate makes {rows * times}, but {name} was called "
            f"with {size}, which the model arranges itself, as for guidance_scale: turn that off, or activate one "
            "adapter at a time"
        )
    raise AdapterError(
        f"routed was given names for {rows} rows, but {name} was called with an input of shape {tuple(shape)}, which "
        f"has {size}: give a name or None for each"
    )

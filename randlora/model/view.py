"""How a verb begins and ends: one thread at a time opens an adapted model, and a verb that raises changes nothing.

The checks of a call find most reasons for it to fail, and hold until the change is made, because only one thread at a
time changes models. What no check can foresee, such as a lack of memory or an interrupt, is undone.
"""

from __future__ import annotations

import keyword
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from randlora.errors import AdapterError, raise_collected
from randlora.functional.scratch import count_modes
from randlora.hints import shortly
from randlora.layers.diagonals import TAKEN_NAMES, Diagonal, Values
from randlora.layers.in_place import has_attribute
from randlora.places import place_at, ranks_of, settle
from randlora.ranks import agreeing, raise_on_every_rank
from randlora.replaced import ReplacedParameter, held_at
from randlora.state import ATTRIBUTE, CHANGING, ModelState, adapted_root, attached_state, require_unmerged
from randlora.targets.census import Census, Site
from randlora.targets.left_out import foreign_adapters

Given = ParamSpec("Given")
Result = TypeVar("Result")

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    **dict.fromkeys(
        ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"), "module"
    ),
}
"""Types that wrap a whole model, to compile it or to send gradients, and the attribute with the model."""


def is_held_together(model: nn.Module, *, is_written: bool = False) -> bool:
    """Whether several processes together hold an adapted model, and all must call functions on it; see `ranks_of`."""
    settle(model)  # after a forward, whole copies may be in the places of shards
    return ranks_of(model.parameters(), is_written=is_written) is not None


@contextmanager
def together(model: Any, *, writes: bool) -> Iterator[None]:
    """Raise an error in all processes that hold a model if the block, a whole verb, raised one in any of them."""
    ranks, unsettled = None, None
    if isinstance(model, nn.Module):  # the caller refuses others
        try:
            with CHANGING:
                settle(model)
        except Exception as error:  # raised when it is known by whom
            unsettled = error
        ranks = ranks_of(model.parameters(), is_written=writes)
    with raise_on_every_rank(ranks):
        if unsettled is not None:
            raise unsettled
        yield


def collective(*, writes: bool) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Return a decorator that has a function of a model, its first argument, run in a block of `together`."""

    def decorate(verb: Callable[Given, Result]) -> Callable[Given, Result]:
        @wraps(verb)
        def run_together(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            with together(args[0] if args else kwargs.get("model"), writes=writes):
                return verb(*args, **kwargs)

        return run_together

    return decorate


@dataclass(frozen=True)
class View:
    """An adapted model while a verb looks at it or changes it."""

    root: nn.Module  # with the adapters: the model itself, or a module inside it, such as in a wrapper
    state: ModelState
    census: Census


@contextmanager
def opened(model: nn.Module, doing: str | None, *, writes: bool = False) -> Iterator[View]:
    """Open an adapted model for one verb, while other threads wait, and undo a block that ``writes`` and raises.

    ``doing`` is what it does with all layers, such as ``"merge"``, or ``None`` if these may belong to any module.
    """
    with CHANGING:
        settle(model)  # after a forward, whole copies may be in the places of shards
        root, state = adapted_root(model)
        view = View(root, state, Census.of(root))
        if doing is not None:
            require_own(view.census, state, doing)
        with all_or_nothing(view.census, state) if writes else nullcontext():
            yield view


@contextmanager
def opened_to_add(model: nn.Module, names: Iterable[str], doing: str) -> Iterator[View]:
    """Open a model, adapted or not, for a verb that adds adapters of these names; its state may not be attached yet."""
    with CHANGING:
        settle(model)
        census = Census.of(model)
        if (attribute := held_at(model, WRAPPERS)) is not None:
            raise AdapterError(
                f"cannot {doing} in a {type(model).__name__}: call this on the wrapped model.{attribute}"
            )
        if attached_state(model) is None and has_attribute(model, ATTRIBUTE):
            raise AdapterError(f"cannot {doing}: the model already has an attribute {ATTRIBUTE}; rename it")
        raise_collected(AdapterError, foreign_adapters(census), doing=doing)
        is_faking = count_modes() > 0 and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if is_faking or any(isinstance(held.tensor, FakeTensor) for held in census.parameters):
            raise AdapterError(
                f"cannot {doing}: FakeTensorMode makes tensors without values: leave it, and build the model on "
                "torch.device('meta')"
            )
        state = attached_state(model) or ModelState()
        state.adopt_parameters(model)
        require_own(census, state, doing)
        if unfit := [held.fqn for held in census.parameters if not held.tensor.is_leaf]:
            raise AdapterError(f"cannot {doing}: {unfit[0]} is not a leaf tensor and cannot be frozen; detach it")
        require_unmerged(state, doing)
        for name in names:
            # torch.export writes the names of parameters as code
            is_name = isinstance(name, str) and name and name.isprintable() and "." not in name
            if not is_name or keyword.iskeyword(name) or name in TAKEN_NAMES:
                raise AdapterError(
                    f"cannot {doing} an adapter named {shortly(name)}: expected a printable name without dots, "
                    "not an attribute of ParameterDict or a keyword of Python"
                )
            if name in state.adapters:
                advice = "load makes the adapter: leave out inject, or call randlora.swap for its values; " * (
                    doing == "load"
                )
                raise AdapterError(
                    f"cannot {doing} {name!r}: the model has an adapter of that name; {advice}remove it, or choose a "
                    "different name"
                )
        yield View(model, state, census)


def require_own(census: Census, state: ModelState, doing: str) -> None:
    """Raise an `AdapterError` if a layer belongs to adapters of a different module, such as a copied layer."""
    for site in census.adapted:
        if site.layer.state is not state:
            raise AdapterError(
                f"cannot {doing} here: {site.fqn} has adapters that were added to a different module (a submodule, a "
                "parent or a copy of this one); call this on that module, or replace the layer"
            )


@contextmanager
def all_or_nothing(
    census: Census,
    state: ModelState,
    sites: Iterable[Site] = (),
    replaced: Iterable[ReplacedParameter] = (),
    flags: Iterable[Tensor] = (),
) -> Iterator[None]:
    """Undo everything that the block has changed if it raises: modules, parameters, and the state with its adapters.

    ``sites``, ``replaced`` and the ``flags`` of Λ and Γ are to be changed, beside those of the state. Processes that
    agree do this if it raised in any. Values written in place are restored for sharded parameters with copies alone.
    """
    replaced, adapters = [*state.replaced.values(), *replaced], state.adapters.values()
    sites = [*sites, *census.adapted]
    owners = {id(site.owner): site.owner for site in sites}
    inside = [child for owner in owners.values() for child in owner._modules.values()]
    parameters = [held.tensor for held in census.parameters]
    objects = chain[object](
        census.modules,
        inside,
        (each._parameters for each in inside if isinstance(each, Diagonal) and isinstance(each._parameters, Values)),
        parameters,
        replaced,
        (state, state.activation, state.bank),
        state.bank,
        adapters,
        chain.from_iterable(site.layer_class.beside(site.owner) for site in sites),
        (site.layer for site in census.adapted),
    )
    tensors: list[Tensor] = [own for owner in owners.values() for own in owner._parameters.values() if own is not None]
    tensors += [copy for adapter in adapters for copy in adapter.trained.values()]
    tensors += [each for entry in replaced for each in (entry.original, entry.installed)]
    places = [place_at(entry.installed) for entry in replaced]
    kept = [(place, place.keep()) for place in places if place.exchanges == "values"]
    try:
        with unchanged_if_raised(objects, tensors, [*parameters, *flags]):
            try:
                with raise_on_every_rank(agreeing()):
                    yield
            except BaseException:
                for place, before in kept:
                    place.restore(before.values)
                raise
    except BaseException:
        for site in census.adapted:
            site.layer.number()
        raise


@contextmanager
def unchanged_if_raised(
    objects: Iterable[object], tensors: Iterable[Tensor], flags: Iterable[Tensor] = ()
) -> Iterator[None]:
    """If the block raises, restore objects as `_remembered` says, the data and flags of tensors, and further flags."""
    restore, tensors = _remembered(objects), [*tensors]
    required_grad = [(each, each.requires_grad) for each in (*tensors, *flags)]
    data = [(each, own) for each in tensors if not is_lazy(each) and type(own := each.data) is Tensor]
    try:
        yield
    except BaseException:
        restore()
        for tensor, own in data:
            if tensor.data_ptr() != own.data_ptr() or tensor.dtype != own.dtype:
                tensor.data = own
        for tensor, flag in required_grad:
            set_requires_grad(tensor, flag)
        raise


def set_requires_grad(tensor: Tensor, flag: bool) -> None:  # noqa: FBT001
    """Set ``requires_grad``. For integers, such as a weight that was quantized since, it stays ``False``."""
    if tensor.requires_grad == flag or (flag and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)):
        return
    is_inference = not is_lazy(tensor) and tensor.is_inference()
    with torch.inference_mode(is_inference):  # of a model built in this mode it can be set in it alone
        tensor.requires_grad = flag  # the method does not work on uninitialized parameters


def _remembered(objects: Iterable[object]) -> Callable[[], None]:
    """Return what restores the classes and attributes of objects, and the entries of attributes that are containers."""
    # few containers, and none for the many that are empty: the garbage collector goes through each again and again
    held = [*{id(each): each for each in objects if each is not None}.values()]
    classes, attributes_of = [type(each) for each in held], [dict(vars(each)) for each in held]
    every = (value for attributes in attributes_of for value in attributes.values())
    containers = [value for value in every if isinstance(value, dict | list)]
    entries_of = [(dict if isinstance(each, dict) else list)(each) if each else None for each in containers]

    def restore() -> None:
        for each, kind, attributes in zip(held, classes, attributes_of, strict=True):
            if type(each) is not kind:
                object.__setattr__(each, "__class__", kind)
            each.__dict__.clear()
            each.__dict__.update(attributes)
        for container, entries in zip(containers, entries_of, strict=True):
            if [*map(id, _flat(container))] != [*map(id, _flat(entries))]:  # what cannot change has not
                container.clear()
                if entries:
                    container.update(entries) if isinstance(container, dict) else container.extend(entries)

    return restore


def _flat(entries: Any) -> tuple[Any, ...]:
    return (*entries, *entries.values()) if isinstance(entries, dict) else tuple(entries or ())


@contextmanager
def holding_copies(
    model: nn.Module, others: Iterable[object] = (), copy: Callable[[Tensor], Tensor] = torch.clone
) -> Iterator[None]:
    """Run a block that tries code of a model, which holds copies of its tensors in it, so that none change.

    Modules, others and random number generators are restored. Changes inside other objects, such as a cache that a
    module holds, stay, as do values of tensors on the meta device or of a subclass, which cannot be copied.
    """
    inside = [*model.modules()]
    restore = _remembered((*inside, *others))
    tables: list[Any] = [table for each in inside for table in (each._parameters, each._buffers) if table]
    held = {id(each): each for table in tables for each in table.values() if each is not None and not is_lazy(each)}
    plain = {key: each for key, each in held.items() if type(each.data) is Tensor and not each.is_meta}
    devices = {each.device for each in plain.values() if each.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # models draw from it
    with torch.random.fork_rng([device.index for device in devices], device_type=kind):
        try:
            copies = {key: _copied(each, copy) for key, each in plain.items()}
            for table in tables:
                for name, tensor in [*table.items()]:
                    table[name] = copies.get(id(tensor), tensor)
            yield
        finally:
            restore()
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _copied(tensor: Tensor, copy: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a copy with the class and the attributes of a tensor. A parameter does not require grad."""
    values = copy(tensor)
    if isinstance(values, nn.Parameter) or not isinstance(tensor, nn.Parameter):
        return values
    copied = nn.Parameter(values.detach(), requires_grad=False)
    copied.__class__ = type(tensor)
    copied.__dict__.update(vars(tensor))
    return copied

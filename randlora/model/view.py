"""How a verb begins and ends: one thread at a time opens an adapted model, and a verb that raises changes nothing.

The checks of a call find most reasons for it to fail. Reasons that no check can foresee, such as a lack of memory, an
interrupt or a class that sets attributes in its own way, may still raise in the middle of a change, which is then
undone. The checks hold until the change is made, because only one thread at a time changes models. `undone` restores
modules after a run of their code, which may have changed anything in them.
"""

from __future__ import annotations

import keyword
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.errors import AdapterError, raise_collected
from randlora.hints import shortly
from randlora.layers.diagonals import TAKEN_NAMES, Diagonal, Values
from randlora.layers.in_place import has_attribute
from randlora.model.save_guard import savers
from randlora.modes import fake_obstacle
from randlora.places import holders, place_at, settle
from randlora.ranks import agreeing, raise_on_every_rank
from randlora.replaced import ReplacedParameter, held_at
from randlora.state import ATTRIBUTE, CHANGING, ModelState, adapted_root, attached_state, require_unmerged
from randlora.targets.census import Census, Site
from randlora.targets.obstacles import foreign_adapters

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    **dict.fromkeys(
        ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"), "module"
    ),
}
"""Types that wrap a whole model, and the attribute with the model."""


def unwrapped_model(model: nn.Module) -> nn.Module:
    """Return a model without torch's wrappers around it (for compiling it, or for sending gradients)."""
    while (attribute := held_at(model, WRAPPERS)) is not None:
        model = getattr(model, attribute)
    return model


@dataclass(frozen=True)
class View:
    """An adapted model while a verb looks at it or changes it.

    Attributes:
        root: The module with the adapters: the model itself, or a module inside it, such as in a wrapper.
        state: Its adapters.
        census: Its modules and parameters.
    """

    root: nn.Module
    state: ModelState
    census: Census


@contextmanager
def opened(model: nn.Module, doing: str | None, *, writes: bool = False) -> Iterator[View]:
    """Open an adapted model for one verb, while other threads that want to change a model wait.

    Args:
        model: A model with adapters, or a wrapper around it.
        doing: What the caller is about to do with all layers, for messages, such as ``"merge"``. ``None`` if the layers
            may belong to any module.
        writes: Whether the block changes the model. If it raises, every change is undone.

    Raises:
        AdapterError: If the model has no adapter, or a layer has adapters that were added to another module.
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
    """Open a model, adapted or not, for a verb that adds adapters of these names.

    The view has the model without a wrapper around it, and possibly a state that is not attached yet.
    """
    with CHANGING:
        settle(model)
        census = Census.of(model)
        state = owned_state(census, doing)
        for name in names:
            require_new_name(state, name, doing)
        yield View(model, state, census)


def owned_state(census: Census, doing: str) -> ModelState:
    """Return the model's state, or a new one, after checking that adapters can be added."""
    model = census.model
    if (attribute := held_at(model, WRAPPERS)) is not None:
        raise AdapterError(
            f"cannot {doing} through a {type(model).__name__}, which changes the name of every layer; call this on the "
            f"wrapped model.{attribute}"
        )
    if attached_state(model) is None and has_attribute(model, ATTRIBUTE):
        raise AdapterError(f"cannot {doing}: the model already has an attribute {ATTRIBUTE}; rename it")
    raise_collected(AdapterError, foreign_adapters(census), doing=doing)
    if (reason := fake_obstacle((held.fqn, held.tensor) for held in census.parameters)) is not None:
        raise AdapterError(f"cannot {doing}: {reason}")
    state = attached_state(model) or ModelState()
    state.require_loaded(model)
    state.adopt_parameters(model)
    require_own(census, state, doing)
    unfit = [held.fqn for held in census.parameters if not held.tensor.is_leaf]
    if unfit:
        raise AdapterError(f"cannot {doing}: {unfit[0]} is not a leaf tensor and cannot be frozen; detach it")
    require_unmerged(state, doing)
    return state


def require_new_name(state: ModelState, name: str, doing: str) -> None:
    """Raise an `AdapterError` if a new adapter cannot have this name."""
    # torch.export writes the names of parameters as code
    is_name = isinstance(name, str) and name and name.isprintable() and "." not in name
    if not is_name or keyword.iskeyword(name) or name in TAKEN_NAMES:
        raise AdapterError(
            f"cannot {doing} an adapter named {shortly(name)}: expected a printable name without dots, "
            "not an attribute of ParameterDict or a keyword of Python"
        )
    if name in state.adapters:
        raise AdapterError(
            f"cannot {doing} {name!r}: the model has an adapter of that name; remove it, or choose a different name"
        )


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

    In a block of `raise_on_every_rank` this is also done in the processes in which it did not raise, all of which agree
    at its end. Values written in place are restored only for sharded parameters that adapters train copies of. Nothing
    else here writes in place.

    Args:
        census: The model.
        state: Its state, attached or not.
        sites: The weights that are to be adapted. Those that are adapted are always included.
        replaced: The parameters that are to be replaced by trained copies. Those that are replaced are included too.
        flags: Those of Λ and Γ of which ``requires_grad`` is to be changed. Nothing else of them changes.
    """
    replaced = [*state.replaced.values(), *replaced]
    copies = [copy for adapter in state.adapters.values() for copy in adapter.trained.values()]
    sites = [*sites, *census.adapted]
    owners = {id(site.owner): site.owner for site in sites}
    parts = [part for owner in owners.values() for part in owner._modules.values()]
    objects: list[object] = [
        *(held.tensor for held in census.parameters),
        *census.around_adapted,
        *savers(census),
        *(state, state.activation, state.bank, *state.bank, *state.adapters.values()),
        *replaced,
        *(module for entry in replaced for module, _ in entry.places.values()),
        *owners.values(),
        *parts,
        *(part._parameters for part in parts if isinstance(part, Diagonal) and isinstance(part._parameters, Values)),
        *(each for site in sites for each in site.layer_class.beside(site.owner)),
        *(site.layer for site in census.adapted),
        *(each for owner in owners.values() for each in holders(owner)),
    ]
    values: list[Tensor | None] = [*copies, *(each for entry in replaced for each in (entry.original, entry.installed))]
    values += (tensor for owner in owners.values() for tensor in owner._parameters.values())
    places = [place_at(entry.installed) for entry in replaced]
    kept = [(place, place.keep()) for place in places if place.exchanges == "values"]
    flags = [*flags, *(held.tensor for held in census.parameters)]
    with unchanged_if_raised(objects, values, flags, [site.layer.number for site in census.adapted]):
        try:
            with raise_on_every_rank(agreeing()):
                yield
        except BaseException:
            for place, before in kept:
                place.restore(before.values)
            raise


@contextmanager
def unchanged_if_raised(
    objects: Iterable[object],
    values: Iterable[Tensor | None],
    flags: Iterable[Tensor] = (),
    then: Iterable[Callable[[], object]] = (),
) -> Iterator[None]:
    """If the block raises, restore objects as `Attributes` does, the data of tensors (``values``), and their flags.

    ``then`` are functions to call afterwards.
    """
    held = attributes_of(objects)
    tensors = [each for each in values if each is not None]
    required_grad = [(each, each.requires_grad) for each in (*tensors, *flags)]
    data = [(each, each.data) for each in tensors if not is_lazy(each) and type(each.data) is Tensor]
    try:
        yield
    except BaseException:
        for attributes in held:
            attributes.restore()
        for tensor, own in data:
            if tensor.data_ptr() != own.data_ptr() or tensor.dtype != own.dtype:
                tensor.data = own
        for tensor, flag in required_grad:
            set_requires_grad(tensor, flag)
        for each in then:
            each()
        raise


def set_requires_grad(tensor: Tensor, flag: bool) -> None:  # noqa: FBT001
    """Set ``requires_grad``. For integers, such as a weight that was quantized since, it stays ``False``."""
    if tensor.requires_grad == flag or (flag and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)):
        return
    is_inference = not is_lazy(tensor) and tensor.is_inference()
    with torch.inference_mode(is_inference):  # of a model built in this mode it can be set in it alone
        tensor.requires_grad = flag  # the method does not work on uninitialized parameters


class Attributes(NamedTuple):
    """The class and the attributes of an object, and the entries of attributes that are dicts or lists."""

    owner: Any
    kind: type
    attributes: dict[str, Any]
    entries: list[tuple[Any, Any]]

    def restore(self) -> None:
        """Set the class and the attributes again, and delete new ones."""
        if type(self.owner) is not self.kind:
            object.__setattr__(self.owner, "__class__", self.kind)
        self.owner.__dict__.clear()
        self.owner.__dict__.update(self.attributes)
        for container, before in self.entries:
            entries = before or ({} if isinstance(container, dict) else [])
            if _is_changed(container, entries):  # a dict that cannot change, as diffusers has, is not
                container.clear()
                container.update(entries) if isinstance(container, dict) else container.extend(entries)


def attributes_of(objects: Iterable[object]) -> list[Attributes]:
    """Return the attributes of objects, to be restored."""
    return [
        Attributes(
            each,
            type(each),
            dict(own := vars(each)),
            [
                (held, (dict(held) if isinstance(held, dict) else list(held)) if held else None)  # most are empty
                for held in own.values()
                if isinstance(held, dict | list)
            ],
        )
        for each in {id(each): each for each in objects if each is not None}.values()
    ]


def _is_changed(container: Any, entries: Any) -> bool:
    """Whether a dict or a list has different entries than before, or a different order."""
    if isinstance(container, dict):
        container, entries = ([part for pair in each.items() for part in pair] for each in (container, entries))
    return len(container) != len(entries) or any(own is not was for own, was in zip(container, entries, strict=True))


class Snapshot:
    """Everything that running a model may change, to be restored bit for bit.

    It contains the class and the attributes of each object, with the entries of attributes that are dicts or lists; the
    same for each parameter and buffer, with values and ``requires_grad``; and the states of the random number
    generators. Changes inside other objects, such as a cache that a module holds, are not included.
    """

    def __init__(
        self, modules: Iterable[nn.Module], others: Iterable[object] = (), copies: Snapshot | None = None
    ) -> None:
        """Take a snapshot, with the copies of an earlier one of the values that have not changed since."""
        inside = {id(each): each for module in modules for each in module.modules()}
        tensors = {
            id(tensor): tensor
            for module in inside.values()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None and not is_lazy(tensor)
        }
        self._values: list[_Values]
        self._objects = attributes_of((*inside.values(), *tensors.values(), *others))
        earlier = {} if copies is None else {id(held.tensor): held for held in copies._values}
        self._values = [_Values(tensor, earlier.get(key)) for key, tensor in tensors.items()]
        devices = {tensor.device for tensor in tensors.values()} - {torch.device("meta")}
        self._random = _RandomStates(device for device in devices if device.type != "cpu")

    def restore(self, *, thoroughly: bool = False) -> None:
        """Restore everything; unless ``thoroughly``, only values that torch knows to have been written."""
        for attributes in self._objects:
            attributes.restore()
        for values in self._values:
            values.restore(thoroughly=thoroughly)
        self._random.restore()


@contextmanager
def undone(modules: Iterable[nn.Module], others: Iterable[object] = ()) -> Iterator[Snapshot]:
    """Run a block and restore everything that it has changed in some modules, even if it raises."""
    snapshot = Snapshot(modules, others)
    try:
        yield snapshot
    finally:
        snapshot.restore(thoroughly=True)


class _Values:
    """The values of one tensor, and whether it requires grad."""

    def __init__(self, tensor: Tensor, earlier: _Values | None) -> None:
        self.tensor, self.data, self.requires_grad = tensor, tensor.data, tensor.requires_grad
        self.version = _version(tensor)
        is_plain = type(self.data) is Tensor and not tensor.is_meta
        is_as_earlier = earlier is not None and earlier.is_untouched()
        self.copy: Tensor | None = None
        if is_as_earlier and earlier is not None:
            self.copy = earlier.copy
        elif is_plain:
            self.copy = self.data.to("cpu", copy=True)

    def is_untouched(self) -> bool:
        """Whether torch knows of no change of the values."""
        is_same = self.tensor.data_ptr() == self.data.data_ptr() and self.tensor.dtype == self.data.dtype
        return is_same and self.version is not None and _version(self.tensor) == self.version

    def restore(self, *, thoroughly: bool) -> None:
        """Restore the values."""
        if self.copy is not None and (thoroughly or not self.is_untouched()):
            if self.tensor.data_ptr() != self.data.data_ptr() or self.tensor.dtype != self.data.dtype:
                self.tensor.data = self.data
            if not torch.equal(_bits(self.data).to("cpu"), _bits(self.copy)):
                with torch.inference_mode(self.tensor.is_inference()):
                    self.data.copy_(self.copy)
            self.version = _version(self.tensor)
        set_requires_grad(self.tensor, self.requires_grad)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class _RandomStates:
    """The states of all generators that a forward may draw from."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.python, self.cpu = random.getstate(), torch.get_rng_state()
        self.numpy = np.random.get_state()  # noqa: NPY002  # models draw from it
        self.devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Restore them."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            module: Any = torch.get_device_module(device)
            module.set_rng_state(state, device)

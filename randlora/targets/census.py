"""The census of a model, taken once a call: its modules, its parameters, and its sites, the weights to adapt."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.bases.spec import Shape
from randlora.config import RandLoRAConfig
from randlora.errors import TargetError
from randlora.layers.base import AdapterLayer
from randlora.layers.diagonals import Diagonal
from randlora.layers.in_place import adapter_layers_of
from randlora.layers.registry import FINDERS, Kinds, Refusal, Verdict, find_layer, find_readers
from randlora.places import Place, identities
from randlora.replaced import unwrapped, whole_shape
from randlora.state import require_module
from randlora.targets.match import prefixes

Shapes = dict[str, Shape]  # of adapted weights, by FQN
Key = tuple[int, str]  # what identifies a weight, whatever its name: the id of its module, and the attribute

WEIGHT = AdapterLayer.attribute
DEFAULT = RandLoRAConfig()


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that is or can be adapted.

    Attributes:
        fqn: The name used in files: of the module if its forward is the product with the weight, else of the parameter.
            The first name, if the module is used in several places.
        owner: The module that has the weight.
        layer_class: The class of its adapter layer.
    """

    fqn: str
    owner: nn.Module
    layer_class: type[AdapterLayer]

    @cached_property
    def key(self) -> Key:
        """What identifies the weight."""
        return id(self.owner), self.layer_class.attribute

    @property
    def shape(self) -> Shape:
        """The shape of the update of an adapter with the default options."""
        return self.layer_class.shape_of(self.owner, DEFAULT)

    def shape_with(self, config: RandLoRAConfig) -> Shape:
        """Return the shape of the update of an adapter with these options."""
        return self.layer_class.shape_of(self.owner, config)

    @property
    def weight(self) -> Tensor | None:
        """The parameter without any update, or ``None`` if the owner computes it from others."""
        return self.layer_class.find_weight(self.owner)

    @cached_property
    def place(self) -> Place:
        """Where the values of the weight were when this was first asked."""
        return self.layer_class.place_in(self.owner)

    @property
    def adapter_layer(self) -> AdapterLayer | None:
        """The current adapter layer, if any."""
        return adapter_layers_of(self.owner).get(self.layer_class.attribute)


@dataclass(frozen=True, eq=False)
class AdaptedSite(Site):
    """An adapted weight, with its adapter layer."""

    layer: AdapterLayer


def shapes_of(sites: Iterable[Site], config: RandLoRAConfig) -> Shapes:
    """Return the shapes of an adapter's updates of some sites, by FQN."""
    return {site.fqn: site.shape_with(config) for site in sites}


def sizes(shape: Sequence[int]) -> str:
    """Return a shape as text: ``"20 x 12"``."""
    return " x ".join(map(str, shape))


PARTS = frozenset({"lora_A", "lora_B", "lora_a", "lora_b", "lora_down", "lora_up", "vera_A", "vera_B"})
"""Names of modules that hold a matrix of an adapter, in any library or in users' code."""

ANOTHERS = Refusal("by its name it is part of another adapter, not a layer of the model")


class Visit(NamedTuple):
    """One occurrence of a module in a model."""

    fqn: str
    module: nn.Module


class Candidate(NamedTuple):
    """One occurrence of a module, or of a parameter other than ``weight`` that is adapted where it is read."""

    fqn: str
    module: nn.Module  # or the one that has the parameter
    attribute: str
    entry: type[AdapterLayer] | Refusal | None  # `None` for an unknown type of module

    @property
    def key(self) -> Key:
        """A key that is equal for all occurrences, and equal to `Site.key`."""
        return id(self.module), self.attribute


class Held(NamedTuple):
    """One occurrence of a parameter or buffer in a model: ``module.<attribute>``."""

    fqn: str
    module: nn.Module
    attribute: str
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Census:
    """The modules and parameters of a model, without what adapters added and the wrappers of `WRAPPED_AS`."""

    model: nn.Module
    visits: tuple[Visit, ...]  # all submodules, parents first; a shared module at each of its places

    @classmethod
    def of(cls, model: nn.Module) -> Census:
        """Walk a model. Raise a `TargetError` if it is not a module, or contains itself."""
        require_module(model)
        return cls(model, tuple(_walk(model)))

    def again(self) -> Census:
        """Return a census of the same modules with their current contents."""
        return Census(self.model, self.visits)

    @cached_property
    def parameters(self) -> tuple[Held, ...]:
        """All parameters; a tied one at each of its places."""
        return tuple(
            Held(f"{prefix}{attribute}", module, attribute, parameter)
            for prefix, module in self.prefixed
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        )

    @cached_property
    def buffers(self) -> tuple[Held, ...]:
        """All buffers that a state dict has; a tied one at each of its places."""
        return tuple(
            Held(f"{prefix}{attribute}", module, attribute, buffer)
            for prefix, module in self.prefixed
            if module._buffers
            for attribute, buffer in saved_buffers(module)
        )

    @cached_property
    def tensors(self) -> tuple[Held, ...]:
        """All parameters and buffers that a state dict has; a tied one at each of its places."""
        return (*self.parameters, *self.buffers)

    @property
    def prefixed(self) -> list[tuple[str, nn.Module]]:
        """All modules at each of their places, with the prefix of their parameters' names."""
        return [("", self.model), *((f"{visit.fqn}.", visit.module) for visit in self.visits)]

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """The model and all modules in it, each once."""
        return self.model, *(visit.module for visit in self.first_visits)

    @cached_property
    def size(self) -> int:
        """Number of entries of all parameters, dequantized; a tied one counts once."""
        own = {id(held.tensor): held for held in reversed(self._counted)}
        return sum(map(self.count_numbers, own.values()))

    @cached_property
    def _counted(self) -> tuple[Held, ...]:
        """All parameters, and the codes of quantized weights that are in buffers."""
        codes = {id(site.weight) for site in self.sites if site.layer_class.is_quantized}
        return (*self.parameters, *(held for held in self.buffers if id(held.tensor) in codes))

    @cached_property
    def matrices(self) -> tuple[tuple[Held, ...], ...]:
        """All parameters with two or more dimensions, or without a shape yet, each with all of its places."""
        places: dict[int, list[Held]] = {}
        for held in self._counted:
            if is_lazy(held.tensor) or len(whole_shape(held.tensor)) >= 2:
                places.setdefault(id(held.tensor), []).append(held)
        return tuple(map(tuple, places.values()))

    @cached_property
    def unserved(self) -> tuple[Held, ...]:
        """The parameters among `matrices` that have no adapter layer, at each of their places."""
        return tuple(held for places in self.matrices for held in places if self.site_of(held) is None)

    def site_of(self, held: Held) -> Site | None:
        """Return the site of a parameter (or of a weight computed from it), or ``None`` without an adapter layer."""
        if (site := self.sites_by_key.get((id(held.module), held.attribute))) is not None:
            return site
        owner_fqn, _, within = held.fqn.partition(".parametrizations.")
        if within and (owner := self._modules_by_fqn.get(owner_fqn)) is not None:
            return self.sites_by_key.get((id(owner), within.split(".")[0]))
        site = self.sites_by_key.get((id(held.module), WEIGHT))
        is_of_codes = site is not None and site.layer_class.is_quantized and held.attribute != "bias"
        return site if site is not None and (is_of_codes or site.weight is None) else None  # None by weight_norm

    @cached_property
    def uncalled(self) -> dict[Key, str]:
        """Why adapters of layers would be wrong because a module uses the weight differently, by `Site.key`."""
        sites = self.sites_by_key
        served = {key for key in self._readings["only where read"] if key in sites and sites[key].layer_class.is_read}
        return {key: why for key, why in self.read.items() if key in sites and key not in served}

    @cached_property
    def useless(self) -> dict[Key, str]:
        """Why rules leave out layers whose adapters would be wrong or could not be trained, by `Site.key`."""
        return self._readings["untrained"] | self.uncalled | self.empty

    @cached_property
    def empty(self) -> dict[Key, str]:
        """The matrices without entries, with a phrase that follows their names, by `Site.key`."""
        matrices = [held for held in self.parameters if not is_lazy(held.tensor) and held.tensor.dim() > 1]
        return {(id(held.module), held.attribute): "has no entries" for held in matrices if not held.tensor.numel()}

    @cached_property
    def read(self) -> dict[Key, str]:
        """The weights that a module around the layer reads or changes, by `Site.key`."""
        return self._readings["only where read"] | self._readings["never"]

    @cached_property
    def _readings(self) -> dict[Verdict, dict[Key, str]]:
        """What `Reading.why` says, by verdict and `Site.key`. If one reader is a problem, all are."""
        found: dict[Verdict, dict[Key, str]] = {"only where read": {}, "untrained": {}, "never": {}}
        readings = (reading for module in self.modules for find in FINDERS for reading in find(module))
        for child, why, verdict in readings:
            found[verdict][id(child), WEIGHT] = why
        where_read = found["only where read"].items()
        found["only where read"] = {key: why for key, why in where_read if key not in found["never"]}
        return found

    @cached_property
    def sites_by_key(self) -> dict[Key, Site]:
        """All weights that have a class of adapter layer, by `Site.key`, with their first name."""
        found: dict[Key, Site] = {}
        for site in self.sites_by_fqn.values():
            found.setdefault(site.key, site)
        return found

    @cached_property
    def _modules_by_fqn(self) -> Mapping[str, nn.Module]:
        return dict(self.visits)

    @cached_property
    def kinds(self) -> dict[int, Kinds]:
        """The adapter layers that the registry has for each module, by id."""
        return {id(module): Kinds(find_layer(module), find_readers(module)) for module in self.modules}

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """All submodules and all other parameters that are adapted where they are read, at each of their places."""
        found: list[Candidate] = []
        for fqn, module in self.visits:
            called, readers = self.kinds[id(module)]
            own = [Candidate(fqn, module, WEIGHT, called)]
            own += [Candidate(kind.site_fqn(fqn), module, kind.attribute, kind) for kind in readers]
            is_foreign = not PARTS.isdisjoint(fqn.split("."))
            found += [each._replace(entry=ANOTHERS) for each in own] if is_foreign else own
        return tuple(found)

    @cached_property
    def first_visits(self) -> tuple[Visit, ...]:
        """All submodules, each once under its first name."""
        found: dict[int, Visit] = {}
        for visit in self.visits:
            found.setdefault(id(visit.module), visit)
        return tuple(found.values())

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All weights that have a class of adapter layer, each once."""
        return tuple(self.sites_by_key.values())

    def sites_of(self, candidates: Iterable[Candidate]) -> tuple[Site, ...]:
        """Return the sites that some candidates are occurrences of."""
        keys = {each.key for each in candidates}
        return tuple(site for site in self.sites if site.key in keys)

    @cached_property
    def sites_by_fqn(self) -> dict[str, Site]:
        """All weights that have a class of adapter layer, by FQN, at each of their places."""
        found: dict[str, Site] = {}
        for fqn, module in self.visits:
            called, readers = self.kinds[id(module)]
            if isinstance(called, type):
                key = id(module), WEIGHT
                is_read = key in self._readings["only where read"] if key in self.read else id(module) in self._heads
                readers = (called.as_read if is_read and called.as_read is not None else called, *readers)
            for kind in readers:
                name = kind.site_fqn(fqn)
                found[name] = Site(name, module, kind)
        return found

    def shapes(self) -> list[Shape]:
        """Return the shapes of the updates of all weights that can be adapted, at each of their places."""
        return [site.shape for site in self.sites_by_fqn.values()]

    @cached_property
    def head(self) -> nn.Module | None:
        """The output head of a language model."""
        find: Callable[[], nn.Module | None] | None = getattr(self.model, "get_output_embeddings", None)
        return None if find is None else find()

    @cached_property
    def _heads(self) -> set[int]:
        """The output heads of all language models in the model, by id, which trainers may read."""
        base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
        heads = [module.get_output_embeddings() for module in self.modules[1:] if isinstance(module, base)]
        return {id(head) for head in (self.head, *heads) if head is not None}

    @cached_property
    def adapted(self) -> tuple[AdaptedSite, ...]:
        """All adapted weights, each once, of which those with trained rows may have several modules."""
        found: dict[AdapterLayer, AdaptedSite] = {}
        for fqn, module in self.first_visits:
            for layer in adapter_layers_of(module).values():
                found.setdefault(layer, AdaptedSite(type(layer).site_fqn(fqn), module, type(layer), layer))
        return tuple(found.values())

    @cached_property
    def around_adapted(self) -> tuple[nn.Module, ...]:
        """The model and all submodules that contain an adapted weight's owner."""
        owners = {id(site.owner) for site in self.adapted}
        names = {name for fqn, module in self.visits if id(module) in owners for name in prefixes(fqn)[:-1]}
        return self.model, *(module for fqn, module in self.first_visits if fqn in names)

    @cached_property
    def by_identity(self) -> dict[object, list[Held]]:
        """The parameters by each of their `identities`; those that share their values are together."""
        found: dict[object, list[Held]] = {}
        for held in self.parameters:
            for identity in identities(held.module, held.attribute, held.tensor):
                found.setdefault(identity, []).append(held)
        return found

    def count_numbers(self, held: Held) -> int:
        """Return the number of entries of a parameter, dequantized: one stored element may hold several codes."""
        layer_class = self.kinds[id(held.module)].called
        if isinstance(layer_class, type) and layer_class.is_quantized and held.attribute != "bias":
            is_weight = held.tensor is layer_class.find_weight(held.module)
            return math.prod(layer_class.features(held.module)) if is_weight else 0
        if (state := getattr(held.tensor, "quant_state", None)) is not None:  # a bitsandbytes embedding
            return math.prod(state.shape)
        return 0 if is_lazy(held.tensor) else math.prod(whole_shape(held.tensor))


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a module that a state dict has."""
    for attribute, buffer in module._buffers.items():
        # private, but nothing else tells which buffers a state dict leaves out
        if buffer is not None and attribute not in module._non_persistent_buffers_set:
            yield attribute, buffer


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is quantized. Its dtype may be floating, so the module's type decides."""
    layer_class, weight = find_layer(module), dict(module.named_parameters(recurse=False)).get("weight")
    if isinstance(layer_class, type) and layer_class.is_quantized:
        return True
    is_foreign = type(weight).__module__.startswith("bitsandbytes.")  # as in bitsandbytes' embeddings
    return weight is not None and (is_foreign or not weight.is_floating_point())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class, because every library defines its own norms."""
    return "norm" in type(module).__name__.lower()


def _walk(model: nn.Module) -> Iterator[Visit]:
    """Go through all modules inside a model, parents first, each with its name at each of its places."""
    left: list[tuple[str, nn.Module, dict[int, str]]] = [("", model, {id(model): "the model"})]
    while left:
        fqn, module, around = left.pop()
        if fqn:
            yield Visit(fqn, module)
        inside = []
        for attribute, held in module._modules.items():
            if held is None or isinstance(held, Diagonal):
                continue
            child = unwrapped(held)
            name = f"{fqn}.{attribute}" if fqn else attribute
            if (outer := around.get(id(child))) is not None:
                raise TargetError(f"the model contains itself: {name} is {outer}, which is around it; use a list")
            inside.append((name, child, {**around, id(child): name}))
        left += reversed(inside)

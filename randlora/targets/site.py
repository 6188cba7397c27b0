"""A site: one weight of one module that is or can be adapted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from randlora.bases.spec import Shape
from randlora.config import RandLoRAConfig
from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of
from randlora.places import Place

Shapes = dict[str, Shape]
"""Shapes of adapted weights by FQN."""

DEFAULT = RandLoRAConfig()


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that is or can be adapted.

    Attributes:
        fqn: The fully qualified name used in files: the name of the module if its forward is the product with the
            weight, else the name of the parameter. The first name, if the module is used in several places.
        owner: The module that has the weight.
        layer_class: The class of its adapter layer.
    """

    fqn: str
    owner: nn.Module
    layer_class: type[AdapterLayer]

    @property
    def key(self) -> tuple[int, str]:
        """A key that identifies the weight, independent of its name."""
        return id(self.owner), self.layer_class.attribute

    @property
    def shape(self) -> Shape:
        """The shape of the update of an adapter with the default options."""
        return self.shape_with(DEFAULT)

    def shape_with(self, config: RandLoRAConfig) -> Shape:
        """Return the shape of the update of an adapter with these options."""
        return self.layer_class.shape_of(self.owner, config)

    @property
    def weight(self) -> Tensor | None:
        """The parameter without any update, or ``None`` if the owner computes it from others."""
        return self.layer_class.weight_of(self.owner)

    @property
    def place(self) -> Place:
        """Where the values of the weight are."""
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


def other_kinds(sites: Iterable[Site]) -> dict[str, str]:
    """Return the kinds of the weights that do not belong to linear layers, by FQN."""
    return {site.fqn: kind for site in sites if (kind := site.layer_class.kind) != "linear"}


def sizes(shape: Sequence[int]) -> str:
    """Return a shape as text: ``"20 x 12"``."""
    return " x ".join(map(str, shape))

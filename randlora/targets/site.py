"""What is adapted: one weight of one module, under its name on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from randlora.layers.base import AdapterLayer
from randlora.layers.in_place import adapter_layers_of

Shapes = dict[str, tuple[int, int]]
"""``(out_features, in_features)`` of adapted weights by FQN."""


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that an adapter goes on or could go on.

    Attributes:
        fqn: Its fully qualified name on disk: that of the module, if the module's forward is the product with its
            weight, else that of the parameter. The first one, if the module is used in several places.
        owner: The module that holds the weight.
        layer_class: The adapter layer that serves it.
    """

    fqn: str
    owner: nn.Module
    layer_class: type[AdapterLayer]

    @property
    def key(self) -> tuple[int, str]:
        """What tells it from other sites, whatever name it goes by."""
        return id(self.owner), self.layer_class.attribute

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.layer_class.shape_of(self.owner)

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter itself, without any update; ``None`` where the owner computes it from others."""
        return self.layer_class.weight_of(self.owner)

    @property
    def adapter_layer(self) -> AdapterLayer | None:
        """What adapts it now, if anything does."""
        return adapter_layers_of(self.owner).get(self.layer_class.attribute)


@dataclass(frozen=True, eq=False)
class AdaptedSite(Site):
    """A weight that is adapted.

    Attributes:
        layer: What adapts it.
    """

    layer: AdapterLayer


def shapes_of(sites: Iterable[Site]) -> Shapes:
    """Return the shapes of some sites by FQN."""
    return {site.fqn: site.shape for site in sites}

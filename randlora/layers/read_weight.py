"""Base class of adapter layers for weights that other code reads, such as those of attention or experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer
from randlora.layers.rows import Rows
from randlora.layers.scopes import read_so_far
from randlora.layers.split import split_of
from randlora.layers.update import Update


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without adapters."""
    base: type[nn.Module] = getattr(type(module), "randlora_base", type(module))
    return base


class ReadWeight(AdapterLayer):
    """Adapts a parameter that code reads by name, in the forward of its owner or of a module around it.

    There the attribute is weight + update while adapters are active; elsewhere it is the parameter, as in
    ``state_dict()`` and ``parameters()``. See `randlora.layers.scopes`. The update is computed on each read.

    Attributes:
        is_read_once: Whether to compute the update once in a forward of an owner, however often that reads the weight.
            The result is kept until the forward ends.
    """

    is_called: ClassVar[bool] = False
    is_read_once: ClassVar[bool] = False

    @classmethod
    def is_held_by(cls, owner: nn.Module) -> bool:
        """Whether an owner has the weight, or computes it by a parametrization, rather than ``None`` in its place."""
        if cls.attribute in owner._parameters:
            return owner._parameters[cls.attribute] is not None
        return is_parametrized(owner, cls.attribute) or cls.attribute in owner.__dict__  # there by weight_norm of old

    @classmethod
    def takes_dropout(cls, owner: nn.Module) -> bool:  # noqa: ARG003
        """Return ``False``: an update that is added to the weight has the input of the weight."""
        return False

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """Return which arguments of the owner's forward have the rows of the batch."""
        return Rows.first(args, kwargs, base_class(owner).__name__)

    @classmethod
    def site_fqn(cls, owner_fqn: str) -> str:
        """Return the name of the weight in files: the FQN of the parameter, or of the module for its ``weight``."""
        return owner_fqn if cls.attribute == "weight" else f"{owner_fqn}.{cls.attribute}"

    @classmethod
    def parameter_names(cls) -> tuple[str, str]:
        """Return the names of Λ and Γ on the owner, which may have several such weights."""
        if cls.attribute == "weight":
            return super().parameter_names()
        return f"{cls.attribute}_randlora_lambda", f"{cls.attribute}_randlora_gamma"

    def held_weight(self, owner: Any) -> nn.Parameter:
        """Return the parameter, or raise an `AdapterError` if code computes the weight from others since."""
        if (weight := self.weight_of(owner)) is None:
            raise AdapterError(
                f"{self.attribute} of an adapted {owner.randlora_base.__name__} is no parameter any more, as after a "
                "parametrization or pruning: undo that, and merge or eject the adapters first"
            )
        return weight

    def read(self, owner: nn.Module) -> Tensor:
        """Return the value of the attribute, in the shape and dtype of the weight."""
        if not self.is_read_once or torch.compiler.is_compiling():
            return self.value(owner)
        if (values := read_so_far()) is None:
            return self.value(owner)
        key = id(owner), self.attribute, torch.is_grad_enabled()
        if key not in values:
            values[key] = self.value(owner)
        return values[key]

    def value(self, owner: nn.Module) -> Tensor:
        """Compute the weight plus the updates of the active adapters."""
        weight, active = self.held_weight(owner), self.active()
        if not active:
            return weight
        updates = [self.update(owner, part, factor) for part, factor in active]
        if (split := split_of(type(self), weight)) is not None:
            return split.value(updates)
        return self.with_updates(weight, self.here(updates))

    def here(self, updates: list[Update]) -> list[Update]:
        """Return the parts of updates for what this process has of the weight, which is all of it, or a piece."""
        return updates if self.piece is None else [self.piece.part(update) for update in updates]

"""`ReadWeight`: weights that other code reads, such as in attention or experts; `ReadLinear`: such linear layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.blocks import ForwardCall, Rows
from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer, input_of
from randlora.layers.in_place import adapter_layers_of, plain_class
from randlora.layers.linear import FORWARD, LinearAdapter
from randlora.layers.scopes import cast, read_so_far, run_forward
from randlora.layers.update import Update
from randlora.layers.weight import split_of


class ReadWeight(AdapterLayer):
    """Adapts a parameter that code reads by name, in the forward of its owner or of a module around it.

    In these forwards the attribute is weight + update while adapters are active. Everywhere else it is the parameter,
    as in ``state_dict()`` and ``parameters()``. See `randlora.layers.scopes`. The update is computed on each read.

    Attributes:
        is_read_once: Whether to compute the update only once in a forward of an owner, however often it reads the
            weight. The result is kept until the forward ends.
    """

    is_called: ClassVar[bool] = False
    is_read: ClassVar[bool] = True
    is_read_once: ClassVar[bool] = False

    @classmethod
    def takes_dropout(cls, owner: nn.Module) -> bool:  # noqa: ARG003
        """Return ``False``: an update that is added to the weight has the same input as the weight."""
        return False

    @classmethod
    def rows_of(cls, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """Return which arguments of the owner's forward have the rows of the batch."""
        return Rows.first(args, kwargs, plain_class(owner).__name__)

    def held_weight(self, owner: Any) -> Tensor:
        """Return the parameter. Raises an `AdapterError` if the weight is now computed from other parameters."""
        if (weight := self.weight_of(owner)) is None:
            raise AdapterError(
                f"{self.attribute} of an adapted {owner.randlora_base.__name__} is no longer a parameter, such as "
                "after a parametrization or pruning: undo this, and merge or eject the adapters first"
            )
        return weight

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the owner's forward, which reads its weights."""
        for layer in adapter_layers_of(owner).values():
            assert isinstance(layer, ReadWeight), "others are called"
            layer.held_weight(owner)
        own = self.own_forward or base_forward
        if (run := self.state.run) is not None and run.takes_over:
            inside = (each for module in owner.modules() for each in adapter_layers_of(module).values())
            if any(map(run.concerns, inside)):
                return run.reading(self, ForwardCall(owner, partial(run_forward, owner, own), args, kwargs))
        return run_forward(owner, own, *args, **kwargs)

    def read(self, owner: nn.Module) -> Tensor:
        """Return the value of the attribute, in the shape and dtype of the weight."""
        if not self.is_read_once or torch.compiler.is_compiling():
            return self.value(owner)
        if (values := read_so_far()) is None:
            return self.value(owner)
        key = id(owner), self.attribute, torch.is_grad_enabled(), id(self.activation), self.state.is_disabled
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
        """Return the parts of updates for the part of the weight on this process (all of it, or a piece)."""
        return updates if self.piece is None else [self.piece.part(update) for update in updates]


class ReadLinear(ReadWeight, LinearAdapter):
    """Adapts an `nn.Linear` whose weight code reads: the module around it, a trainer, or the forward of a subclass.

    All code that computes with the weight gets weight + update, as after merging. The plain forward, if it is called,
    computes layer and adapter as one operation and does not form the update.
    """

    is_called: ClassVar[bool] = True

    @classmethod
    def takes_dropout(cls, owner: nn.Module) -> bool:
        """Whether the module's class has the plain forward. Code that reads the weight cannot drop entries."""
        return plain_class(owner).forward is FORWARD

    def value(self, owner: nn.Module) -> Tensor:
        """Compute the weight plus the updates of the active adapters."""
        if owner.training and any(part.adapter.config.dropout for part, _ in self.active()):
            raise AdapterError(
                f"code reads the weight of an adapted {plain_class(owner).__name__} instead of calling it, so the "
                "adapter's dropout cannot act (TRL's trainers do this with an output head): make the adapter without "
                "dropout, or exclude the layer"
            )
        return super().value(owner)

    def adds_to_output(self, owner: nn.Module) -> bool:
        """Whether the module has the plain forward. Any other forward reads weight + update."""
        return self.runs_plain_forward(owner)

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the plain forward plus the active adapters' outputs, or any other forward's result."""
        kind = LinearAdapter if self.adds_to_output(owner) else ReadWeight
        return kind.forward(self, owner, base_forward, *args, **kwargs)

    def base_output(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the plain forward without adapters. The attribute is not read."""
        if not self.adds_to_output(owner):
            return super().base_output(owner, base_forward, *args, **kwargs)
        bias: Any = owner.bias
        return F.linear(input_of(owner, args, kwargs), cast(owner, "weight", self.held_weight(owner)), bias)


LinearAdapter.as_read = ReadLinear

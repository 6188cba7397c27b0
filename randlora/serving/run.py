"""What adapted layers do in a block of `routed`: each row of a batch goes through its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from randlora.blocks import Run
from randlora.errors import AdapterError
from randlora.layers.base import AdapterLayer
from randlora.layers.inputs import input_of, require_product
from randlora.layers.read_weight import ReadWeight, base_class
from randlora.placement.dtensor import is_dtensor
from randlora.serving.kept import cacheable_parameters
from randlora.serving.layouts import follow, layout_of, layout_of_rows, unfollowed
from randlora.serving.products import Routes, routed_forward, routed_output, routed_rows
from randlora.serving.routing import Routing
from randlora.state import SiteAdapter


class RowByRow(Routing, Run):
    """Runs adapted layers with the adapter of each row."""

    words: ClassVar[str] = "randlora.serving.routed"

    @property
    def takes_over(self) -> bool:
        """Whether no adapter is chosen: a module that runs for the rows of one runs as with that one active."""
        return self.chosen is None

    def concerns(self, layer: AdapterLayer) -> bool:
        """Return whether any adapter that rows go through adapts this weight."""
        return any(name in layer.adapters for name in self.adapters)

    def acting(self, layer: AdapterLayer) -> list[tuple[SiteAdapter, float]]:
        """Return the adapter that a module runs with now, for its rows; see `randlora.serving.products`."""
        if self.chosen is None:
            if not self.concerns(layer):
                return []
            raise AdapterError(
                f"code reads an adapted {layer.attribute} outside of the forward of the module that it is in, where "
                "routed cannot tell the rows of the batch: exclude it when the adapter is made, or activate one "
                "adapter at a time"
            )
        part = layer.adapters.get(self.chosen[0] or "")
        return [] if part is None else [(part, 1.0)]

    def product(
        self,
        layer: AdapterLayer,
        owner: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the output of the base plus, for each token, the product with the update of its adapter."""
        output, x = layer.base_output(owner, forward, *args, **kwargs), input_of(owner, args, kwargs)
        require_product(owner, output, layer.shape[0])
        if not self.concerns(layer):
            return output
        routes = _routes(layer, owner)
        if not isinstance(x, Tensor) or x.is_nested:
            raise AdapterError(
                f"routed needs a tensor with a batch, and an adapted {routes.module} was given another input"
            )
        layout = layout_of(self, layer, x, routes.module)
        with unfollowed(self):
            result = routed_output(routes, self, layout, x, output, has_dropout=owner.training)
        follow(self, result, layout)
        return result

    def rows(
        self,
        layer: AdapterLayer,
        owner: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return the rows of the base plus, for each, the same row of the update of its adapter."""
        with self.choosing(None):
            output: Tensor = forward(*args, **kwargs)
        if not self.concerns(layer):
            return output
        ids, routes, padding = input_of(owner, args, kwargs), _routes(layer, owner), owner.padding_idx
        layout = layout_of(self, layer, ids, routes.module, features=0)
        with unfollowed(self):
            result = routed_rows(routes, self, layout, ids, output, num_rows=layer.shape[0], padding_idx=padding)
        follow(self, result, layout)
        return result

    def reading(
        self,
        layer: ReadWeight,
        owner: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the output of the forward of a module that reads its weights, run once for each adapter."""
        module = base_class(owner).__name__
        layout, rows = layout_of_rows(self, layer, layer.rows_of(owner, args, kwargs), module)
        with unfollowed(self):
            output = routed_forward(self, layout, rows, forward, module)
        for index, each in enumerate(output if isinstance(output, tuple) else [output]):
            follow(self, each, layout, rows.output_axes[min(index, 1)])
        return output


def _routes(layer: AdapterLayer, owner: Any) -> Routes:
    """Return the adapters of a weight, for tokens that go through different ones."""
    module = owner.randlora_base.__name__
    if is_dtensor(layer.weight_of(owner)):
        raise AdapterError(
            f"an adapted {module} is split by tensor parallelism, with which routed does not work: activate one "
            "adapter at a time"
        )
    return Routes(
        module,
        layer.adapters,
        lambda part: layer.update(owner, part, 1.0),
        lambda find: cacheable_parameters(owner, [owner._modules[name] for name in layer.parameter_names()], find),
        layer.state.compute,
    )

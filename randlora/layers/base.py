"""The base class of adapter layers, each of which adapts one weight of a module, and the checks of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora.bases.spec import Shape, count_bases
from randlora.blocks import ForwardCall
from randlora.config import Init
from randlora.functional import WriteOut, adapted_linear, delta_weight
from randlora.layers.diagonals import Diagonal, Gamma, Lambda, diagonal_shapes, initial_values
from randlora.layers.weight import StoredWeight, Update, split_of, sum_updates
from randlora.places import whole
from randlora.ranks import run_collectives
from randlora.state import ModelState, SiteAdapter


def input_of(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the input of an adapted module, the first argument of its forward, positional or keyword."""
    return args[0] if args else kwargs.get(owner.randlora_input)


def is_plain_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a strided floating tensor and not of a tensor subclass."""
    is_tensor = type(value) in (Tensor, nn.Parameter)
    return is_tensor and value.is_floating_point() and value.layout == torch.strided and not value.is_nested


def autocast_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that autocast casts a dtype to on the device of ``x``; the dtype itself without autocast."""
    device = x.device.type
    if dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def product_dtype(x: object, weight: Tensor, in_features: int) -> torch.dtype | None:
    """Return the dtype of the product of two plain tensors, or ``None`` if they are not, or have no dtype in common."""
    if not is_plain_tensor(x) or not is_plain_tensor(weight) or x.device != weight.device:
        return None
    if x.dim() == 0 or x.shape[-1] != in_features:
        return None
    dtype = autocast_dtype(x, weight.dtype)
    return dtype if x.dtype == weight.dtype or autocast_dtype(x, x.dtype) == dtype else None


def require_product(owner: Any, output: object, out_features: int) -> None:
    """Raise a `TypeError` unless an adapted module's forward returned a tensor of shape ``(..., out_features)``."""
    if isinstance(output, Tensor) and (output.is_nested or output.shape[-1:] == (out_features,)):
        return
    name = owner.randlora_base.__name__
    got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise TypeError(
        f"the forward of an adapted {name} must return a tensor of shape (..., {out_features}), the product with its "
        f"weight, got {got}: give exclude= that matches it, or register an adapter layer for {name} with "
        "randlora.layers.register_layer"
    )


class Product(NamedTuple):
    """The product that a layer's forward computes, before a bias is added."""

    weight: Tensor | WriteOut  # (out_features, in_features)
    dtype: torch.dtype  # to compute in
    output_dtype: torch.dtype


class AdapterLayer(StoredWeight):
    """Adapts one weight of a module, its owner, in place.

    The owner remains the same object, with its parameters and hooks. Its class becomes a subclass of its original class
    that calls the adapter layer. A subclass of this class defines how one kind of layer stores its weight. For every
    kind

        layer(x) with adapters - layer(x) without == x @ delta_weight.T

    Attributes:
        kind: What the weight is: ``"linear"``, ``"attention"``, ``"convolution"``, ``"embedding"`` or ``"experts"``.
            ``targets="all-linear"`` selects the first two.
        is_called: Whether its `forward` runs in place of the owner's.
        is_read: Whether code reads the weight in calls as `read` returns it.
        as_read: The adapter layer for the same weight if code reads it instead, such as the forward of a subclass.
        is_rows: Whether it replaces rows of the weight, without Λ and Γ.
        tied: All modules that have the same weight, and this adapter layer, if there may be several.
        state: The state of the model that the owner belongs to.
        shape: ``(out_features, in_features)`` of the weight, or of one matrix of a stack.
        names: The names under which the owner holds Λ and Γ.
        adapters: The adapters of this weight, by name.
    """

    kind: ClassVar[str] = "linear"
    is_called: ClassVar[bool] = True
    is_read: ClassVar[bool] = False
    as_read: ClassVar[type[AdapterLayer] | None] = None
    is_rows: ClassVar[bool] = False
    diagonal_classes: ClassVar[tuple[type[Diagonal], ...]] = (Lambda, Gamma)  # under `names`
    tied: tuple[nn.Module, ...] = ()

    def __init__(self, owner: nn.Module, state: ModelState) -> None:
        """Create the adapter layer of a weight for a model with this state, without changing the owner."""
        self.state = state
        in_features, out_features = self.features(owner)
        self.shape = out_features, in_features
        self.names = self.parameter_names()
        self.adapters: dict[str, SiteAdapter] = {}
        # those that act and are not merged, with their factors, if `activation` is the model's; see `seat`
        self.acting: list[tuple[SiteAdapter, float]] = []
        self.activation = state.activation
        self.own_forward: Callable[..., Any] | None = None  # a forward that was set on the owner, not on its class
        # a forward that was set on the owner to split its weight, its replacement, and the part of this process in it
        self.adopted: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.piece: Any = None
        self.original = None

    @classmethod
    def plain_forward(cls) -> Callable[..., Tensor] | None:
        """Return the ``forward`` of the base layer's class that one operation with an adapter can replace, if any."""
        return None

    def owners(self, owner: nn.Module) -> list[nn.Module]:
        """Return the modules that hold this adapter layer: one of them, and those that share its weight."""
        return [*dict.fromkeys((owner, *self.tied))]

    def diagonals_of(self, owner: Any, name: str) -> tuple[nn.Parameter, ...]:
        """Return Λ, ``(r, num_bases)``, and Γ, ``(num_bases, min_dim)``, of one adapter, or stacks of them; or rows."""
        return tuple([owner._modules[held].randlora_named(name) for held in self.names])

    @classmethod
    def fresh_diagonals(cls, owner: nn.Module, shape: Shape, r: int, init: Init) -> tuple[Tensor, Tensor]:
        """Return the initial Λ and Γ in float32 on the weight's device, or stacks of them; see `initial_values`."""
        (of_lam, of_gamma), (lam, gamma) = diagonal_shapes(shape, r), initial_values(init, shape)
        full = partial(torch.full, dtype=torch.float32, device=cls.device_beside(owner))
        return full(of_lam, lam), full(of_gamma, gamma)

    @classmethod
    def beside(cls, owner: nn.Module) -> list[object]:  # noqa: ARG003  # for quantized layers
        """Return the objects on the owner that merging changes, other than modules and parameters."""
        return []

    @classmethod
    def takes_dropout(cls, owner: nn.Module) -> bool:  # noqa: ARG003  # for weights that code reads
        """Whether an adapter can get its input with entries dropped while the module gets all of them."""
        return True

    def read(self, owner: nn.Module) -> Tensor:
        """Return the value of the weight's attribute in calls of its module, and of those around it."""
        return self.weight_of(owner)

    def settle(self, owner: nn.Module) -> None:  # most kinds have nothing to do
        """Change what else must differ on the owner while it is adapted. Must not fail."""

    def unsettle(self, owner: nn.Module) -> None:  # most kinds have nothing to do
        """Undo `settle`."""

    def forward(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the owner's forward, ``base_forward``, plus the outputs of the active adapters."""
        state = self.state
        base_forward = self.own_forward or base_forward
        if state.runs and (run := state.run) is not None and run.takes_over:
            return run.product(self, ForwardCall(owner, base_forward, args, kwargs))
        active = self.acting if self.activation.is_current and not state.disabled else self.active()
        if not active:
            return self.base_output(owner, base_forward, *args, **kwargs)
        x: Any = args[0] if args else input_of(owner, args, kwargs)
        output = self._one_operation(owner, *active[0], x) if len(args) + len(kwargs) == 1 else None
        if output is not None:
            active = active[1:]
        else:
            output = self.base_output(owner, base_forward, *args, **kwargs)
        if not active:
            return output
        if not isinstance(x, Tensor):
            raise TypeError(f"the input of an adapted {type(owner).__name__} must be a tensor, got {type(x).__name__}")
        require_product(owner, output, self.shape[0])
        for site_adapter, factor in active:
            output = output + self._adapter_output(owner, site_adapter, factor, x, output.dtype)
        return output

    def active(self) -> list[tuple[SiteAdapter, float]]:
        """Return the adapters that act and are not merged, with their factors; none while disabled."""
        if self.state.is_disabled:
            return [] if (run := self.state.run) is None else run.acting(self)
        return self.acting if self.activation.is_current else self._acting(self.adapters)

    def _acting(self, names: Iterable[str]) -> list[tuple[SiteAdapter, float]]:
        """Return the given adapters that act on this weight, with their factors."""
        weighted = [(self.adapters[name], self.adapters[name].weight) for name in names if name in self.adapters]
        return [(site_adapter, weight) for site_adapter, weight in weighted if weight is not None]

    def factors(self, names: Iterable[str]) -> dict[str, float]:
        """Return the factors of the given adapters that act on this weight, merged or not."""
        return {site_adapter.adapter.name: weight for site_adapter, weight in self._acting(names)}

    def base_output(self, owner: nn.Module, base_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002  # for quantized layers
        """Return the output of the owner without adapters."""
        output: Tensor = base_forward(*args, **kwargs)
        return output

    def adds_to_output(self, owner: nn.Module) -> bool:  # noqa: ARG002  # for weights that a forward reads
        """Whether the adapters' outputs are added to `base_output`; else the owner's forward reads weight + update."""
        return True

    def runs_plain_forward(self, owner: nn.Module) -> bool:
        """Whether the owner has the forward of its kind, not overridden by a subclass or on the instance."""
        base: Any = type(owner)
        return self.own_forward is None and base.randlora_base.forward is self.plain_forward()

    def _one_operation(self, owner: nn.Module, site_adapter: SiteAdapter, factor: float, x: Any) -> Tensor | None:
        """Return the output of layer and adapter as one operation, or ``None`` if the forward or dropout forbid it."""
        if (site_adapter.adapter.config.dropout and owner.training) or not self.runs_plain_forward(owner):
            return None
        if (product := self.product(owner, x)) is None:
            return None
        weight, dtype, output_dtype = product
        pair, diagonals = self.update(owner, site_adapter, factor).parts(x.device, dtype)
        bias: Any = owner.bias
        x = x if x.dtype == dtype else x.to(dtype)
        output = adapted_linear(x, pair, diagonals, weight=weight, bias=bias, compute=self.state.compute)
        return output if output.dtype == output_dtype else output.to(output_dtype)

    def product(self, owner: nn.Module, x: object) -> Product | None:
        """Return what a plain forward multiplies its input by, or ``None`` if it does more than that and add a bias."""
        weight = self.find_weight(owner)
        dtype = None if weight is None else product_dtype(x, weight, self.shape[1])
        if weight is None or dtype is None:
            return None
        return Product(self.in_storage_layout(weight), dtype, dtype)

    def update(self, owner: nn.Module, site_adapter: SiteAdapter, factor: float) -> Update:
        """Return one adapter's update of this weight as factors."""
        lam, gamma = self.diagonals_at(owner, site_adapter)
        return Update(site_adapter.basis, lam, gamma, site_adapter.scaling * factor, site_adapter.shape)

    def diagonals_at(self, owner: Any, site_adapter: Any) -> tuple[nn.Parameter, ...]:
        """Return what `diagonals_of` does of an adapter, in compiled code by its position, without reading its name."""
        if torch.compiler.is_dynamo_compiling() and site_adapter.position is not None:
            found = [owner._modules[held].randlora_at(site_adapter.position) for held in self.names]
            if all(each is not None for each in found):  # else they are found by name alone
                return tuple(found)
        return self.diagonals_of(owner, site_adapter.adapter.name)

    def seat(self, owner: nn.Module) -> None:
        """Rebuild the list of adapters that act here. Call after any change of what is active or merged."""
        self.activation = self.state.activation
        self.acting = self._acting(self.state.active_unmerged)
        self.number()
        for each in self.owners(owner):
            modules: dict[str, Any] = each._modules
            for name in self.names:
                modules[name].randlora_seat(site_adapter.adapter.name for site_adapter, _ in self.acting)

    def number(self) -> None:
        """Let the adapters that act here know their positions, by which compiled code finds them; others have none."""
        for site_adapter in self.adapters.values():
            site_adapter.position = None
        for position, (site_adapter, _) in enumerate(self.acting):
            site_adapter.position = position

    def _adapter_output(
        self, owner: nn.Module, site_adapter: SiteAdapter, factor: float, x: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return one adapter's output in the dtype of the layer's output, which autocast determines if it is on."""
        p = site_adapter.adapter.config.dropout
        if p and owner.training and x.layout != torch.strided and not x.is_nested:
            x = x.to_dense()  # torch drops no entries of sparse tensors
        x = F.dropout(x.to(dtype), p, owner.training)
        update, weight = self.update(owner, site_adapter, factor), self.find_weight(owner)
        if weight is not None and (split := split_of(type(self), weight)) is not None:
            return split.product(update, x, self.state.compute)
        pair, diagonals = update.parts(x.device, dtype)
        # adapted_linear needs a shape, which nested tensors lack, and changes it, which sparse ones do not let it
        if x.is_nested or x.layout != torch.strided:
            return F.linear(x, delta_weight(pair, diagonals, is_wide=self.shape[1] == min(self.shape)))
        return adapted_linear(x, pair, diagonals, compute=self.state.compute)

    def delta_weight(self, owner: nn.Module, weights: dict[str, float]) -> Tensor:
        """Return the sum of the updates of some adapters, given with factors, in float32 or wider, as the weight."""
        updates = self.whole_updates(owner, weights)
        dtype = torch.promote_types(self.weight_of(owner).dtype, torch.float32)
        device, as_one_matrix = self.device_beside(owner), self.as_one_matrix
        return sum_updates(updates, self.shape, device=device, dtype=dtype, as_one_matrix=as_one_matrix)

    def whole_updates(self, owner: nn.Module, weights: dict[str, float]) -> list[Update]:
        """Return the updates of some adapters with all values of Λ and Γ; a collective if these are sharded."""
        held = [(self.adapters[name], factor) for name, factor in weights.items() if name in self.adapters]
        updates = [self.update(owner, site_adapter, factor) for site_adapter, factor in held]
        reads = [partial(whole, diagonal) for update in updates for diagonal in (update.lam, update.gamma)]
        values = iter(run_collectives(reads))
        return [update._replace(lam=next(values), gamma=next(values)) for update in updates]

    def description(self) -> str:
        """Return a description of the adapters for ``print(model)``."""
        return ", ".join(
            f"{name}: r={(r := site_adapter.options.r)}, num_bases={count_bases(min(site_adapter.shape[-2:]), r)}, "
            f"{site_adapter.basis.spec.kind}"
            for name, site_adapter in self.adapters.items()
        )

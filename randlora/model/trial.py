"""Running a model with random values of Λ and Γ, adapted or merged, and comparing the outputs of two runs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from randlora.functional import Compute
from randlora.layers.diagonals import Diagonal
from randlora.model.merge import merged
from randlora.model.view import Snapshot, set_requires_grad
from randlora.modes import uncompiled
from randlora.state import ModelState, SiteAdapter
from randlora.targets.census import AdaptedSite, Census

SHARE = 0.5
"""The norm of a random update, as a share of the norm of the weight."""

WIDENED = 2**32
"""Up to how many bytes, weights in half precision are checked in float32, where small effects can be compared."""

SPREAD = 0.02
"""The standard deviation of the values that replace zero parameters, which would hide effects before them."""

Output = dict[str, Tensor]
"""The floating tensors in a forward's output, by their places in it."""

DEPTH = 8
"""How deep an output is searched for tensors."""

ROUNDING = 64

LEAST_DIGITS = 0.04
"""An output counts as exact within this many roundings of its norm; in half precision, within this share."""


class Trial:
    """A model whose active adapters have random values, to be run as often as needed.

    Attributes:
        sites: The weights that active adapters act on.
        ran: The weights whose update the last call of `gradients` computed.
    """

    def __init__(
        self,
        model: nn.Module,
        census: Census,
        state: ModelState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_widened: bool,
    ) -> None:
        """Draw the values, within a block that undoes that, in a model whose half precision may become float32."""
        self.model, self.state, self.sites = model, state, acting_sites(census, state)
        self.ran: set[AdaptedSite] = set()
        self._root, self._args, self._kwargs, self._is_widened = census.model, args, kwargs, is_widened
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._drawn: dict[AdaptedSite, list[nn.Parameter]] = {site: [] for site in self.sites}
        for tensor in half_precision(model) if is_widened else ():
            tensor.data = tensor.data.float()
        for parameter in model.parameters():
            self._fill(parameter)
            set_requires_grad(parameter, flag=False)
        for adapter in map(state.adapters.__getitem__, state.active):
            adapter.config = replace(adapter.config, dropout=0.0)  # which a merged weight has none of
        for site in self.sites:
            for part in acting_parts(site, state):
                self._drawn[site] += self._draw(site, part)
            self._watch(site)
        self._before: Snapshot | None = None

    def ready(self, earlier: Snapshot) -> None:
        """Take the snapshot, reusing an earlier one's copies of values that are still the same."""
        self._before = Snapshot([self.model], held_by(self._root, self.sites, self.state), earlier)

    def run(
        self, on: Collection[AdaptedSite], *, training: bool, is_merged: bool = False, compute: Compute = "auto"
    ) -> Output:
        """Return the output with updates of some weights, in training mode with gradients, else without."""
        with self.only(on, training=training), torch.set_grad_enabled(training):
            self.state.compute = compute
            with merged(self._root, quantized="dequantize") if is_merged else nullcontext():
                output = self._call()
            return {path: value.detach().clone() for path, value in output.items()}

    def gradients(self, *, training: bool) -> set[AdaptedSite]:
        """Return the weights for which nonzero gradients reach all of Λ and Γ."""
        with self.only(self.sites, training=training), torch.enable_grad():
            self.ran.clear()
            values = [value for value in self._call().values() if value.requires_grad]
            weighted = [(value * self._like(value)).where(value.isfinite(), 0) for value in values]
            if weighted:
                torch.stack([each.float().sum().to(weighted[0].device) for each in weighted]).sum().backward()
            found = {
                site
                for site, drawn in self._drawn.items()
                if all(each.grad is not None and bool(each.grad.count_nonzero()) for each in drawn)
            }
            for each in (each for drawn in self._drawn.values() for each in drawn):
                each.grad = None
            return found

    def is_wide(self, on: Iterable[AdaptedSite]) -> bool:
        """Whether the weights are neither quantized nor in half precision."""
        return all(
            not site.layer.is_quantized and site.weight is not None and site.weight.dtype.itemsize >= 4 for site in on
        )

    @contextmanager
    def only(self, on: Iterable[AdaptedSite], *, training: bool) -> Iterator[None]:
        """Run a block with updates of only these weights, and undo all its changes."""
        assert self._before is not None, "check() calls ready()"
        chosen: dict[str, dict[str, float]] = {name: {} for name in self.state.active}
        for site in on:
            for part in acting_parts(site, self.state):
                chosen[part.adapter.name][part.fqn] = 1.0
        try:
            self.state.activate(chosen)
            for site in self.sites:
                site.layer.seat(site.owner)
            self.model.train(training)
            yield
        finally:
            self._before.restore()

    def _call(self) -> Output:
        args, kwargs = copied((self._args, self._kwargs), is_widened=self._is_widened)
        with uncompiled():  # compiled code would run without what watches the layers
            return tensors_in(self.model(*args, **kwargs))

    def _draw(self, site: AdaptedSite, part: SiteAdapter) -> list[nn.Parameter]:
        """Replace Λ and Γ of an adapter by new parameters, which no optimizer or hook knows."""
        name, drawn = part.adapter.name, []
        for held in map(site.owner._modules.__getitem__, site.layer.parameter_names()):
            assert isinstance(held, Diagonal), "the weight is adapted"
            parameter = nn.Parameter(self._like(held.randlora_named(name)))
            held._parameters[name] = parameter
            drawn.append(parameter)
        with torch.no_grad():
            norm = site.layer.update(site.owner, part, 1.0).norm(drawn[0].device)
            drawn[0].mul_(_size(site) * SHARE / norm)
        return drawn

    def _fill(self, parameter: nn.Parameter) -> None:
        """Replace zeros by random values, such as in gates that are not trained yet."""
        is_plain = type(parameter.data) is Tensor and parameter.is_floating_point() and parameter.dtype.itemsize > 1
        if is_plain and not parameter.is_meta and parameter.numel() and not parameter.any():
            parameter.data = self._like(parameter) * SPREAD

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=self._generator, device="cpu").to(tensor.device, tensor.dtype)

    def _watch(self, site: AdaptedSite) -> None:
        """Note when a layer is called with an input that is not empty, or a weight is read."""
        layer = site.layer
        name = "forward" if layer.is_called else "update"
        method: Callable[..., Any] = getattr(layer, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if not given or given[0].numel():
                self.ran.add(site)
            return method(*args, **kwargs)

        layer.__dict__[name] = noting


def half_precision(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers in half precision."""
    halves = torch.float16, torch.bfloat16
    tensors = [*model.parameters(), *model.buffers()]
    return [each for each in tensors if each.dtype in halves and type(each.data) is Tensor and not each.is_meta]


def acting_sites(census: Census, state: ModelState) -> list[AdaptedSite]:
    """Return the weights that active adapters have updates of."""
    return [site for site in census.adapted if acting_parts(site, state)]


def acting_parts(site: AdaptedSite, state: ModelState) -> list[SiteAdapter]:
    """Return the active adapters of a weight."""
    return [part for name, part in site.layer.adapters.items() if name in state.active]


def held_by(root: nn.Module, sites: Iterable[AdaptedSite], state: ModelState) -> list[object]:
    """Return what running, switching and merging may change beside modules."""
    found: list[object] = [state, state.activation, state.bank, *state.bank, *state.adapters.values()]
    found += state.replaced.values()
    found += [module._parameters for module in root.modules() if isinstance(module, Diagonal) and module._parameters]
    for site in sites:
        found += [site.layer, *site.layer.adapters.values(), *site.layer_class.beside(site.owner)]
    return [each for each in found if hasattr(each, "__dict__")]


def roles(sites: Sequence[AdaptedSite]) -> list[list[AdaptedSite]]:
    """Return the weights in groups whose names differ only by numbers, because the same code runs them."""
    found: dict[str, list[AdaptedSite]] = {}
    for site in sites:
        found.setdefault(re.sub(r"\d+", "", site.fqn), []).append(site)
    return list(found.values())


def _size(site: AdaptedSite) -> Tensor | float:
    """Return the norm of a weight, or of one of its size where that is zero."""
    typical: float = SPREAD * math.prod(site.shape) ** 0.5
    if site.layer.is_forward_only:
        return typical
    own = site.layer.written_out(site.owner)
    norm: Tensor = torch.linalg.vector_norm(own, dtype=torch.promote_types(own.dtype, torch.float32))
    return norm if norm > 0 and norm.isfinite() else typical


def tensors_in(output: object) -> Output:
    """Return the floating tensors in an output, which may be a tensor, a container, a dataclass or an object."""
    found: Output = {}
    seen: set[int] = set()
    for path, value in _walk(output, "", 0, seen):
        dense = _dense(value)
        if dense is not None and dense.numel():
            found[path] = dense
    return found


def distances(first: Output, second: Output) -> dict[str, float]:
    """Return the norm of the difference of the tensors that both outputs have, in the same shape.

    The norm is infinite if only one of two entries is finite. If neither is, they count as equal.
    """
    return {
        path: _distance(value.detach(), second[path].detach())
        for path, value in first.items()
        if path in second and second[path].shape == value.shape
    }


def roundings(output: Output) -> dict[str, float]:
    """Return for each tensor the norm below which a difference may be only rounding."""
    return {
        path: min(ROUNDING * torch.finfo(value.dtype).eps, LEAST_DIGITS) * _distance(value, torch.zeros_like(value))
        for path, value in output.items()
    }


def _distance(first: Tensor, second: Tensor) -> float:
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    are_finite = first.isfinite(), second.isfinite()
    if not torch.equal(*are_finite):
        return float("inf")
    difference = (first.to(wide) - second.to(wide)).where(are_finite[0], 0)
    return float(torch.linalg.vector_norm(difference))


def _walk(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth > DEPTH or id(value) in seen or isinstance(value, str | bytes | nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value)).items()
    else:  # a dataclass, a cache, a distribution
        inside = getattr(value, "__dict__", {}).items()
    for key, held in inside:
        yield from _walk(held, f"{path}.{key}" if path else str(key), depth + 1, seen)


def _dense(value: Tensor) -> Tensor | None:
    """Return a tensor in one piece of real numbers, or ``None`` if it has no floating values."""
    if value.is_nested:
        value = torch.cat([part.flatten() for part in value.unbind()])
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point() or value.is_meta:
        return None
    if value.layout != torch.strided:
        value = value.to_dense()
    return value if value.dtype.itemsize > 1 else value.float()


def copied(value: Any, *, is_widened: bool) -> Any:
    """Return an argument for one call, which may change it: tensors as new leaves, other objects as copies.

    If ``is_widened``, tensors in half precision become float32.
    """
    if isinstance(value, Tensor):
        is_half = is_widened and value.dtype in (torch.float16, torch.bfloat16)
        own = value.detach().float() if is_half else value.detach().clone()
        return own.requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(copied(held, is_widened=is_widened) for held in value)
    if type(value) is dict:
        return {key: copied(held, is_widened=is_widened) for key, held in value.items()}
    if isinstance(value, nn.Module):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is given as it is
        return value

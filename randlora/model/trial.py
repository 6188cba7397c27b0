"""Running a model with random values of Λ and Γ, adapted or merged, and comparing the outputs of two runs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from randlora.functional import Compute
from randlora.layers.update import Into
from randlora.model.view import View, holding_copies
from randlora.modes import uncompiled
from randlora.state import ModelState, SiteAdapter
from randlora.targets.census import AdaptedSite, Census

SHARE = 0.5
"""The norm of a random update, as a share of the norm of the weight."""

WIDENED = 2**32
"""Up to how many bytes, weights in half precision are checked in float32, where small effects can be compared."""

SPREAD = 0.02
"""The standard deviation of the values that replace zero parameters, which would hide effects before them."""

DEPTH = 8
"""How deep an output is searched for tensors."""

ROUNDING, LEAST_DIGITS = 64, 0.04
"""An output counts as exact within this many roundings of its norm; in half precision, within this share."""

HALVES = torch.float16, torch.bfloat16

Output = dict[str, Tensor]
"""The floating tensors in a forward's output, by their places in it."""


class Trial:
    """A model that is run on copies of its tensors, with random values of Λ and Γ of the active adapters.

    Attributes:
        sites: The weights that active adapters act on.
        ran: The weights whose update the last call of `gradients` computed.
    """

    def __init__(
        self, model: nn.Module, view: View, into: Into, args: tuple[Any, ...], kwargs: dict[str, Any], *, widens: bool
    ) -> None:
        """Draw the values. If ``widens``, half precision is copied to float32."""
        self.model, self.sites, self.ran = model, acting_sites(view.census, view.state), set[AdaptedSite]()
        self._state, self._into, self._args, self._kwargs, self._widens = view.state, into, args, kwargs, widens
        beside = (each for site in self.sites for each in (site.layer, *site.layer_class.beside(site.owner)))
        self._others = [view.state, *view.state.adapters.values(), *beside]
        self._generator = torch.Generator("cpu").manual_seed(0)
        # zeros, such as of gates that are not trained yet, would hide effects
        zero = [each for each in model.parameters() if _has_digits(each) and each.numel() and not each.any()]
        self._filled = {id(each): self._like(each) * SPREAD for each in zero}
        self._values: dict[int, nn.Parameter] = {}
        self._drawn = {
            site: [each for part in acting_parts(site, view.state) for each in self._draw(site, part)]
            for site in self.sites
        }

    def run(
        self, on: Collection[AdaptedSite], *, training: bool, is_merged: bool = False, compute: Compute = "auto"
    ) -> Output:
        """Return the output with updates of some weights, in training mode with gradients, else without."""
        with self._trying(on, training=training), torch.set_grad_enabled(training):
            self._state.compute = compute
            for site in on if is_merged else ():
                names = [part.adapter.name for part, _ in site.layer.acting]
                site.layer.fold(site.owner, site.layer.merged(site.owner, dict.fromkeys(names, 1.0), self._into))
                site.layer.acting = []
            return {path: value.detach().clone() for path, value in self._call().items()}

    def gradients(self, *, training: bool) -> set[AdaptedSite]:
        """Return the weights for which nonzero gradients reach all of Λ and Γ."""
        self.ran.clear()
        with self._trying(self.sites, training=training), torch.enable_grad():
            for site in self.sites:
                self._watch(site)
            values = [value for value in self._call().values() if value.requires_grad]
            weighted = [(value * self._like(value)).where(value.isfinite(), 0) for value in values]
            if weighted:  # torch.autograd.grad would not go through checkpoints with use_reentrant=True
                torch.stack([each.float().sum().to(weighted[0].device) for each in weighted]).sum().backward()
        found = {site for site, held in self._drawn.items() if all(map(_has_gradient, held))}
        for each in self._values.values():
            each.grad = None
        return found

    def is_wide(self, on: Iterable[AdaptedSite]) -> bool:
        """Whether the weights are neither quantized nor run in half precision."""
        return all(
            not site.layer.is_quantized
            and site.weight is not None
            and (self._widens or site.weight.dtype.itemsize >= 4)
            for site in on
        )

    @contextmanager
    def _trying(self, on: Iterable[AdaptedSite], *, training: bool) -> Iterator[None]:
        """Run a block in a mode, with updates of only these weights, without dropout in their inputs."""
        with (
            holding_copies([self.model], self._others, self._copy),
            uncompiled(),
        ):  # compiled code would run without what watches the layers
            for adapter in self._state.adapters.values():
                adapter.config = replace(adapter.config, dropout=0.0)  # which a merged weight has none of
            for site in self.sites:
                site.layer.activation, site.layer.acting = self._state.activation, []
            for site in on:
                site.layer.acting = [(part, 1.0) for part in acting_parts(site, self._state)]
            self.model.train(training)
            yield

    def _call(self) -> Output:
        args, kwargs = copied((self._args, self._kwargs), is_widened=self._widens)
        return tensors_in(self.model(*args, **kwargs))

    def _copy(self, tensor: Tensor) -> Tensor:
        """Return what the model holds instead of one of its tensors."""
        if (drawn := self._values.get(id(tensor))) is not None:
            return drawn
        values = self._filled.get(id(tensor), tensor)
        return values.float() if self._widens and values.dtype in HALVES else values.detach().clone()

    def _draw(self, site: AdaptedSite, part: SiteAdapter) -> Iterable[nn.Parameter]:
        """Return values for Λ and Γ of an adapter, with which its update is about as large as the weight."""
        own = site.layer.diagonals_of(site.owner, part.adapter.name)
        lam, gamma = drawn = [nn.Parameter(self._like(each)) for each in own]
        update = site.layer.update(site.owner, part, 1.0)._replace(lam=lam.detach(), gamma=gamma.detach())
        lam.data *= _size(site) * SHARE / update.norm(lam.device)
        self._values |= {id(each): values for each, values in zip(own, drawn, strict=True)}
        return drawn

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=self._generator, device="cpu").to(tensor.device, tensor.dtype)

    def _watch(self, site: AdaptedSite) -> None:
        """Note when a layer is called with an input that is not empty, or a weight is read."""
        name = "forward" if site.layer.is_called else "update"
        method: Callable[..., Any] = getattr(site.layer, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if not tensors or tensors[0].numel():
                self.ran.add(site)
            return method(*args, **kwargs)

        site.layer.__dict__[name] = noting


def half_precision(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers in half precision that have values."""
    tensors = [*model.parameters(), *model.buffers()]
    return [each for each in tensors if each.dtype in HALVES and _has_digits(each)]


def _has_digits(tensor: Tensor) -> bool:
    """Whether a tensor has values of a floating dtype of 16 bits or more, in itself."""
    is_plain = type(tensor.data) is Tensor and not tensor.is_meta
    return is_plain and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


def acting_sites(census: Census, state: ModelState) -> list[AdaptedSite]:
    """Return the weights that active adapters have updates of."""
    return [site for site in census.adapted if acting_parts(site, state)]


def acting_parts(site: AdaptedSite, state: ModelState) -> list[SiteAdapter]:
    """Return the active adapters of a weight."""
    return [part for name, part in site.layer.adapters.items() if name in state.active]


def roles(sites: Sequence[AdaptedSite]) -> list[list[AdaptedSite]]:
    """Return the weights in groups whose names differ only by numbers, because the same code runs them."""
    groups: dict[str, list[AdaptedSite]] = {}
    for site in sites:
        groups.setdefault(re.sub(r"\d+", "", site.fqn), []).append(site)
    return list(groups.values())


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
    dense = {path: _dense(value) for path, value in _walk(output, "", 0, set())}
    return {path: value for path, value in dense.items() if value is not None and value.numel()}


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
    if not torch.equal(is_finite := first.isfinite(), second.isfinite()):
        return float("inf")
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return float(torch.linalg.vector_norm((first.to(wide) - second.to(wide)).where(is_finite, 0)))


def _walk(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth > DEPTH or id(value) in seen or isinstance(value, str | bytes | nn.Module | type):
        return
    seen.add(id(value))
    if not isinstance(value, Mapping):  # a list, or a dataclass, a cache or a distribution
        value = dict(enumerate(value)) if isinstance(value, list | tuple) else getattr(value, "__dict__", {})
    for key, inner in value.items():
        yield from _walk(inner, f"{path}.{key}" if path else str(key), depth + 1, seen)


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
        own = value.detach().float() if is_widened and value.dtype in HALVES else value.detach().clone()
        return own.requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(copied(inner, is_widened=is_widened) for inner in value)
    if type(value) is dict:
        return {key: copied(inner, is_widened=is_widened) for key, inner in value.items()}
    try:
        return value if isinstance(value, nn.Module) else copy.deepcopy(value)
    except Exception:  # what cannot be copied is given as it is
        return value

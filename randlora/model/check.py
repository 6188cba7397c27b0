"""`check`: whether every adapted weight has an effect, gradients, and the same effect once merged.

The model runs with random values of Λ and Γ, adapted and merged, and the outputs are compared.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from randlora.blocks import uncompiled
from randlora.errors import AdapterError, raise_collected
from randlora.functional import Compute
from randlora.layers.weight import Into
from randlora.model.install import offloaded_diagonals
from randlora.model.mergeable import TOLERANCE, differences_from_product, model_dtype, quantized_since, weight_problems
from randlora.model.view import WRAPPERS, View, holding_copies, is_held_together, opened
from randlora.places import Plain
from randlora.replaced import unwrapped
from randlora.report import by_reason, wrapped
from randlora.state import SiteAdapter, require_unmerged
from randlora.targets.census import AdaptedSite
from randlora.targets.left_out import computed_weights, tie_problems
from randlora.targets.match import shortened

Sites = Collection[AdaptedSite]
SiteAdapters = dict[AdaptedSite, list[SiteAdapter]]

SHARE = 0.5  # the norm of a random update, as a share of the norm of the weight
SPREAD = 0.02  # the standard deviation of values in place of zero parameters, which would hide effects before them
WIDENED = 2**32  # up to how many bytes, half precision is checked in float32, where small effects can be compared
DEPTH = 8  # how deep an output is searched for tensors

# merged and adapted may differ by this share of the effect, with float32 weights; with narrower or quantized ones
EXACT, ROUNDED = 0.01, 0.1
# an output counts as exact within this many roundings of its norm; in half precision, within this share
ROUNDING, LEAST_DIGITS = 64, 0.04
# how many times an effect must exceed the distance between two equal runs, or it may be noise; how many times a
# difference between merged and adapted must exceed that between two ways of computing an update
NOISE_FACTOR, ROUNDING_FACTOR = 4, 10

HALVES = torch.float16, torch.bfloat16
Output = dict[str, Tensor]  # the dense floating tensors in a forward's output, by their places in it

Fault = Literal["unused", "read past", "no gradient", "merged differs"]

WORDS: dict[Fault, str] = {
    "unused": "the output does not depend on it: train with inputs on which it acts, or exclude it",
    "read past": "no effect as an adapter, but an effect once merged: other code reads the weight instead of calling "
    "the layer. Exclude it",
    "no gradient": "an effect, but no gradient reaches the adapter: exclude it, or find what stops the gradient, such "
    "as no_grad, or checkpointing with use_reentrant=True",
    "merged differs": "a different effect once merged than as an adapter: do not merge it, or exclude it",
}


@torch.inference_mode(mode=False)
def check(model: nn.Module, /, *args: Any, **kwargs: Any) -> CheckReport:
    """Check that every adapted weight has an effect, gradients, and the same effect once merged, by running the model.

    If other code reads a layer's weight instead of calling the layer, an adapter of this layer may have no effect. This
    runs the model with random values of every Λ and Γ of the active adapters, as adapters and merged, and compares the
    outputs, in evaluation mode. Gradients are computed in training mode too.

    The model holds copies of its tensors meanwhile. All tensors, attributes of its modules, and the states of random
    number generators are the same afterwards, even if the forward raises. No other thread may run the model meanwhile.
    The check takes some dozen forward passes, so give it a small input, and as much memory as a copy of the model's
    weights. A model in half precision of up to 4 GB is copied to float32, so that small effects can be compared, if its
    forward allows it.

    Args:
        model: A model with adapters. Its active adapters are checked, trainable or not.
        *args: Arguments of its forward. Each call gets copies of them.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The report, which is true if something was found. Weights that this input did not reach, such as in a decoder
        that was not called, are listed in ``unchecked``. A note says so if backward raises, or the forward in training
        mode.

    Raises:
        AdapterError: If the model has no adapter or none is active, adapters are merged or disabled, weights are
            sharded, offloaded or have no values, or the forward returns no dense floating tensor.
        Exception: What the model's forward raises in evaluation mode.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, targets="all")
        >>> print(randlora.check(model, torch.randn(2, 8)))
        all 2 adapted weights work
    """
    with opened(model, "check") as view:
        state = view.state
        require_unmerged(state, "check")
        site_adapters = {
            site: acting
            for site in view.census.adapted
            if (acting := [site_adapter for name, site_adapter in site.layer.adapters.items() if name in state.active])
            if not site.layer.is_rows  # of which a few inputs would reach few
        }
        raise_collected(AdapterError, _obstacles(view, [*site_adapters]), doing="check")
        inner = unwrapped(model, WRAPPERS)
        tensors = (*inner.parameters(), *inner.buffers())
        halves = sum(each.nbytes for each in tensors if each.dtype in HALVES and _has_digits(each))
        trial = partial(_Trial, inner, view, site_adapters, (args, kwargs))
        try:
            if 0 < halves <= WIDENED:
                with suppress(RuntimeError, TypeError):  # of a forward that casts to half precision itself
                    return _checked(view, trial(widens=True))
            return _checked(view, trial(widens=False))
        finally:
            for basis in state.bank:
                basis.release()  # its working copies in dtypes that the model may not use


def _obstacles(view: View, sites: Sequence[AdaptedSite]) -> list[str]:
    """Return messages about why the model cannot be run as an adapted one."""
    if view.state.is_disabled:
        return [f"the adapters are disabled: check outside of {view.state.disabled_by}"]
    if not sites:
        return [f"no adapter is active: activate one of {', '.join(view.state.adapters)}"]
    if is_held_together(view.census.model):
        return ["the model is spread over processes: check it, or a smaller model of its class, before it is sharded"]
    placed = quantized_since(sites) or [
        f"{site.fqn} is offloaded or sharded: check the model before it is"
        for site in sites
        if site.weight is not None and not isinstance(site.place, Plain) and not site.layer.is_quantized
    ]
    read = [site for site in sites if not site.layer.is_forward_only]
    return [*computed_weights(sites), *placed, *offloaded_diagonals(view.census)] or weight_problems(read, None)


def _checked(view: View, trial: _Trial) -> CheckReport:
    differences = differences_from_product(trial.sites)
    refused = {site: share for site, share in differences.items() if share is not None and share > TOLERANCE}
    merging = [site for site in trial.sites if not site.layer.is_forward_only and site not in refused]
    unknown = [site.fqn for site in trial.sites if site.layer.is_forward_only]
    notes = [f"only checked unmerged, as nothing can be merged into them: {shortened(unknown)}"] if unknown else []
    if problems := [*tie_problems(view.census, merging), *weight_problems(merging, Into("dequantize"))]:
        merging, notes = [], [*notes, f"merged weights were not compared: {'; '.join(problems)}"]
    seen = _Findings(trial, merging)
    faults = {site: [*_faults(site, seen, refused.get(site))] for site in trial.sites}
    unchecked = {
        site.fqn: "only inactive adapters act on it: activate them, and check again"
        for site in view.census.adapted
        if not (site in faults or site.layer.is_rows)
    }
    faultless = [site for site, problems in faults.items() if not problems]
    for site in faultless:
        if site not in seen.trained and site not in seen.moved:
            unchecked[site.fqn] = "this input does not reach it"
        elif site in seen.unclear:
            unchecked[site.fqn] = "its effect is not larger than rounding, so merged and adapted cannot be compared"
    checked = tuple(site.fqn for site in faultless if site.fqn not in unchecked)
    found = tuple(problem for problems in faults.values() for problem in problems)
    return CheckReport(found, unchecked, checked, (*notes, *seen.notes))


def _faults(site: AdaptedSite, seen: _Findings, refused: float | None) -> Iterator[Problem]:
    """Yield what is wrong with one weight; ``refused`` is how much more than the product its forward computes."""
    is_bypassed = refused is not None and site.layer.is_read
    if is_bypassed or (site in seen.moved_merged and site not in seen.moved):
        yield Problem(site.fqn, "read past")
        return
    if site not in seen.trained:
        if site in seen.moved and len(seen.notes) < 2:  # a backward ran in one mode
            yield Problem(site.fqn, "no gradient")
        elif site in seen.ran and site not in seen.moved:
            yield Problem(site.fqn, "unused")
    if (difference := refused if refused is not None else seen.differing.get(site)) is not None:
        yield Problem(site.fqn, "merged differs", difference)


class _Findings:
    """What runs of a model have shown: gradients in both modes, effects on the output in evaluation mode."""

    def __init__(self, trial: _Trial, merging: Sequence[AdaptedSite]) -> None:
        self._trial, self._base = trial, trial.run(())
        if not self._base:
            raise AdapterError("cannot check: the forward returns no dense floating tensor, such as logits, to compare")
        self._jitter = {path: NOISE_FACTOR * far for path, far in _distances(self._base, trial.run(())).items()}
        self._floors = dict[str, float]()
        for path, output in self._base.items():
            digits = min(ROUNDING * torch.finfo(output.dtype).eps, LEAST_DIGITS)
            least = digits * _distance(output, torch.zeros_like(output))
            self._floors[path] = max(self._jitter.get(path, 0.0), least)
        self.trained, self.ran, self.notes = set[AdaptedSite](), set[AdaptedSite](), list[str]()
        for mode in ("evaluation", "training"):
            try:
                self.trained |= trial.gradients(training=mode == "training")
            except Exception as error:  # in training mode, of the forward too
                self.notes.append(f"gradients were not checked in {mode} mode: {type(error).__name__}: {error}")
                if mode == "training":  # without gradients it is unknown what has an effect there
                    break
            self.ran |= trial.ran
        rest = [site for site in trial.sites if site not in self.trained]
        self.moved = set(_blame(rest, self._move))
        rest = [site for site in rest if site in merging]
        self.moved_merged = set(_blame(rest, partial(self._move, is_merged=True)))
        self.unclear = set[AdaptedSite]()  # whose effects are too small to tell
        self.differing: dict[AdaptedSite, float] = {}  # by which share of the effect
        self._shares: dict[AdaptedSite, float] = {}
        roles: dict[str, list[AdaptedSite]] = {}
        for site in merging:  # the same code runs those whose names differ only by numbers
            roles.setdefault(re.sub(r"\d+", "", site.fqn), []).append(site)
        for group in [*roles.values(), merging]:
            rest = [site for site in group if site not in self.differing]
            self.differing |= {site: self._shares[site] for site in _blame(rest, self._differ)}

    def _move(self, on: Sites, *, is_merged: bool = False) -> bool:
        """Whether updates of some weights change the output."""
        far = _distances(self._trial.run(on, is_merged=is_merged), self._base)
        return any(distance > self._jitter.get(path, 0.0) for path, distance in far.items())

    def _differ(self, on: Sites) -> bool:
        """Whether updates of some weights have a different effect once merged than as adapters."""
        run, base = self._trial.run, self._base
        adapted, as_merged = run(on), run(on, is_merged=True)
        effects = _distances(adapted, base), _distances(as_merged, base)
        effect = {path: max(far.get(path, 0.0) for far in effects) for path in base}
        tolerance = EXACT if self._trial.is_wide(on) else ROUNDED
        far = {path: each for path, each in _distances(adapted, as_merged).items() if each > tolerance * effect[path]}
        if not far:
            return False
        rounding = _distances(run(on, compute="factored"), run(on, compute="materialized"))
        sure = [path for path in far if far[path] > max(ROUNDING_FACTOR * rounding.get(path, 0.0), self._floors[path])]
        self._shares |= dict.fromkeys(on, max((far[path] / effect[path] for path in sure), default=0.0))
        self.unclear |= set(() if sure else on)
        return bool(sure)


def _blame(sites: Sequence[AdaptedSite], has: Callable[[Sites], bool]) -> list[AdaptedSite]:
    """Return the weights that have a property, found by halving sets that have it."""
    if not sites or not has(sites):
        return []
    if len(sites) == 1:
        return list(sites)
    middle = len(sites) // 2
    return [*_blame(sites[:middle], has), *_blame(sites[middle:], has)] or list(sites)


@dataclass(frozen=True)
class Problem:
    """An adapted weight with a fault.

    Attributes:
        fqn: Its name among the adapter's targets.
        fault: ``"unused"`` if the output does not depend on it, ``"read past"`` if it has an effect only once merged,
            ``"no gradient"`` if it has an effect but would not be trained, ``"merged differs"`` if it has a different
            effect once merged.
        difference: For ``"merged differs"``, how large the difference is as a share of the effect.
    """

    fqn: str
    fault: Fault
    difference: float | None = None

    def __str__(self) -> str:
        return _line([self])


@dataclass(frozen=True)
class CheckReport:
    """The report of `randlora.check`. It is true if something was found.

    Attributes:
        problems: The adapted weights with a fault.
        unchecked: Why weights could not be checked, by FQN, such as that this input did not reach them.
        checked: The FQNs of the weights without a fault.
        notes: Checks of the whole model that were not possible.
    """

    problems: tuple[Problem, ...]
    unchecked: dict[str, str] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.problems)

    def __str__(self) -> str:
        found = len({problem.fqn for problem in self.problems})
        total = found + len(self.unchecked) + len(self.checked)
        lines = [f"{found} of {total} adapted weights are not as they should be; {len(self.checked)} are"]
        if total == len(self.checked):
            lines = [f"all {total} adapted weights work" if total != 1 else "the adapted weight works"]
        by_fault: dict[str, list[Problem]] = {}
        for problem in self.problems:
            by_fault.setdefault(problem.fault, []).append(problem)
        lines += [*map(_line, by_fault.values()), *by_reason("not checked", self.unchecked), *self.notes]
        return "\n".join(wrapped(lines))


def _line(problems: Sequence[Problem]) -> str:
    shares = [problem.difference for problem in problems if problem.difference is not None]
    size = f" (by up to {max(shares):.0%} of the effect)" if shares else ""
    return f"{shortened([problem.fqn for problem in problems])}: {WORDS[problems[0].fault]}{size}"


class _Trial:
    """A model that runs on copies of its tensors, with random values of Λ and Γ of the active adapters."""

    def __init__(
        self, model: nn.Module, view: View, site_adapters: SiteAdapters, arguments: tuple[Any, ...], *, widens: bool
    ) -> None:
        """Draw the values. If ``widens``, half precision is copied to float32."""
        self.model, self.sites, self.ran = model, [*site_adapters], set[AdaptedSite]()
        self.site_adapters = site_adapters
        self._state, self._arguments, self._widens = view.state, arguments, widens
        self._into = Into("dequantize", torch.float32 if widens else model_dtype(view.census))
        beside = (each for site in site_adapters for each in (site.layer, *site.layer_class.beside(site.owner)))
        self._others = [view.state, *view.state.adapters.values(), *beside]
        self._generator = torch.Generator("cpu").manual_seed(0)
        # zeros, such as of gates that are not trained yet, would hide effects
        zero = [each for each in model.parameters() if _has_digits(each) and each.numel() and not each.any()]
        self._filled = {id(each): self._like(each) * SPREAD for each in zero}
        self._values: dict[int, nn.Parameter] = {}
        self._drawn = {
            site: [diagonal for site_adapter in acting for diagonal in self._draw(site, site_adapter)]
            for site, acting in site_adapters.items()
        }

    def run(self, on: Sites, *, is_merged: bool = False, compute: Compute = "auto") -> Output:
        """Return the output with updates of some weights, in evaluation mode."""
        with self._trying(on, training=False), torch.no_grad():
            self._state.compute = compute
            for site in on if is_merged else ():
                names = [site_adapter.adapter.name for site_adapter, _ in site.layer.acting]
                merged = site.layer.compute_merged(site.owner, dict.fromkeys(names, 1.0), self._into)
                site.layer.write_merged(site.owner, merged)
                site.layer.acting = []
            return {path: value.detach().clone() for path, value in self._call().items()}

    def gradients(self, *, training: bool) -> set[AdaptedSite]:
        """Return the weights for which nonzero gradients reach all of Λ and Γ; ``ran`` are those whose update ran."""
        self.ran = set()
        for each in self._values.values():
            each.grad = None
        with self._trying(self.sites, training=training), torch.enable_grad():
            for site in self.sites:
                self._watch(site)
            values = [value for value in self._call().values() if value.requires_grad]
            weighted = [(value * self._like(value)).where(value.isfinite(), 0) for value in values]
            if weighted:  # torch.autograd.grad would not go through checkpoints with use_reentrant=True
                torch.stack([each.float().sum().to(weighted[0].device) for each in weighted]).sum().backward()
        reached = {id(each) for each in self._values.values() if each.grad is not None and each.grad.count_nonzero()}
        return {site for site, drawn in self._drawn.items() if reached.issuperset(map(id, drawn))}

    def is_wide(self, on: Sites) -> bool:
        """Whether the weights are neither quantized nor run in half precision."""
        weights = [None if site.layer.is_quantized else site.weight for site in on]
        return all(each is not None and (self._widens or each.dtype.itemsize >= 4) for each in weights)

    @contextmanager
    def _trying(self, on: Iterable[AdaptedSite], *, training: bool) -> Iterator[None]:
        """Run a block in a mode, with updates of only these weights, without dropout in their inputs."""
        # compiled code would run without what watches the layers
        with holding_copies(self.model, self._others, self._copy), uncompiled():
            for adapter in self._state.adapters.values():
                adapter.config = replace(adapter.config, dropout=0.0)  # which a merged weight has none of
            for site in self.sites:
                site.layer.activation, site.layer.acting = self._state.activation, []
            for site in on:
                site.layer.acting = [(site_adapter, 1.0) for site_adapter in self.site_adapters[site]]
            self.model.train(training)
            yield

    def _call(self) -> Output:
        args, kwargs = _copied(self._arguments, is_widened=self._widens)
        return {
            path: value if value.dtype.itemsize > 1 else value.float()
            for path, value in _tensors(self.model(*args, **kwargs), "", 0, set())
            if value.is_floating_point() and value.layout == torch.strided and not (value.is_meta or value.is_nested)
            if value.numel()
        }

    def _copy(self, tensor: Tensor) -> Tensor:
        """Return what the model holds instead of one of its tensors."""
        if (drawn := self._values.get(id(tensor))) is not None:
            return drawn
        values = self._filled.get(id(tensor), tensor)
        return values.float() if self._widens and values.dtype in HALVES else values.detach().clone()

    def _draw(self, site: AdaptedSite, site_adapter: SiteAdapter) -> Iterable[nn.Parameter]:
        """Return values for Λ and Γ of an adapter, with which its update is about as large as the weight."""
        diagonals = site.layer.diagonals_of(site.owner, site_adapter.adapter.name)
        lam, gamma = drawn = [nn.Parameter(self._like(each)) for each in diagonals]
        size: Tensor | float = SPREAD * math.prod(site.shape) ** 0.5
        if not site.layer.is_forward_only:
            weight = site.layer.written_out(site.owner)
            norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            size = norm if norm > 0 and norm.isfinite() else size
        update = site.layer.update(site.owner, site_adapter, 1.0)._replace(lam=lam.detach(), gamma=gamma.detach())
        lam.data *= size * SHARE / update.norm(lam.device)
        self._values |= {id(each): values for each, values in zip(diagonals, drawn, strict=True)}
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


def _has_digits(tensor: Tensor) -> bool:
    """Whether a tensor has values of a floating dtype of 16 bits or more, in itself."""
    is_plain = type(tensor.data) is Tensor and not tensor.is_meta
    return is_plain and tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _distances(first: Output, second: Output) -> dict[str, float]:
    """Return the norm of the difference of the tensors that both outputs have, in the same shape."""
    shared = [path for path, value in first.items() if path in second and second[path].shape == value.shape]
    return {path: _distance(first[path], second[path]) for path in shared}


def _distance(first: Tensor, second: Tensor) -> float:
    """Return the norm of a difference: infinite if only one of two entries is finite, without those where none is."""
    if not torch.equal(is_finite := first.isfinite(), second.isfinite()):
        return float("inf")
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return float(torch.linalg.vector_norm((first.to(wide) - second.to(wide)).where(is_finite, 0)))


def _tensors(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in an output, which may be a tensor, a container, a dataclass or an object."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if depth > DEPTH or id(value) in seen or isinstance(value, str | bytes | nn.Module | type):
        return
    seen.add(id(value))
    if not isinstance(value, Mapping):  # a list, or a dataclass, a cache or a distribution
        value = dict(enumerate(value)) if isinstance(value, list | tuple) else getattr(value, "__dict__", {})
    for key, inner in value.items():
        yield from _tensors(inner, f"{path}.{key}" if path else str(key), depth + 1, seen)


def _copied(value: Any, *, is_widened: bool) -> Any:
    """Return an argument for one call, which may change it: tensors as new leaves, other objects as copies."""
    if isinstance(value, Tensor):
        leaf = value.detach().float() if is_widened and value.dtype in HALVES else value.detach().clone()
        return leaf.requires_grad_(value.requires_grad)
    if type(value) in (list, tuple):
        return type(value)(_copied(inner, is_widened=is_widened) for inner in value)
    if type(value) is dict:
        return {key: _copied(inner, is_widened=is_widened) for key, inner in value.items()}
    with suppress(Exception):  # what cannot be copied is given as it is
        return value if isinstance(value, nn.Module) else copy.deepcopy(value)
    return value

"""`check`: whether every adapted weight has an effect, gradients, and the same effect once merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from randlora.errors import AdapterError, raise_collected
from randlora.layers.update import Into
from randlora.model.engines import is_held_together
from randlora.model.listing import offloaded_diagonals
from randlora.model.mergeable import TOLERANCE, differences_from_product, model_dtype, weight_problems
from randlora.model.trial import WIDENED, Trial, acting_sites, distances, half_precision, roles, roundings
from randlora.model.view import View, opened, unwrapped_model
from randlora.places import Plain
from randlora.report import wrapped
from randlora.state import require_unmerged
from randlora.targets.census import AdaptedSite
from randlora.targets.match import shortened
from randlora.targets.obstacles import computed_weights, tie_problems

Sites = Collection[AdaptedSite]

EXACT, ROUNDED = 0.01, 0.1
"""How far merged and adapted may differ, as a share of the effect: float32 weights; narrower or quantized weights."""

Fault = Literal["unused", "read past", "no gradient", "merged differs"]

MODES = "evaluation mode", "training mode"

WORDS: dict[Fault, str] = {
    "unused": "computed, but the output does not depend on it: train with inputs on which it acts, or exclude it",
    "read past": "no effect as an adapter, but an effect once merged: other code reads the weight instead of calling "
    "the layer. Exclude it",
    "no gradient": "an effect, but no gradient reaches the adapter, so it would not be trained: exclude it, or "
    "find what stops the gradient, such as a forward under no_grad, or checkpointing with use_reentrant=True",
    "merged differs": "a different effect once merged than as an adapter, because the forward changes the weight or "
    "does more than multiply by it: do not merge it, or exclude it",
}


@torch.inference_mode(mode=False)
def check(model: nn.Module, /, *args: Any, **kwargs: Any) -> CheckReport:
    """Check that every adapted weight has an effect, gradients, and the same effect once merged, by running the model.

    If other code reads a layer's weight instead of calling the layer, an adapter of this layer has no effect. The
    library knows many such layers by the names of their classes and refuses them; this check needs no names. It runs
    the model with random values of every Λ and Γ of the active adapters, as adapters and merged, in training mode and
    in evaluation mode, and compares the outputs.

    The model holds copies of its tensors meanwhile, so Λ and Γ, all weights, buffers such as running statistics,
    ``requires_grad`` and ``grad`` do not change. Attributes of its modules, such as training flags and hooks, and the
    states of random number generators are the same afterwards, even if the forward raises. No other thread may run the
    model meanwhile. The check takes some dozen forward passes, so give it a small input, and as much memory as a copy
    of the model's weights. A model in half precision of up to 4 GB is copied to float32, so that small effects can be
    compared, if its forward allows it.

    Args:
        model: A model with adapters. Its active adapters are checked, trainable or not.
        *args: Arguments of its forward. Each call gets copies of them.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The report, which is true if something was found. Weights that this input did not reach, such as in a decoder
        that was not called, are listed in ``unchecked``. A note says so if the forward raises in the mode that the
        model is not in, or if backward raises in either mode.

    Raises:
        AdapterError: If the model has no adapter or none is active, adapters are merged or disabled, weights are
            sharded, offloaded or have no values, or the forward returns no floating tensor.
        Exception: Whatever the model's forward raises in the mode that the model is in.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, targets="all")
        >>> print(randlora.check(model, torch.randn(2, 8)))
        0 of 2 adapted weights are not as they should be; 2 are
    """
    with opened(model, "check") as view:
        state, census = view.state, view.census
        require_unmerged(state, "check")
        sites = acting_sites(census, state)
        raise_collected(AdapterError, _obstacles(view, sites), doing="check")
        inner = unwrapped_model(model)
        try:
            if 0 < sum(tensor.nbytes for tensor in half_precision(inner)) <= WIDENED:
                with suppress(RuntimeError, TypeError):  # of a forward that casts to half precision itself
                    into = Into("dequantize", torch.float32)
                    return _checked(view, Trial(inner, view, into, args, kwargs, widens=True))
            into = Into("dequantize", model_dtype(census))
            return _checked(view, Trial(inner, view, into, args, kwargs, widens=False))
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
    placed = [
        f"{site.fqn} is offloaded or sharded: check the model before it is"
        for site in sites
        if site.weight is not None and not isinstance(site.place, Plain) and not site.layer.is_quantized
    ]
    read = [site for site in sites if not site.layer.is_forward_only]
    return [*computed_weights(sites), *placed, *offloaded_diagonals(view.census)] or weight_problems(read, None)


def _checked(view: View, trial: Trial) -> CheckReport:
    """Return what is found in the mode that the model is in and, if its forward runs there, in the other one."""
    differences = differences_from_product(trial.sites)
    refused = {site: share for site, share in differences.items() if share is not None and share > TOLERANCE}
    merging = [site for site in trial.sites if not site.layer.is_forward_only and site not in refused]
    unknown = [site.fqn for site in trial.sites if site.layer.is_forward_only]
    notes = [f"only checked unmerged, as nothing can be merged into them: {shortened(unknown)}"] * bool(unknown)
    if problems := [*tie_problems(view.census, merging), *weight_problems(merging, Into("dequantize"))]:
        merging, notes = [], [*notes, f"merged weights were not compared: {'; '.join(problems)}"]
    is_training = trial.model.training
    seen = [_Mode(trial, merging, training=is_training)]
    try:
        seen.append(_Mode(trial, merging, training=not is_training))
    except Exception as error:
        notes.append(f"not checked in {MODES[not is_training]}: {type(error).__name__}: {error}")
    failed = [mode for mode in seen if mode.backward_error]
    notes += [f"gradients were not checked in {mode.name}: {mode.backward_error}" for mode in failed]
    return _report(view, trial, seen, refused, notes)


class _Mode:
    """What was found in training or in evaluation mode.

    Attributes:
        ran: The weights whose update was computed.
        trained: Those that gradients reach.
        moved: The others that have an effect.
        moved_merged: The others that have an effect once merged.
        differing: Those with a different effect once merged, with the difference as a share of the effect.
        unclear: Those whose effects are too small to tell.
    """

    def __init__(self, trial: Trial, merging: Sequence[AdaptedSite], *, training: bool) -> None:
        """Run the model."""
        self.name, self._trial, self._run = MODES[training], trial, partial(trial.run, training=training)
        self._base = self._run(())
        if not self._base:
            raise AdapterError("cannot check: the forward returns no floating tensor, such as logits, to compare")
        jitter, floors = distances(self._base, self._run(())), roundings(self._base)
        self._jitter = {path: 4 * jitter.get(path, 0.0) for path in self._base}
        self._floors = {path: max(floors[path], self._jitter[path]) for path in self._base}
        self._shares: dict[AdaptedSite, float] = {}
        self.unclear: set[AdaptedSite] = set()
        self.backward_error, self.trained = "", set[AdaptedSite]()
        try:
            self.trained = trial.gradients(training=training)
        except Exception as error:  # the forward has not raised before
            self.backward_error = f"{type(error).__name__}: {error}"
        self.ran = set(trial.ran)
        rest = [site for site in trial.sites if site not in self.trained]
        self.moved = set(blame(rest, self._moves))
        self.moved_merged = set(blame([site for site in rest if site in merging], partial(self._moves, merged=True)))
        self.differing: dict[AdaptedSite, float] = {}
        for group in [*roles(merging), merging]:
            rest = [site for site in group if site not in self.differing]
            self.differing |= {site: self._shares[site] for site in blame(rest, self._differs)}

    def _moves(self, on: Sites, *, merged: bool = False) -> bool:
        """Whether updates of some weights change the output."""
        far = distances(self._run(on, is_merged=merged), self._base)
        return any(each > self._jitter.get(path, 0.0) for path, each in far.items())

    def _differs(self, on: Sites) -> bool:
        """Whether updates of some weights have a different effect once merged than as adapters."""
        adapted, as_merged = self._run(on), self._run(on, is_merged=True)
        effects = distances(adapted, self._base), distances(as_merged, self._base)
        effect = {path: max(each.get(path, 0.0) for each in effects) for path in self._base}
        tolerance = EXACT if self._trial.is_wide(on) else ROUNDED
        far = {path: each for path, each in distances(adapted, as_merged).items() if each > tolerance * effect[path]}
        if not far:
            return False
        rounding = distances(self._run(on, compute="factored"), self._run(on, compute="materialized"))
        sure = [path for path in far if far[path] > max(10 * rounding.get(path, 0.0), self._floors[path])]
        self._shares |= dict.fromkeys(on, max((far[path] / effect[path] for path in sure), default=0.0))
        self.unclear |= set(() if sure else on)
        return bool(sure)


def blame(sites: Sequence[AdaptedSite], has: Callable[[Sites], bool]) -> list[AdaptedSite]:
    """Return the weights that have a property, found by halving sets that have it."""
    if not sites or not has(sites):
        return []
    if len(sites) == 1:
        return list(sites)
    middle = len(sites) // 2
    return [*blame(sites[:middle], has), *blame(sites[middle:], has)] or list(sites)


def _report(
    view: View, trial: Trial, seen: Sequence[_Mode], refused: Mapping[AdaptedSite, float], notes: Sequence[str]
) -> CheckReport:
    """Return what both modes have found together."""
    keys, problems = {site.key for site in trial.sites}, list[Problem]()
    unchecked = {
        site.fqn: "only inactive adapters act on it: activate them, and check again"
        for site in view.census.adapted
        if site.key not in keys
    }
    for site in trial.sites:
        if faults := list(_faults(site, seen, refused.get(site))):
            problems += faults
        elif not any(site in mode.trained or site in mode.moved for mode in seen):
            unchecked[site.fqn] = "this input does not reach it"
        elif any(site in mode.unclear for mode in seen):
            unchecked[site.fqn] = "its effect is not larger than rounding, so merged and adapted cannot be compared"
    left = {problem.fqn for problem in problems} | unchecked.keys()
    checked = tuple(site.fqn for site in trial.sites if site.fqn not in left)
    return CheckReport(tuple(problems), unchecked, checked, tuple(notes))


def _faults(site: AdaptedSite, seen: Sequence[_Mode], refused: float | None) -> Iterator[Problem]:
    """Yield what is wrong with one weight; ``refused`` is how much more than the product its forward computes."""

    def problem(fault: Fault, modes: Sequence[_Mode], difference: float | None = None) -> Problem:
        return Problem(site.fqn, fault, tuple(mode.name for mode in modes), difference)

    is_bypassed = refused is not None and site.layer.is_read
    past = [mode for mode in seen if is_bypassed or site in mode.moved_merged - mode.moved]
    moved = [mode for mode in seen if site in mode.moved]
    ran = [mode for mode in seen if site in mode.ran]
    if past:
        yield problem("read past", past)
    elif not any(site in mode.trained for mode in seen):
        if not moved and ran:
            yield problem("unused", ran)
        elif moved and not any(mode.backward_error for mode in moved):
            yield problem("no gradient", moved)
    differing = [mode for mode in seen if site in mode.differing]
    if refused is not None and not is_bypassed:
        yield problem("merged differs", seen, refused)
    elif differing and not past:
        yield problem("merged differs", differing, max(mode.differing[site] for mode in differing))


@dataclass(frozen=True)
class Problem:
    """An adapted weight with a fault.

    Attributes:
        fqn: Its name among the adapter's targets.
        fault: ``"unused"`` if the output does not depend on it, ``"read past"`` if it has an effect only once merged,
            ``"no gradient"`` if it has an effect but would not be trained, ``"merged differs"`` if it has a different
            effect once merged.
        modes: Where the fault was seen: ``"training mode"``, ``"evaluation mode"``, or both.
        difference: For ``"merged differs"``, how large the difference is as a share of the effect.
    """

    fqn: str
    fault: Fault
    modes: tuple[str, ...]
    difference: float | None = None

    def __str__(self) -> str:
        """Return one line."""
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
        """Whether something was found."""
        return bool(self.problems)

    def __str__(self) -> str:
        """Return the problems, equal ones together, what was not checked, and the notes."""
        found = len({problem.fqn for problem in self.problems})
        total = found + len(self.unchecked) + len(self.checked)
        lines = [f"{found} of {total} adapted weights are not as they should be; {len(self.checked)} are"]
        alike: dict[tuple[object, ...], list[Problem]] = {}
        for problem in self.problems:
            alike.setdefault((problem.fault, problem.modes), []).append(problem)
        reasons: dict[str, list[str]] = {}
        for fqn, reason in self.unchecked.items():
            reasons.setdefault(reason, []).append(fqn)
        not_checked = [f"not checked: {shortened(fqns)} ({reason})" for reason, fqns in reasons.items()]
        return "\n".join(wrapped([*lines, *map(_line, alike.values()), *not_checked, *self.notes]))


def _line(problems: Sequence[Problem]) -> str:
    """Return a line about problems of one kind, seen in the same modes."""
    first, shares = problems[0], [each.difference for each in problems if each.difference is not None]
    size = f", by up to {max(shares):.0%} of the effect" if shares else ""
    modes = " and ".join(first.modes)
    return f"{shortened([each.fqn for each in problems])}: {WORDS[first.fault]} (in {modes}{size})"

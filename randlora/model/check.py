"""`check`: whether every adapted weight has an effect, gradients, and the same effect once merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from randlora.errors import AdapterError, MergeError, raise_collected
from randlora.model.engines import is_held_together
from randlora.model.listing import offloaded_diagonals
from randlora.model.merge import merged
from randlora.model.mergeable import TOLERANCE, differences_from_product, weight_problems
from randlora.model.trial import WIDENED, Trial, acting_sites, distances, half_precision, held_by, roles, roundings
from randlora.model.view import View, opened, undone, unwrapped_model
from randlora.places import Plain
from randlora.report import wrapped
from randlora.state import require_unmerged
from randlora.targets.census import AdaptedSite, Census
from randlora.targets.match import shortened
from randlora.targets.obstacles import computed_weights

Sites = Collection[AdaptedSite]

EXACT, ROUNDED = 0.01, 0.1
"""How far merged and adapted may differ, as a share of the effect: float32 weights; narrower or quantized weights."""

Fault = Literal["unused", "read past", "no gradient", "merged differs"]

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

    Afterwards Λ and Γ, all weights, buffers such as running statistics, ``requires_grad``, ``grad``, training flags,
    hooks and the states of random number generators are the same as before, bit for bit, even if the forward raises. No
    other thread may run the model meanwhile.

    The check takes about a hundred forward passes, so give it a small input. A copy of the model's weights is kept on
    the CPU. A model in half precision of up to 4 GB is checked in float32, so that small effects can be compared, if
    its forward allows it.

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

        def run(*, is_widened: bool) -> CheckReport:
            with undone([inner], held_by(view.root, sites, state)) as before:
                trial = Trial(inner, census, state, args, kwargs, is_widened=is_widened)
                trial.ready(before)
                return _checked(census, trial)

        size = sum(tensor.nbytes for tensor in half_precision(inner))
        if 0 < size <= WIDENED:
            with suppress(RuntimeError, TypeError):  # of a forward that casts to half precision itself
                return run(is_widened=True)
        return run(is_widened=False)


def _checked(census: Census, trial: Trial) -> CheckReport:
    """Return the report, given a model with drawn values."""
    differences = differences_from_product(trial.sites)
    refused = {site: share for site, share in differences.items() if share is not None and share > TOLERANCE}
    merging, notes = _mergeable(census.model, trial, refused)
    seen, more = _both_modes(trial, merging, is_training=trial.model.training)
    return _report(census, trial.sites, seen, refused, [*notes, *more])


def _obstacles(view: View, sites: Sequence[AdaptedSite]) -> list[str]:
    """Return messages about why the model cannot be run as an adapted one."""
    if view.state.is_disabled:
        return [f"the adapters are disabled: check outside of {view.state.disabled_by}"]
    if not sites:
        return [f"no adapter is active: activate one of {', '.join(view.state.adapters)}"]
    if is_held_together(view.census.model):
        return ["the model is spread over processes: check it, or a smaller model of its class, before it is sharded"]
    if computed := computed_weights(sites):
        return computed
    placed = [
        f"{site.fqn} is offloaded or sharded: check the model before it is"
        for site in sites
        if not isinstance(site.place, Plain) and not site.layer.is_quantized
    ]
    read = [site for site in sites if not site.layer.is_forward_only]
    return [*placed, *offloaded_diagonals(view.census)] or weight_problems(read, None)


def _mergeable(
    root: nn.Module, trial: Trial, refused: Mapping[AdaptedSite, float]
) -> tuple[list[AdaptedSite], list[str]]:
    """Return the weights whose merged effect can be compared, and notes on those that cannot."""
    known = [site for site in trial.sites if not site.layer.is_forward_only]
    unknown = [site.fqn for site in trial.sites if site.layer.is_forward_only]
    notes = [f"only checked unmerged, as nothing can be merged into them: {shortened(unknown)}"] * bool(unknown)
    merging = [site for site in known if site not in refused]
    if not merging:
        return [], notes
    try:
        with trial.only(merging, training=False), merged(root, quantized="dequantize"):
            pass
    except MergeError as error:
        return [], [*notes, f"merged weights were not compared: {error}"]
    return merging, notes


def _both_modes(trial: Trial, merging: Sequence[AdaptedSite], *, is_training: bool) -> tuple[list[_Mode], list[str]]:
    """Return what is found in the mode that the model is in and, if its forward runs there, in the other one."""
    seen, notes = [_Mode(trial, merging, training=is_training)], []
    try:
        seen.append(_Mode(trial, merging, training=not is_training))
    except Exception as error:
        notes = [f"not checked in {_name(not is_training)}: {type(error).__name__}: {error}"]
    return seen, notes + [
        f"gradients were not checked in {_name(mode.training)}: {mode.backward_error}"
        for mode in seen
        if mode.backward_error
    ]


class _Mode:
    """What was found in training or in evaluation mode.

    Attributes:
        training: Which of them.
        backward_error: What backward raised, if it did.
        ran: The weights whose update was computed.
        trained: Those that gradients reach.
        moved: The others that have an effect.
        moved_merged: The others that have an effect once merged.
        differing: Those with a different effect once merged, with the difference as a share of the effect.
        unclear: Those whose effects are too small to tell.
    """

    def __init__(self, trial: Trial, merging: Sequence[AdaptedSite], *, training: bool) -> None:
        """Run the model."""
        self.training, self._trial = training, trial
        self._base = trial.run((), training=training)
        if not self._base:
            raise AdapterError("cannot check: the forward returns no floating tensor, such as logits, to compare")
        again = trial.run((), training=training)
        floors, jitter = roundings(self._base), distances(self._base, again)
        self._jitter = {path: 4 * jitter.get(path, 0.0) for path in self._base}
        self._floors = {path: max(floors[path], self._jitter[path]) for path in self._base}
        self.differing: dict[AdaptedSite, float] = {}
        self._shares: dict[AdaptedSite, float] = {}
        self.unclear: set[AdaptedSite] = set()
        self.backward_error, self.trained = "", set[AdaptedSite]()
        try:
            self.trained = trial.gradients(training=training)
        except Exception as error:  # the forward has not raised before
            self.backward_error = f"{type(error).__name__}: {error}"
        self.ran = set(trial.ran)
        rest = [site for site in trial.sites if site not in self.trained]
        mergeable = [site for site in rest if site in set(merging)]
        self.moved = set(blame(rest, self._moves))
        self.moved_merged = set(blame(mergeable, lambda on: self._moves(on, is_merged=True)))
        for group in [*roles(merging), merging]:
            rest = [site for site in group if site not in self.differing]
            self.differing |= {site: self._shares[site] for site in blame(rest, self._differs)}

    def _moves(self, on: Sites, *, is_merged: bool = False) -> bool:
        """Whether updates of some weights change the output."""
        output = self._trial.run(on, training=self.training, is_merged=is_merged)
        return any(far > self._jitter.get(path, 0.0) for path, far in distances(output, self._base).items())

    def _differs(self, on: Sites) -> bool:
        """Whether updates of some weights have a different effect once merged than as adapters."""
        adapted = self._trial.run(on, training=self.training)
        as_merged = self._trial.run(on, training=self.training, is_merged=True)
        effects = distances(adapted, self._base), distances(as_merged, self._base)
        effect = {path: max(each.get(path, 0.0) for each in effects) for path in self._base}
        tolerance = EXACT if self._trial.is_wide(on) else ROUNDED
        far = {path: each for path, each in distances(adapted, as_merged).items() if each > tolerance * effect[path]}
        if not far:
            return False
        ways = [self._trial.run(on, training=self.training, compute=way) for way in ("factored", "materialized")]
        rounding = distances(*ways)
        sure = [path for path in far if far[path] > max(10 * rounding.get(path, 0.0), self._floors[path])]
        if not sure:
            self.unclear |= set(on)
            return False
        self._shares |= dict.fromkeys(on, max(far[path] / effect[path] for path in sure))
        return True


def blame(sites: Sequence[AdaptedSite], has: Callable[[Sites], bool]) -> list[AdaptedSite]:
    """Return the weights that have a property, found by halving sets that have it."""
    if not sites or not has(sites):
        return []
    if len(sites) == 1:
        return list(sites)
    middle = len(sites) // 2
    return [*blame(sites[:middle], has), *blame(sites[middle:], has)] or list(sites)


def _report(
    census: Census,
    sites: Sequence[AdaptedSite],
    seen: Sequence[_Mode],
    refused: Mapping[AdaptedSite, float],
    notes: Sequence[str],
) -> CheckReport:
    """Return what both modes have found together."""
    problems: list[Problem] = []
    unchecked = {
        site.fqn: "only inactive adapters act on it: activate them, and check again"
        for site in census.adapted
        if site not in sites and site.key not in {other.key for other in sites}
    }
    for site in sites:
        found = _problems(site, seen, refused.get(site))
        problems += found
        if not found and not any(site in mode.trained or site in mode.moved for mode in seen):
            unchecked[site.fqn] = "this input does not reach it"
        elif not found and any(site in mode.unclear for mode in seen):
            unchecked[site.fqn] = "its effect is not larger than rounding, so merged and adapted cannot be compared"
    left = {problem.fqn for problem in problems} | unchecked.keys()
    return CheckReport(
        tuple(problems), unchecked, tuple(site.fqn for site in sites if site.fqn not in left), tuple(notes)
    )


def _problems(site: AdaptedSite, seen: Sequence[_Mode], refused: float | None) -> list[Problem]:
    """Return what is wrong with one weight, into which `merge` may refuse to merge."""
    found: list[Problem] = []

    def add(fault: Fault, modes: Sequence[_Mode], difference: float | None = None) -> None:
        found.append(Problem(site.fqn, fault, tuple(_name(mode.training) for mode in modes), difference))

    past = [mode for mode in seen if site in mode.moved_merged - mode.moved]
    if refused is not None and site.layer.is_read:
        add("read past", seen)
        return found
    if past:
        add("read past", past)
    elif not any(site in mode.trained for mode in seen):
        if moved := [mode for mode in seen if site in mode.moved]:
            if not any(mode.backward_error for mode in moved):
                add("no gradient", moved)
        elif ran := [mode for mode in seen if site in mode.ran]:
            add("unused", ran)
    if refused is not None:
        add("merged differs", seen, refused)
    elif not past and (differing := [mode for mode in seen if site in mode.differing]):
        add("merged differs", differing, max(mode.differing[site] for mode in differing))
    return found


def _name(training: bool) -> str:  # noqa: FBT001
    return "training mode" if training else "evaluation mode"


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
        total = len({problem.fqn for problem in self.problems}) + len(self.unchecked) + len(self.checked)
        found = len({problem.fqn for problem in self.problems})
        lines = [f"{found} of {total} adapted weights are not as they should be; {len(self.checked)} are"]
        together: dict[tuple[object, ...], list[Problem]] = {}
        for problem in self.problems:
            together.setdefault((problem.fault, problem.modes), []).append(problem)
        lines += map(_line, together.values())
        reasons: dict[str, list[str]] = {}
        for fqn, reason in self.unchecked.items():
            reasons.setdefault(reason, []).append(fqn)
        lines += [f"not checked: {shortened(fqns)} ({reason})" for reason, fqns in reasons.items()]
        return "\n".join(wrapped([*lines, *self.notes]))


def _line(problems: Sequence[Problem]) -> str:
    """Return a line about problems of one kind, seen in the same modes."""
    first, shares = problems[0], [each.difference for each in problems if each.difference is not None]
    size = f", by up to {max(shares):.0%} of the effect" if shares else ""
    modes = " and ".join(first.modes)
    return f"{shortened([each.fqn for each in problems])}: {WORDS[first.fault]} (in {modes}{size})"

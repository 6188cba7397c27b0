"""What `randlora.check` found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from randlora.report import wrapped
from randlora.targets.match import shortened

Fault = Literal["unused", "read past", "no gradient", "merged differs"]

WORDS: dict[Fault, str] = {
    "unused": "computed, and the output does not depend on it: train with inputs on which it acts, or exclude it",
    "read past": "no effect as an adapter, and one once merged: other code reads the weight instead of calling the "
    "layer. Exclude it",
    "no gradient": "an effect, and no gradient reaches the adapter, so that it would not be trained: exclude it, or "
    "find what stops the gradient, such as a forward under no_grad, or checkpointing with use_reentrant=True",
    "merged differs": "another effect once merged than as an adapter, because the forward changes the weight or does "
    "more than multiply by it: do not merge it, or exclude it",
}


@dataclass(frozen=True)
class Problem:
    """An adapted weight that does not do what an adapter is for.

    Attributes:
        fqn: Its name among the adapter's targets.
        fault: ``"unused"`` if it is computed and nothing depends on it, ``"read past"`` if it has an effect only once
            merged, ``"no gradient"`` if it has an effect and would not be trained, ``"merged differs"`` if it has
            another effect once merged.
        modes: Where that was seen: ``"training mode"``, ``"evaluation mode"``, or both.
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
        problems: The adapted weights that do not do what an adapter is for.
        unchecked: Reasons by FQN why weights could not be checked, such as that this input did not reach them.
        checked: The FQNs of the other ones, which are as they should be.
        notes: What could not be checked of the whole model.
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

"""Which parameters of a model required grad before it was adapted, followed where they get another name or place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

MARK = "randlora_required_grad"
"""The attribute of a parameter that says whether it required grad before a model that contains it was adapted."""

Named = Iterable[tuple[str, nn.Parameter]]
"""Parameters with their FQNs."""


class RequiredGrad:
    """The flags of some parameters.

    Each parameter carries its own flag, because pruning or a parametrization gives it another name. It is also looked
    up by its name, because ``load_state_dict(assign=True)``, sharding or a copy of the model puts another in its place.
    References to the parameters would keep them in memory, and weak ones would keep torch from swapping them.
    """

    def __init__(self, parameters: Named = ()) -> None:
        """Take the flags from parameters; where another adapted model froze one, the flag from before."""
        self._flags = {fqn: bool(vars(parameter).get(MARK, parameter.requires_grad)) for fqn, parameter in parameters}

    def mark(self, parameters: Named) -> None:
        """Let the parameters carry their flags."""
        for fqn, parameter in parameters:
            vars(parameter)[MARK] = self._flags[fqn]

    def take(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, bool]:
        """Return the flags of the parameters of a model, by the FQNs that they have now, and take the marks off."""
        found = {fqn: vars(own).get(MARK, self._flags.get(fqn)) for fqn, own in parameters.items()}
        for parameter in parameters.values():  # a tied one is there more than once
            vars(parameter).pop(MARK, None)
        return {fqn: flag for fqn, flag in found.items() if flag is not None}

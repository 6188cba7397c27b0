"""Which parameters of a model required grad before it was adapted, followed where they get another name or place."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

Record = tuple[str, nn.Parameter | None, bool]
"""The FQN of a parameter, the parameter unless it is gone, and whether it required grad."""


class RequiredGrad:
    """The flags of some parameters, which it does not keep in memory.

    A parameter is looked up by itself first, because pruning or a parametrization gives it another name, and then by
    its name, because ``load_state_dict(assign=True)`` or sharding puts others in its place. Copied or pickled with a
    model, these are the parameters of the copy.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]] = ()) -> None:
        """Record the flags of parameters, given with their FQNs."""
        self.__setstate__([(fqn, parameter, parameter.requires_grad) for fqn, parameter in parameters])

    def by_name(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, bool]:
        """Return the flags of the parameters of a model that were recorded, by the FQNs that they have now."""
        own = {id(parameter): flag for _, parameter, flag in self.__getstate__() if parameter is not None}
        flags = {fqn: flag for fqn, _, flag in self._records}
        found = {fqn: own.get(id(parameter), flags.get(fqn)) for fqn, parameter in parameters}
        return {fqn: flag for fqn, flag in found.items() if flag is not None}

    def __getstate__(self) -> list[Record]:
        """Return the records with the parameters themselves, as weak references cannot be copied or pickled."""
        return [(fqn, None if held is None else held(), flag) for fqn, held, flag in self._records]

    def __setstate__(self, records: list[Record]) -> None:
        """Hold the records of `__getstate__`, of another model maybe."""
        self._records = [
            (fqn, None if parameter is None else weakref.ref(parameter), flag) for fqn, parameter, flag in records
        ]

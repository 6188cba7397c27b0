"""Parameters that a model holds in several places, and files that name them once, twice or apart.

Here a parameter trained beside an adapter stays tied. PEFT gives each module of ``modules_to_save`` a copy of its own,
which is tied to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from randlora.checkpoint.peft_config import whole_modules
from randlora.checkpoint.read import AdapterFile
from randlora.errors import CheckpointError, raise_collected
from randlora.targets.walk import Census


def tied(census: Census, file: AdapterFile) -> AdapterFile:
    """Take each parameter of a model from a file once, under the first of its names there.

    Args:
        census: The model.
        file: An adapter whose parameters the model has.

    Raises:
        CheckpointError: When the file holds several values for one parameter, or, as PEFT wrote it, a value for one of
            a parameter's places and none for another.
    """
    problems, repeated = [], set()
    for names in _names_of_tied(census):
        named = [fqn for fqn in names if fqn in file.trained]
        left = [fqn for fqn in names if fqn not in file.trained]
        if not all(_equal(file.trained[fqn], file.trained[named[0]]) for fqn in named):
            problems.append(f"{' and '.join(named)} are one parameter here, and two in the file: untie them first")
        elif named and left and file.header is None:
            problems.append(
                f"{named[0]} is tied to {' and '.join(left)} here, and PEFT trained it alone: untie them first"
            )
        repeated.update(named[1:])
    raise_collected(CheckpointError, problems, doing="fit the adapter to this model")
    return replace(file, trained={fqn: value for fqn, value in file.trained.items() if fqn not in repeated})


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def untied_by_peft(census: Census, trained: Iterable[str]) -> list[str]:
    """Say which parameters trained beside an adapter PEFT would change in one of their places only."""
    trained = set(trained)
    whole = tuple(f"{module}." for module in whole_modules(census, trained))
    return [
        f"PEFT would untie {' and '.join(names)} and change {' and '.join(trained.intersection(names))} alone"
        for names in _names_of_tied(census)
        if any(fqn.startswith(whole) for fqn in trained.intersection(names))
    ]


def _names_of_tied(census: Census) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for held in census.parameters:
        names.setdefault(id(held.parameter), []).append(held.fqn)
    return [fqns for fqns in names.values() if len(fqns) > 1]

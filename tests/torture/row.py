"""`Row`: the result of one campaign, a row of the table that `make torture` prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one campaign tried and found.

    Attributes:
        campaign: Its name, such as ``"kills"``.
        tried: What one attempt is, such as ``"saves killed at a random time"``.
        count: How many attempts were made.
        failures: One line for each attempt that broke a promise.
        seconds: How long the campaign took.
        notes: Further figures, in one line.
    """

    campaign: str
    tried: str
    count: int
    failures: tuple[str, ...]
    seconds: float
    notes: str = ""


Campaign = Callable[[float], Row]
"""A function of a module, called in a process of its own, which runs a campaign and returns the row.

It takes the scale of the run: 1.0 for the whole campaign, 0.01 for a hundredth of its attempts or seconds, but at least
one attempt. A broken promise is one of the row's failures.
"""

"""Campaigns of minutes against the library, with the figures in docs/trust.md; `make torture` runs them all.

A campaign is called in a new process with a scale, 0.01 for a hundredth of its attempts, and returns a `Row`.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """What one campaign found: what one attempt is, how many were made, and a line for each broken promise."""

    tried: str
    attempts: int
    failures: list[str]
    notes: str = ""


def share(most: float, scale: float) -> int:
    """Return a share of some attempts, at least one."""
    return max(1, round(most * scale))

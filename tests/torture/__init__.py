"""Campaigns of minutes, each in a new process at a scale, with figures in docs/trust.md; `make torture` runs them."""

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

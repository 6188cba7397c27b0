"""The callback by which verbs on files report progress."""

from collections.abc import Callable

Progress = Callable[[int, int, str], object]
"""Called with the amount done, the total, and a description of the current step."""


def no_progress(done: int, total: int, doing: str) -> None:
    """Ignore the progress."""

"""How verbs on files tell how far they are."""

from collections.abc import Callable

Progress = Callable[[int, int, str], object]
"""Called with what is done, with the whole, and with what is being worked on, in words."""


def no_progress(done: int, total: int, doing: str) -> None:
    """Tell nobody."""

"""The forward passes of a model that are running, which a change of values in place waits for.

A hook of the model counts its calls by thread. Compiled code runs no hooks, so a model that is compiled as a whole
counts none; a block of `randlora.routed` counts in any case. Nothing waits while it holds `randlora.state.CHANGING`, or
the other way around: a forward pass may need that itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import nn

from randlora.errors import AdapterError

CALL = nn.Module._call_impl.__code__
"""The code in which a module runs its hooks and its forward."""

PATIENCE = 0.05  # seconds between looks for calls that an interrupt has ended without their hooks


class Forwards:
    """The calls of one model that are running, by thread. A copy of a model runs none."""

    def __init__(self) -> None:
        """Count none."""
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}
        self._blocks: list[int] = []
        self._stopped_by: int | None = None

    def __reduce__(self) -> tuple[type[Forwards], tuple[()]]:
        """Return how a copy is made, with a lock of its own."""
        return Forwards, ()

    def begin(self) -> None:
        """Count a call of the model in this thread, after a change that is being made."""
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(self._may_go(thread))
            self._running[thread] = self._running.get(thread, 0) + 1

    def end(self) -> None:
        """Count the end of a call in this thread."""
        thread = threading.get_ident()
        with self._changed:
            calls = self._running.pop(thread, 0)  # none if the call has failed before it was counted
            if calls > 1:
                self._running[thread] = calls - 1
            self._changed.notify_all()

    def give_way(self) -> None:
        """Wait for a change that is being made, before a block begins: many blocks would leave it no time."""
        with self._changed:
            self._changed.wait_for(self._may_go(threading.get_ident()))

    def set_blocks(self, threads: Iterable[int]) -> None:
        """Set the threads that have begun the blocks in which calls belong together."""
        with self._changed:
            self._blocks = list(threads)
            self._changed.notify_all()

    @contextmanager
    def stopped(self, doing: str) -> Iterator[None]:
        """Run a block while no call of the model is running, except those around it in this thread.

        Raises:
            AdapterError: If this thread is within a call of the model, and another one waits for its end.
        """
        thread = threading.get_ident()
        with self._changed:
            if self._stopped_by not in (None, thread) and (thread in self._running or thread in self._blocks):
                raise AdapterError(
                    f"cannot {doing} within a forward pass, or a block of routed, while another thread waits for its "
                    "end to do the same: call it outside"
                )
            self._changed.wait_for(lambda: self._stopped_by in (None, thread))
            before, self._stopped_by = self._stopped_by, thread
        try:
            with self._changed:
                while not self._changed.wait_for(lambda: not self._others(thread), timeout=PATIENCE):
                    self._forget_ended()
            yield
        finally:
            with self._changed:
                self._stopped_by = before
                self._changed.notify_all()

    def _may_go(self, thread: int) -> Callable[[], bool]:
        """Return whether a thread may begin a call: no change is being made, or that waits for this one too."""
        return lambda: (
            self._stopped_by in (None, thread)
            or thread in self._running
            or any(block != self._stopped_by for block in self._blocks)
        )

    def _others(self, thread: int) -> bool:
        return any(each != thread for each in (*self._running, *self._blocks))

    def _forget_ended(self) -> None:
        """Forget calls that have ended without their hooks, as by an interrupt, after which torch runs none."""
        frames = sys._current_frames()
        for thread in [*self._running]:
            if not _is_in_call(frames.get(thread)):
                del self._running[thread]


def _is_in_call(frame: FrameType | None) -> bool:
    """Whether a thread is in a call of a module."""
    while frame is not None and frame.f_code is not CALL:
        frame = frame.f_back
    return frame is not None

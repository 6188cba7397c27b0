"""Failing at the k-th call of a function or of C code while a model is being changed, as memory or an interrupt may."""

import concurrent.futures
import contextlib
import gc
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import thread
from types import FrameType
from typing import Any

from randlora.model import view

GUARD = view.unchanged_if_raised.__wrapped__.__code__  # type: ignore[attr-defined]  # of the generator itself

SPARED = tuple(
    str(module.__file__) for module in (contextlib, queue, threading, weakref, concurrent.futures._base, thread)
)
"""Files of the standard library in which nothing is raised."""

LOCKS = type(threading.Lock()), type(threading.RLock())
"""What a ``with`` statement calls to take and to release; raising there would leave a lock taken for ever."""


class Fault(BaseException):
    """Raised at the k-th call."""


class Faults:
    """Counts calls while a model is being changed, and raises at the k-th; with ``k=None``, at none.

    Not in `contextlib`, for what is raised there is raised before or after the change, nor where locks are held,
    nor in callbacks of weak references, where Python drops it.
    """

    def __init__(self, k: int | None = None) -> None:
        self.k, self.calls, self.is_open = k, 0, False

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if frame.f_code is GUARD:
            self.is_open = event == "return" and self.calls == 0  # as it yields to the block, until it goes on
            return
        files = [each.f_code.co_filename for each in (frame, frame.f_back) if each is not None]
        if not self.is_open or event not in ("call", "c_call") or any(file.startswith(SPARED) for file in files):
            return
        if isinstance(getattr(arg, "__self__", None), LOCKS):
            return
        self.calls += 1
        if self.calls == self.k:
            raise Fault(f"at call {self.k}, of {frame.f_code.co_qualname}")


def under(faults: Faults, verb: Callable[[], Any]) -> BaseException | None:
    """Call a verb under faults, and return what it raised."""
    gc.disable()  # a collection calls finalizers at any time
    before = sys.getprofile()
    sys.setprofile(faults)
    try:
        verb()
    except BaseException as error:
        return error
    finally:
        sys.setprofile(before)
        gc.enable()
    return None

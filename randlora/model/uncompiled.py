"""Running compiled code uncompiled: `routed` finds its rows in Python, and `randlora.check` watches layers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Open:
    """The blocks that are open, of all models and threads, since torch has one stance for all."""

    lock = threading.Lock()
    count = 0
    stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Have torch run compiled functions uncompiled in the block, if its compiler is in use."""
    with _Open.lock:
        _Open.count += 1
        if _Open.stance is None and "torch._dynamo" in sys.modules:
            _Open.stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _Open.lock:
            _Open.count -= 1
            if not _Open.count and _Open.stance is not None:
                _Open.stance.__exit__(None, None, None)
                _Open.stance = None

"""How torch runs code: its dispatch modes, which see every operator, fake tensors, and code that is not compiled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

# Private, but the only way to ask. Without it everything runs as under a mode, which is correct but slower;
# tests/test_modes.py fails if torch renames it.
count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
"""Return the number of active modes."""


class Observer(TorchDispatchMode):
    """A mode that keeps no results of operators, so that arithmetic in place can continue."""


def may_be_kept() -> bool:
    """Whether an active mode may keep results of operators, so that these must not be overwritten."""
    return count_modes() > 0 and not all(isinstance(mode, Observer) for mode in _get_current_dispatch_mode_stack())


def without_modes() -> AbstractContextManager[object]:
    """Return a context in which no mode is active, for tensors that must be real."""
    return _disable_current_modes()


def fake_obstacle(tensors: Iterable[Tensor]) -> str | None:
    """Return why a model with these tensors cannot be adapted if they, or new ones, are fake; else ``None``."""
    is_active = count_modes() > 0 and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    if is_active or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return "FakeTensorMode makes tensors without values: leave it, and build the model on torch.device('meta')"
    return None


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: it is not on the meta device, and not fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


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

"""How torch runs code: its dispatch modes, which see every operator, fake tensors, and code that is not compiled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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


def fake_mode() -> FakeTensorMode | None:
    """Return the active mode whose tensors are fake, or ``None``."""
    return _active("FAKE") if count_modes() else None


def are_bases_fake() -> bool:
    """Whether bases must be fake. Not for a mode that also accepts real tensors, or one that records a program."""
    mode = fake_mode()
    return mode is not None and not mode.allow_non_fake_inputs and _active("PROXY") is None


def in_mode(tensor: Tensor) -> Tensor:
    """Return a real tensor as the active modes expect it: a fake tensor under a mode with fake tensors."""
    mode = fake_mode()
    return tensor if mode is None else mode.from_tensor(tensor)


def fake_obstacle(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return why tensors made now would not work together with one of some named tensors, or ``None``."""
    mode = fake_mode()
    for name, tensor in tensors:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is not mode:
            return f"{name} is fake: call this, and the model, under the FakeTensorMode that it was made under"
        if mode is not None and not isinstance(tensor, FakeTensor):
            return (
                f"{name} has values, but tensors made under FakeTensorMode have none: leave this mode, or build the "
                "model under it"
            )
    return None


def _active(key: str) -> Any:
    return torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, key))


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

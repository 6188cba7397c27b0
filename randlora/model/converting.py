"""Converting a model, as `nn.Module.to` does: what its adapters hold aside is converted as what the model has.

Its dtype then depends on no switch of adapters in between, nor does a value that was rounded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from randlora.errors import AdapterError
from randlora.state import ModelState, attached_state

METHOD = "_apply"
"""The method of torch through which all conversions go, and those of every module around the model."""


class Converter:
    """Replaces the method of a model while its adapters train copies of parameters.

    It does not keep the model alive. A copy of the model gets its own, except for a shallow one, which shares this one.
    """

    def __init__(self, model: nn.Module | None) -> None:
        """Replace the method of a model, ``None`` for one that is not known."""
        self.model: Callable[[], nn.Module | None] = weakref.ref(model) if model is not None else lambda: None

    def __call__(self, convert: Any, *args: Any, **kwargs: Any) -> Any:
        """Convert the model, then what is held aside."""
        model = self.model()
        if model is None:
            raise AdapterError(
                "cannot convert a shallow copy of an adapted model that is gone, or what was copied or pickled from a "
                "shallow copy: convert the model, or make its copy with copy.deepcopy"
            )
        result = getattr(type(model), METHOD)(model, convert, *args, **kwargs)
        if (state := attached_state(model)) is not None:
            state.convert_aside(convert)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the model."""
        return Converter, (self.model(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Converter:
        """Return one for the model's copy, which is not known if a shallow copy of the model is copied."""
        return Converter(memo.get(id(self.model())))


def watch_conversions(model: nn.Module, state: ModelState | None) -> None:
    """Have a model convert what is held aside if its adapters train copies of parameters, and else nothing more."""
    if state is not None and state.replaced:
        vars(model).setdefault(METHOD, Converter(model))
    elif isinstance(vars(model).get(METHOD), Converter):
        del vars(model)[METHOD]

"""`Reference`: a model without the adapters that are trained, which shares all of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

import randlora


class Reference(nn.Module):
    """A model as it is without some of its adapters, for a loss that compares with it.

    It has no parameters of its own, and calls the model, so what the model becomes it becomes too.

    Attributes:
        policy: The model.
        trained: The adapters that are left out; the others that are active remain active.
    """

    policy: nn.Module
    trained: tuple[str, ...]

    def __init__(self, model: nn.Module, trained: Sequence[str]) -> None:
        """Take a model and the names of the adapters to leave out."""
        super().__init__()
        vars(self).update(policy=model, trained=tuple(trained))  # not as a submodule
        for name in ("config", "base_model_prefix"):  # which a trainer reads of a model that it prepares
            if hasattr(model, name):
                vars(self)[name] = getattr(model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model without the adapters; a forward that a trainer has put here is not run."""
        with self._without_adapters():
            return self.policy(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model without the adapters."""
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the weights that it computes with, by which a trainer recognizes what it computed before."""
        with self._without_adapters():
            held: dict[str, Tensor] = self.policy.state_dict(*args, **kwargs)
        left_out = {name for name in held if ".randlora_" in name and name.rpartition(".")[2] in self.trained}
        return {name: value for name, value in held.items() if name not in left_out}

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        weights = {info.name: info.weight for info in randlora.adapters(self.policy) if info.weight is not None}
        others = {name: weight for name, weight in weights.items() if name not in self.trained}
        if not others:
            with randlora.disabled(self.policy):
                yield
            return
        randlora.activate(self.policy, others)
        try:
            yield
        finally:
            randlora.activate(self.policy, weights)

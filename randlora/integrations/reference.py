"""`Reference`: a model without its trained adapters, which shares all of its weights; and how TRL uses it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

import randlora
from randlora.errors import AdapterError, warn
from randlora.targets.walk import Census

WITH_BETA = frozenset({"GRPOTrainer", "RLOOTrainer"})
"""TRL's trainers that take no ``ref_model`` and load one unless ``beta`` is 0."""


class Reference(nn.Module):
    """A model without some of its adapters, for a loss that compares with it.

    It has no parameters and calls the model, so every change of the model is a change of the reference too.

    Attributes:
        trained: The adapters that are left out. Other active adapters remain active.
    """

    trained: tuple[str, ...]

    def __init__(self, policy: Callable[[], nn.Module], trained: Sequence[str]) -> None:
        """Take what returns the model, which a trainer may wrap later, and the names of the adapters to leave out."""
        super().__init__()
        vars(self).update(_policy=policy, trained=tuple(trained))  # not as a submodule
        for name in ("config", "base_model_prefix"):  # which a trainer reads of a model that it prepares
            if hasattr(self.policy, name):
                vars(self)[name] = getattr(self.policy, name)

    @property
    def policy(self) -> nn.Module:
        """The model, with the wrappers that a trainer has put around it."""
        return vars(self)["_policy"]()  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model without the adapters, ignoring a forward that a trainer has set here."""
        with self._without_adapters():
            return self.policy(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model without the adapters."""
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the weights that it computes with. From these, a trainer recognizes results computed before."""
        with self._without_adapters():
            held: dict[str, Tensor] = self.policy.state_dict(*args, **kwargs)
        left_out = {name for name in held if ".randlora_" in name and name.rpartition(".")[2] in self.trained}
        return {name: value for name, value in held.items() if name not in left_out}

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        policy = self.policy
        weights = {info.name: info.weight for info in randlora.adapters(policy) if info.weight is not None}
        others = {name: weight for name, weight in weights.items() if name not in self.trained}
        if not others:
            with randlora.disabled(policy):
                yield
            return
        randlora.activate(policy, others)
        try:
            yield
        finally:
            randlora.activate(policy, weights)


@contextmanager
def referring(trainer: Any, given: inspect.BoundArguments, reference: Reference) -> Iterator[None]:
    """Within the block, have a new trainer of TRL use the reference instead of a model that it would load."""
    arguments: Any = given.arguments.get("args")
    takes_one = "ref_model" in given.signature.parameters and given.arguments.get("ref_model") is None
    beta = getattr(arguments, "beta", 0.0) if _has_beta(type(trainer)) else 0.0
    if not takes_one and not beta:
        yield
        return
    if getattr(arguments, "sync_ref_model", False):
        raise AdapterError(
            "sync_ref_model=True copies trained values into the reference, but here the reference is the same model "
            "without its adapters: leave it out, or give a ref_model"
        )
    if is_deepspeed_zero3_enabled() and any(each.train_also for each in randlora.adapters(reference.policy)):
        warn(
            "the reference is a second model that TRL loads, because an engine of ZeRO-3 cannot replace what "
            "train_also trains by the model's own values. Leave train_also out, or use ZeRO-2"
        )
        yield
        return
    _warn_if_trained(reference)
    if takes_one:
        given.arguments["ref_model"] = reference
    else:
        arguments.beta = 0.0  # or it loads one
    if getattr(arguments, "deepspeed_plugin", None) is not None:  # its engines ask a parameter for the dtype
        reference.register_parameter("placeholder", nn.Parameter(torch.zeros(1), requires_grad=False))
    try:
        yield
    finally:
        reference._parameters.pop("placeholder", None)
        if beta:
            arguments.beta = beta
    if beta:
        trainer.beta = beta
    if beta or trainer.ref_model is not None:  # without the engine that TRL has put around it
        trainer.ref_model = reference


def _has_beta(trainer: type) -> bool:
    return any(base.__name__ in WITH_BETA and base.__module__.startswith("trl.") for base in trainer.__mro__)


def _warn_if_trained(reference: Reference) -> None:
    """Warn if what is left out was trained before, which a reference should usually have."""
    trained = reference.trained
    if any(
        all(part.any() for part in site.layer.diagonals_of(site.owner, name))
        for site in Census.of(reference.policy).adapted
        for name in site.layer.adapters
        if name in trained
    ):
        warn(
            f"the reference is the model without {', '.join(trained)}, which was trained before: if the reference "
            "should be the model as it is now, merge the adapter first and inject a new one, or give a ref_model"
        )

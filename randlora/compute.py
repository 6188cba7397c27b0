"""`set_compute`: how a model's layers do their arithmetic."""

from typing import get_args

from torch import nn

from randlora.errors import ConfigError
from randlora.functional import Compute
from randlora.state import adapted_root


def set_compute(model: nn.Module, compute: Compute = "auto", *, keep: bool = False) -> None:
    """Choose how the layers of a model compute. It changes speed, memory and the last bits of results, nothing else.

    Args:
        model: A model that carries adapters.
        compute: ``"factored"`` multiplies the tokens through both factors of the update, ``"materialized"`` forms the
            update first, ``"auto"`` takes for each stage of each call what its sizes make cheaper (see
            `randlora.functional.cost`) and factors in a program that ``torch.export`` makes for any sizes.
        keep: Where forward is materialized, keep the sum of weight and update until backward: a number for each of the
            weight in memory, for one product less.

    Raises:
        AdapterError: When the model carries no adapters.
        ConfigError: For another word.

    Example:
        >>> import torch, randlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = randlora.inject(model, r=8, targets="all-linear")
        >>> randlora.set_compute(model, "materialized", keep=True)
    """
    if compute not in get_args(Compute):
        raise ConfigError(f"compute must be one of {', '.join(get_args(Compute))}, got {compute!r}")
    _, state = adapted_root(model)
    state.compute, state.keep = compute, keep

"""Adapters sent to processes with the same base model, such as those that draw samples: Λ and Γ instead of weights.

What is sent is what `randlora.save` writes. Both ends draw the same bases from the seed in it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from randlora.checkpoint.contents import AdapterState, adapter_state
from randlora.checkpoint.load import swapped
from randlora.errors import CheckpointError, raise_collected
from randlora.model.merge import merge, unmerge
from randlora.model.view import collective, together
from randlora.state import adapted_root

NOT_SENDING = "it does not call send_adapter: give its rank in the group as sender="
OUTSIDE = "this process is not in the group: give one that has all receivers as group="


def send_adapter(model: nn.Module, name: str | None = None, *, group: Any = None, sender: int = 0) -> None:
    """Send an adapter to the processes of a group that call `receive_adapter`; a collective of the group.

    If the model is sharded, such as by `fully_shard`, all of its processes call this, in the group or not.

    Args:
        model: A model with adapters.
        name: The adapter's name; ``None`` means the only one.
        group: A group of torch.distributed with the sender and all receivers; ``None`` means the default group.
        sender: The rank in the group of the process that sends. Others that call this take part in the collective.

    Raises:
        AdapterError: If the model has no adapter, or several and no ``name`` is given.
        CheckpointError: If the adapter could not be saved, or processes could not take it; their ranks are named.
    """
    failed: Exception | None = None
    sent: object = None
    problems = list[str]()
    try:
        state = adapter_state(model, name)
        if dist.get_rank(group) == sender:
            sent = state.metadata, state.config, save(state.tensors)
    except Exception as error:  # which the receivers wait for
        failed, sent = error, str(error)
    try:
        if dist.get_rank(group) >= 0:  # a member of the group
            _broadcast(sent, group, sender)
            problems = _gathered_problems(None, group)
    except Exception as error:  # which the processes outside of the group wait for
        failed = failed or error
    with together(model, writes=False):
        if failed is not None:
            raise failed
        raise_collected(CheckpointError, problems, doing="send the adapter")


def receive_adapter(model: nn.Module, name: str | None = None, *, group: Any = None, sender: int = 0) -> None:
    """Replace the values of an adapter with those that `send_adapter` sends, in place; a collective of the group.

    The adapter must have the same layers, r, alpha and bases as the one sent, as for `randlora.swap`. Adapters that are
    merged reversibly are merged again, into the original weights, so nothing accumulates over the rounds. If this
    raises, or the sender is gone, the model is as it was. No other thread may run it meanwhile.

    Args:
        model: A model with adapters, on the same base.
        name: The adapter's name in the model; ``None`` means the only one.
        group: As for `send_adapter`.
        sender: As for `send_adapter`.

    Raises:
        AdapterError: If the model has no such adapter.
        CheckpointError: If the sender has failed, or what came is damaged or differs in more than values. The sender
            raises an error too. Other receivers keep what they have got.
        MergeError: If the adapters were merged and cannot be merged with these values.
    """
    sent = _broadcast(NOT_SENDING, group, sender) if dist.get_rank(group) >= 0 else OUTSIDE
    try:
        _take(model, name, sent)
    except Exception as error:  # of which the sender is told
        _gathered_problems(str(error), group)
        raise
    _gathered_problems(None, group)


def _broadcast(sent: Any, group: Any, sender: int) -> Any:
    """Return what the sender gives; a collective. torch sends its size and then its bytes."""
    held = [sent]
    members: Any = dist.group.WORLD if group is None else group
    dist.broadcast_object_list(held, dist.get_global_rank(members, sender), group)
    return held[0]


def _gathered_problems(problem: str | None, group: Any) -> list[str]:
    """Return the problems of all processes of a group; a collective."""
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group)
    return [f"rank {rank} of the group: {problem}" for rank, problem in enumerate(problems) if problem is not None]


@collective(writes=True)
@torch.inference_mode(mode=False)
def _take(model: nn.Module, name: str | None, sent: Any) -> None:
    """Write what was sent into an adapter, and merge again what was merged."""
    if not isinstance(sent, tuple):
        raise CheckpointError(f"cannot receive an adapter: the sender has sent none: {sent}")
    metadata, config, tensors = sent
    try:
        state = AdapterState(load(tensors), metadata, config)
    except SafetensorError as error:
        raise CheckpointError(f"cannot receive an adapter: it was damaged ({error}): send it again") from error
    _, own = adapted_root(model)
    merged, options = [*own.merged], own.merge_options

    def merge_again() -> None:
        if merged:
            quantized, dtype = options
            merge(model, adapters=merged, reversible=True, quantized=quantized, dtype=dtype)

    if merged:
        unmerge(model)
    try:
        with swapped(model, {name: state}):
            merge_again()
    except BaseException:
        merge_again()
        raise

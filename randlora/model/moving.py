"""Buffers that move while a model is trained, such as running statistics, and that no adapter has a copy of.

They are changed in the base, and no file has them: what was trained with them computes otherwise in another copy of the
base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from randlora.modes import has_values
from randlora.state import Adapter, ModelState
from randlora.targets.match import shortened
from randlora.targets.walk import Census

MOST_NUMBERS = 65_536
"""The size of the largest buffer whose moves are noticed. Statistics are small; masks and tables may be large."""

REMEDY = "keep these modules in eval() while training, or name them in train_also, with which they are saved"


def moving_note(census: Census, owned: Collection[str]) -> list[str]:
    """Return a note on modules with buffers that training would move, none of which an adapter has a copy of."""
    has = {held.fqn.rpartition(".")[0] for held in census.buffers if held.fqn in owned}
    moving = [visit.fqn for visit in census.visits if _moves(visit.module) and visit.fqn not in has]
    found = list(dict.fromkeys(fqn.partition(".parametrizations.")[0] for fqn in moving))
    if not found:
        return []
    have = "has" if len(found) == 1 else "have"
    what = "running statistics, which move in train mode and are not part of the adapter"
    return [f"{shortened(found)} {have} {what}: {REMEDY}"]


def _moves(module: nn.Module) -> bool:
    """Whether a module of torch changes buffers of its own in train mode."""
    if isinstance(module, _NormBase):
        return module.track_running_stats and module.running_mean is not None
    return isinstance(module, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
    )


@torch.inference_mode(mode=False)
def remembered(census: Census) -> dict[str, Tensor]:
    """Return copies of a model's small buffers on the CPU, to see later whether they have moved."""
    return {held.fqn: held.tensor.detach().to("cpu", copy=True) for held in census.buffers if _is_small(held.tensor)}


def moved_note(census: Census, state: ModelState, adapters: Iterable[Adapter], where: str) -> list[str]:
    """Return a note on buffers of the model that have moved since it was adapted, and that no adapter has a copy of.

    Args:
        census: The model.
        state: Its state.
        adapters: The adapters that are saved or merged.
        where: What becomes of the buffers.
    """
    owned = {fqn for adapter in adapters for fqn in adapter.buffers}
    own = {held.fqn: held.tensor for held in census.buffers if held.fqn not in owned}
    own |= {fqn: entry.original for fqn, entry in state.replaced.items() if fqn in own}
    moved = [fqn for fqn, now in own.items() if _is_small(now) and _differs(now, state.buffers_before.get(fqn))]
    if not moved:
        return []
    return [f"{shortened(moved)} moved since the model was adapted: {where}; next time {REMEDY}"]


def _is_small(buffer: Tensor) -> bool:
    return type(buffer) is Tensor and not is_lazy(buffer) and has_values(buffer) and buffer.numel() <= MOST_NUMBERS


def _differs(now: Tensor, before: Tensor | None) -> bool:
    if before is None:
        return False
    held, value = before.to(now.dtype), now.detach().cpu()
    return held.shape != value.shape or not bool(((held == value) | (held.isnan() & value.isnan())).all())

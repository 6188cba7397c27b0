"""`AdapterCallback`: a callback for Lightning, for checkpoints with the trained parameters and not the model.

Both packages of Lightning, ``pytorch_lightning`` and ``lightning``, can use it.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import randlora
from randlora.bases.spec import BasisSpec
from randlora.errors import AdapterError, CheckpointError, raise_collected, warn
from randlora.integrations.optimizers import check_optimizers
from randlora.places import is_whole

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
ENTRY = "randlora"
"""The entry of a checkpoint with the facts that a resumed run must match, and the states of generators."""


_INSTALLED = [name for name in PACKAGES if name.partition(".")[0] in sys.modules or find_spec(name.partition(".")[0])]
if not _INSTALLED:
    raise ImportError("Lightning is not installed: pip install lightning, or pytorch-lightning")
# of each of them, because a trainer knows only the class of its package
_Callback: Any = type("_Callback", tuple(import_module(name).Callback for name in _INSTALLED), {})


class AdapterCallback(_Callback):  # type: ignore[misc]
    """Make a trainer's checkpoints contain the trained parameters, and not the base model.

    A checkpoint contains Λ, Γ, the parameters of ``train_also`` and any others that require grad; buffers that training
    has changed, such as the statistics of norms; Lightning's own state; and the state of the random number generators
    of each process. A run that resumes from the end of an epoch gives the same bits as an uninterrupted run. The
    adapters of the model must be the same as in the checkpoint: the same layers, r, alpha and bases.

    A checkpoint does not contain the base model. Create it as when training began, and inject the adapters with the
    same options, in the module's constructor or in ``configure_model``. For files of the adapter alone, call
    `randlora.save`.

    Examples:
        >>> from randlora.integrations.lightning import AdapterCallback
        >>> options = {"callbacks": [AdapterCallback()]}  # of a Trainer
    """

    _buffers: Mapping[str, str] = MappingProxyType({})  # digests of the buffers as a run begins

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002  # Lightning's hook
        """Prepare a run before a checkpoint is loaded."""
        if any(getattr(each, "save_weights_only", False) for each in trainer.checkpoint_callbacks):
            raise CheckpointError(
                "save_weights_only=True writes the whole model, because Lightning then skips callbacks: leave it out, "
                "and call randlora.save for files of the adapter alone"
            )
        self._buffers = {name: _digest(buffer) for name, buffer in pl_module.named_buffers()}
        pl_module.strict_loading = False  # the base is not in the checkpoint
        # as Lightning's hook of a callback comes after the module was changed
        own = type(pl_module).on_load_checkpoint.__get__(pl_module)
        pl_module.on_load_checkpoint = functools.partial(_check_and_load, own, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002  # Lightning's hook
        """Restore the module's hook."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002  # Lightning's hook
        """Check that there is an adapter."""
        if not randlora.adapters(pl_module):
            kind = type(pl_module).__name__
            raise AdapterError(f"{kind} has no adapter: call randlora.inject before trainer.fit, or in configure_model")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers, which Lightning has made now."""
        check_optimizers(pl_module, trainer.optimizers)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Leave everything that is not trained out of a checkpoint. Called in every process."""
        values, trained = checkpoint["state_dict"], _trained(pl_module)
        if values:  # other processes than the first may have none
            missing = [f"{name} is not in it" for name in sorted(trained - values.keys())]
            raise_collected(CheckpointError, missing, doing="write a checkpoint")
            if sharded := [name for name in trained if not is_whole(values[name])]:
                raise CheckpointError(
                    f"{sharded[0]} is sharded, and Lightning cannot load a part of a sharded checkpoint: give the "
                    "strategy save_distributed_checkpoint=False"
                )
            changed = {name for name, own in pl_module.named_buffers() if self._buffers.get(name) != _digest(own)}
            checkpoint["state_dict"] = {name: values[name] for name in values if name in trained or name in changed}
        states = [_generators()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            dist.all_gather_object(states, _generators())
        checkpoint[ENTRY] = {"adapters": _described(pl_module), "trained": sorted(trained), "generators": states}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Set the generators as they were when the checkpoint was written, before an epoch draws its order of data."""
        _check(pl_module, checkpoint)  # a strategy may have loaded the module without its hook
        states = checkpoint[ENTRY]["generators"]
        if len(states) == trainer.world_size:
            _set_generators(states[trainer.global_rank])
        else:
            warn(
                f"the checkpoint is from {len(states)} processes and this run has {trainer.world_size}: random "
                "numbers will differ from those of an uninterrupted run"
            )


def _check_and_load(load: Any, module: Any, checkpoint: dict[str, Any]) -> None:
    _check(module, checkpoint)
    load(checkpoint)


def _check(module: Any, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is of the adapters that a module has; else raise `CheckpointError`."""
    written = checkpoint.get(ENTRY)
    if not isinstance(written, dict):
        raise CheckpointError("the checkpoint was written without AdapterCallback: load it without this callback")
    problems, here = [], {entry["name"]: entry for entry in _described(module)}
    for entry in written["adapters"]:
        own = here.get(entry["name"])
        differing = ["name"] if own is None else [field for field in entry if entry[field] != own[field]]
        if differing:
            bases = " and ".join(str(BasisSpec.from_dict(spec)) for spec in entry["bases"])  # no option names a stream
            problems.append(
                f"its adapter {entry['name']!r} differs from the model's in {' and '.join(differing)}: inject with the "
                f"options that it was trained with{f', on {bases}' if 'bases' in differing else ''}"
            )
    if not problems and (other := _trained(module) ^ set(written["trained"])):
        problems.append(f"{sorted(other)[0]} is trained in only one of the two: make the same parameters require grad")
    raise_collected(CheckpointError, problems, doing="load the checkpoint")


def _described(module: nn.Module) -> list[dict[str, Any]]:
    """Return what Λ and Γ mean nothing without: each adapter's layers, r, alpha and bases."""
    return [
        {
            "name": each.name,
            "layers": {fqn: [options.r, options.alpha] for fqn, options in each.options.items()},
            "bases": [spec.to_dict() for spec in each.specs],
            "train_also": [*each.train_also, *(f"rows {own} of {fqn}" for fqn, own in each.train_rows.items())],
        }
        for each in randlora.adapters(module)
    ]


def _trained(module: nn.Module) -> set[str]:
    return {name for name, held in module.named_parameters(remove_duplicate=False) if held.requires_grad}


def _digest(buffer: Tensor) -> str:
    if buffer.is_meta:
        return ""
    raw = buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16).hexdigest()


def _generators() -> dict[str, Any]:
    """Return the states of this process's generators, in types that ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # what code that uses it draws from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # type: ignore[union-attr]
    }


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002

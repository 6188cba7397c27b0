"""`merge`, `merged` and `unmerge`: fold the active adapters into the weights, for good or for a while.

A merged weight is computed in float32 or wider and rounded once. The weight it replaces is kept, not computed back, so
unmerging restores every bit in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from randlora.errors import MergeError, raise_collected
from randlora.install import adapter_layers, detach
from randlora.layers.base import AdapterLayer
from randlora.report import MergeReport
from randlora.state import ModelState, adapted_root


@torch.inference_mode(mode=False)  # the weights outlive the mode the caller is in
def merge(model: nn.Module, *, keep: bool = False) -> MergeReport:
    """Fold the active adapters into the weights, in place.

    Until the last layer is done, both its weight before and after are held.

    Args:
        model: A model that carries adapters.
        keep: Keep the adapters and the weights as they were, for `unmerge`. Else plain layers are back, the adapters
            are gone, and parameters require grad as they did before the first adapter came.

    Returns:
        Which adapters went into which layers.

    Raises:
        AdapterError: When the model carries no adapter.
        MergeError: When nothing is active, the adapters are switched off or merged already, an inactive adapter would
            be lost, a weight has no values here, or a merged weight would not be finite. The model is then as it was.
    """
    root, state = adapted_root(model)
    layers = [(fqn, layer) for fqn, layer in adapter_layers(root) if state.active.keys() & layer.adapters.keys()]
    raise_collected(MergeError, [*_state_problems(state, keep=keep), *_weight_problems(layers)], doing="merge")
    report = MergeReport(dict(state.active), tuple(fqn for fqn, _ in layers), kept=keep)
    _fold_all(layers, state.active)
    state.is_merged = True
    for basis in state.bank:
        basis.release()  # a merged model computes without them
    if not keep:
        for _, layer in layers:
            layer.unmerged_weight = None
        detach(root, state)
    return report


def unmerge(model: nn.Module) -> tuple[str, ...]:
    """Put back, bit for bit, the weights that ``merge(model, keep=True)`` replaced.

    Args:
        model: A model whose adapters are merged.

    Returns:
        FQNs of the layers restored.

    Raises:
        AdapterError: When the model carries no adapter.
        MergeError: When its adapters are not merged.
    """
    root, state = adapted_root(model)
    if not state.is_merged:
        raise MergeError(
            "cannot unmerge: the adapters are not merged; randlora.merge(model, keep=True) merges reversibly"
        )
    restored = [fqn for fqn, layer in adapter_layers(root) if layer.unmerged_weight is not None]
    for _, layer in adapter_layers(root):
        layer.unfold()
    state.is_merged = False
    return tuple(restored)


@contextmanager
def merged(model: nn.Module) -> Iterator[MergeReport | None]:
    """Merge the active adapters inside a ``with`` block, for inference at the base model's speed.

    Nests: an inner block finds the adapters merged, yields ``None``, and leaves them so.

    Raises:
        MergeError: As `merge` does.
    """
    _, state = adapted_root(model)
    if state.is_merged:
        yield None
        return
    report = merge(model, keep=True)
    try:
        yield report
    finally:
        if state.is_merged:
            unmerge(model)


def require_finite(fqn: str, weight: Tensor) -> Tensor:
    """Return a merged weight, or refuse it.

    Raises:
        MergeError: When a value of it is not finite.
    """
    if not torch.isfinite(weight).all():
        raise MergeError(
            f"the merged weight of {fqn} would not be finite in {weight.dtype}: look for NaN or infinite values in the "
            "adapter, lower its weight, or merge in a wider dtype"
        )
    return weight


def _state_problems(state: ModelState, *, keep: bool) -> list[str]:
    if state.is_merged:
        return ["the adapters are merged already: call randlora.unmerge(model) first"]
    problems = []
    if state.is_disabled:
        problems.append("the adapters are switched off: merge outside of randlora.disabled(model)")
    if not state.active:
        problems.append(f"no adapter is active: activate one of {', '.join(state.adapters)}")
    inactive = [name for name in state.adapters if name not in state.active]
    if inactive and not keep:
        problems.append(
            f"{', '.join(inactive)} would be lost: save and remove what is not active, or merge with keep=True"
        )
    return problems


def _weight_problems(layers: list[tuple[str, AdapterLayer]]) -> list[str]:
    problems = []
    for fqn, layer in layers:
        weight = layer.base_layer._parameters.get("weight")
        if weight is None:
            problems.append(f"{fqn} computes its weight from other parameters: remove the parametrisation first")
        elif weight.is_meta or weight.numel() == 0 or type(weight.data) is not Tensor:
            problems.append(f"the weight of {fqn} is not all here (meta, offloaded or sharded): gather it first")
    return problems


def _fold_all(layers: list[tuple[str, AdapterLayer]], weights: dict[str, float]) -> None:
    """Fold into every layer, or into none."""
    try:
        for fqn, layer in layers:
            layer.fold(require_finite(fqn, layer.merged_weight(weights)))
    except BaseException:
        for _, layer in layers:
            layer.unfold()
        raise

"""`merge`, `merged` and `unmerge`: fold the active adapters into the weights, for good or for a while.

A merged weight is computed in float32 or wider and rounded once. The weight it replaces is kept, not computed back, so
unmerging restores every bit in every dtype. A quantized weight is written out, added to, and rounded to codes again, or
left written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from randlora.errors import ConfigError, MergeError, raise_collected
from randlora.layers.base import AdapterLayer
from randlora.layers.folding import Into, Quantized, RoundingLoss
from randlora.layers.quantized import QuantizedLayer
from randlora.layers.registry import find_layer
from randlora.model.install import adapter_layers, detach
from randlora.report import MergeReport
from randlora.state import ModelState, adapted_root
from randlora.targets.walk import is_norm, is_quantized, named_parameters


@torch.inference_mode(mode=False)  # the weights outlive the mode the caller is in
def merge(
    model: nn.Module, *, keep: bool = False, quantized: Quantized = "requantize", dtype: torch.dtype | None = None
) -> MergeReport:
    """Fold the active adapters into the weights, in place.

    Until the last layer is done, both its weight before and after are held.

    Args:
        model: A model that carries adapters.
        keep: Keep the adapters and the weights as they were, for `unmerge`. Else plain layers are back, the adapters
            are gone, and parameters require grad as they did before the first adapter came.
        quantized: What becomes of bitsandbytes layers. ``"requantize"`` leaves layers of the same kind, whose codes are
            the nearest to the merged weights: as small as before, but some of what was learned is rounded away; the
            report says how much. ``"dequantize"`` leaves an `nn.Linear` in each one's place: nothing is lost, and it
            takes 2 to 8 times the memory.
        dtype: Of the layers that ``"dequantize"`` leaves. ``None`` means that of each layer's last input outside of
            autocast, which a plain layer does not cast. If there was none it means that of the model's norms, else of
            its first parameter outside of quantized layers, else the one that the layer computes in.

    Returns:
        Which adapters went into which layers, and the errors of rounding to codes.

    Raises:
        AdapterError: When the model carries no adapter.
        ConfigError: For another word, or a dtype that is not floating or that nothing would have.
        MergeError: When nothing is active, the adapters are switched off or merged already, an inactive adapter would
            be lost, a weight has no values here, another layer was put into an adapted one, a merged weight would not
            be finite, or a quantized layer has hooks or a forward that an `nn.Linear` in its place would lose. The
            model is then as it was.
    """
    root, state = adapted_root(model)
    layers = [(fqn, layer) for fqn, layer in adapter_layers(root) if state.active.keys() & layer.adapters.keys()]
    into = Into(quantized, dtype, _model_dtype(root) if quantized == "dequantize" else None)
    raise_collected(ConfigError, _option_problems(into), doing="merge")
    problems = [*_state_problems(state, keep=keep), *_weight_problems(layers, into)]
    raise_collected(MergeError, problems, doing="merge")
    errors = _fold_all(layers, state.active, into)
    notes = () if keep else _notes(root, layers, into)
    report = MergeReport(dict(state.active), tuple(fqn for fqn, _ in layers), kept=keep, errors=errors, notes=notes)
    state.is_merged = True
    for basis in state.bank:
        basis.release()  # a merged model computes without them
    if not keep:
        for _, layer in layers:
            layer.unmerged = None
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
    restored = [fqn for fqn, layer in adapter_layers(root) if layer.unmerged is not None]
    for _, layer in adapter_layers(root):
        layer.unfold()
    state.is_merged = False
    return tuple(restored)


@contextmanager
def merged(
    model: nn.Module, *, quantized: Quantized = "requantize", dtype: torch.dtype | None = None
) -> Iterator[MergeReport | None]:
    """Merge the active adapters inside a ``with`` block, for inference at the base model's speed.

    Nests: an inner block finds the adapters merged, yields ``None``, and leaves them so.

    Args:
        model: A model that carries adapters.
        quantized: As in `merge`.
        dtype: As in `merge`.

    Raises:
        AdapterError: As `merge` does.
        ConfigError: As `merge` does.
        MergeError: As `merge` does.
    """
    _, state = adapted_root(model)
    if state.is_merged:
        yield None
        return
    report = merge(model, keep=True, quantized=quantized, dtype=dtype)
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
            "adapter and in the base weight, lower the adapter's weight, or merge in a wider dtype"
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


def _option_problems(into: Into) -> list[str]:
    problems = []
    if into.quantized not in get_args(Quantized):
        problems.append(f"quantized must be one of {', '.join(get_args(Quantized))}, got {into.quantized!r}")
    if into.dtype is not None and not (isinstance(into.dtype, torch.dtype) and into.dtype.is_floating_point):
        problems.append(f"dtype must be a floating dtype or None, got {into.dtype!r}")
    if into.dtype is not None and into.quantized == "requantize":
        problems.append("dtype= is that of plain layers, and codes have none: give quantized='dequantize' too")
    return problems


def _weight_problems(layers: list[tuple[str, AdapterLayer]], into: Into) -> list[str]:
    problems = []
    for fqn, layer in layers:
        weight = layer.base_layer._parameters.get("weight")
        if weight is None:
            problems.append(f"{fqn} computes its weight from other parameters: remove the parametrization first")
        elif weight.is_meta or weight.numel() == 0 or type(weight.data) is not Tensor:
            problems.append(f"the weight of {fqn} is not all here (meta, offloaded or sharded): gather it first")
        elif find_layer(layer.base_layer) is not type(layer):
            kind = type(layer.base_layer).__name__
            problems.append(
                f"{fqn} holds a {kind} that was put in after the adapter, which {type(layer).__name__} cannot merge "
                "into: save the adapter, eject it, and load it again"
            )
        elif (reason := layer.merge_obstacle(into)) is not None:
            problems.append(f"{fqn} {reason}")
    return problems


def _notes(root: nn.Module, layers: list[tuple[str, AdapterLayer]], into: Into) -> tuple[str, ...]:
    is_plain_now = into.quantized == "dequantize" and any(isinstance(layer, QuantizedLayer) for _, layer in layers)
    if not is_plain_now or getattr(getattr(root, "config", None), "quantization_config", None) is None:
        return ()
    note = (
        "the model's config still says that it is quantized, so what save_pretrained writes would not load: to save, "
        "merge the files with randlora.merge_files, or, but for Conv1D layers (GPT-2), call model.dequantize() before "
        "the adapter is loaded, then merge"
    )
    return (note,)


def _model_dtype(root: nn.Module) -> torch.dtype | None:
    """Say which dtype linear layers are given, as a rule: that of norms, else of what the model has beside codes."""
    own = [
        (module, parameter.dtype)
        for _, module, _, parameter in named_parameters(root)
        if parameter.is_floating_point() and not is_quantized(module)
    ]
    norms = [dtype for module, dtype in own if is_norm(module)]
    return next(iter(norms or [dtype for _, dtype in own]), None)


def _fold_all(layers: list[tuple[str, AdapterLayer]], weights: dict[str, float], into: Into) -> dict[str, RoundingLoss]:
    """Fold into every layer, or into none."""
    errors = {}
    try:
        for fqn, layer in layers:
            merged = layer.merged(weights, into)
            require_finite(fqn, merged.weight)
            layer.fold(merged)
            if merged.error is not None:
                errors[fqn] = merged.error
    except BaseException:
        for _, layer in layers:
            layer.unfold()
        raise
    return errors

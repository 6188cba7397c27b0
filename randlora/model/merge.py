"""`merge`, `merged` and `unmerge`: fold the active adapters into the weights, for good or for a while.

A merged weight is computed in float32 or wider and rounded once. The weight it replaces is kept, not computed back, so
unmerging restores every bit in every dtype. A quantized weight is written out, added to, and rounded to codes again, or
left written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from randlora.errors import ConfigError, MergeError, raise_collected
from randlora.layers.folding import Into, Quantized, RoundingLoss
from randlora.layers.quantized import QuantizedLayer
from randlora.model.install import detach_all, lost_sites, require_detachable, require_own
from randlora.report import MergeReport, shortened
from randlora.state import ModelState, adapted_root
from randlora.targets.select import tie_problems
from randlora.targets.site import AdaptedSite
from randlora.targets.walk import Census, is_norm, is_quantized


@torch.inference_mode(mode=False)  # the weights outlive the mode the caller is in
def merge(
    model: nn.Module, *, reversible: bool = False, quantized: Quantized = "requantize", dtype: torch.dtype | None = None
) -> MergeReport:
    """Fold the active adapters into the weights, in place.

    Until the last layer is done, both its weight before and after are held.

    Args:
        model: A model that carries adapters.
        reversible: Keep the adapters and the weights as they were, for `unmerge`. Else plain layers are back, the
            adapters are gone, and parameters require grad as they did before the first adapter came.
        quantized: What becomes of bitsandbytes layers. ``"requantize"`` leaves layers of the same kind, whose codes are
            the nearest to the merged weights: as small as before, but some of what was learned is rounded away; the
            report says how much. ``"dequantize"`` makes each of them an `nn.Linear`, the very same module with its
            hooks: nothing is lost, and it takes 2 to 8 times the memory.
        dtype: Of the layers that ``"dequantize"`` leaves, which do not cast what they are given as quantized ones do.
            ``None`` means the dtype of the model's norms, else of its first parameter outside of quantized layers,
            else the one that each layer computes in.

    Returns:
        Which adapters went into which layers, and what rounding to codes did to each.

    Raises:
        AdapterError: When the model carries no adapter.
        ConfigError: For another word, or a dtype that is not floating or that nothing would have.
        MergeError: When nothing is active, the adapters are switched off or merged already, an inactive adapter would
            be lost, a weight has no values here, another module was put in an adapted one's place, a merged weight
            would not be finite, or a quantized layer has a forward of its own that an `nn.Linear` would lose. The model
            is then as it was.
    """
    root, state = adapted_root(model)
    census = Census.of(root)
    sites = [site for site in census.adapted if state.active.keys() & site.layer.adapters.keys()]
    into = Into(quantized, dtype, _model_dtype(census) if quantized == "dequantize" else None)
    raise_collected(ConfigError, _option_problems(into), doing="merge")
    require_own(census, state, "merge")
    lost = lost_sites(census, (state.adapters[name] for name in state.active))
    tied = tie_problems(census, sites)
    problems = [*_state_problems(state, reversible=reversible), *lost, *tied, *_weight_problems(sites, into)]
    raise_collected(MergeError, problems, doing="merge")
    if not reversible:
        require_detachable(census, "merge")
    notes = _forward_notes(sites)  # folding may change classes
    rounding = _fold_all(sites, state.active, into)
    notes = (*notes, *(() if reversible else _notes(root, sites, into)))
    targets = tuple(site.fqn for site in sites)
    report = MergeReport(dict(state.active), targets, reversible=reversible, rounding=rounding, notes=notes)
    state.merge_report = report
    for basis in state.bank:
        basis.release()  # a merged model computes without them
    if not reversible:
        for site in sites:
            site.layer.unmerged = None
        detach_all(census, state)
    return report


def unmerge(model: nn.Module) -> tuple[str, ...]:
    """Put back, bit for bit, the weights that ``merge(model, reversible=True)`` replaced.

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
            "cannot unmerge: the adapters are not merged; randlora.merge(model, reversible=True) merges reversibly"
        )
    restored = []
    for site in Census.of(root).adapted:
        if site.layer.unmerged is not None:
            site.layer.unfold(site.owner)
            restored.append(site.fqn)
    state.merge_report = None
    return tuple(restored)


@contextmanager
def merged(
    model: nn.Module, *, quantized: Quantized = "requantize", dtype: torch.dtype | None = None
) -> Iterator[MergeReport]:
    """Merge the active adapters inside a ``with`` block, for inference at the base model's speed.

    Nests: an inner block finds the adapters merged, and leaves them so, whatever its own options are.

    Args:
        model: A model that carries adapters.
        quantized: As in `merge`.
        dtype: As in `merge`.

    Yields:
        The report of the merge that is in force: of an inner block, that of the outer one.

    Raises:
        AdapterError: As `merge` does.
        ConfigError: As `merge` does.
        MergeError: As `merge` does.
    """
    _, state = adapted_root(model)
    if state.merge_report is not None:
        yield state.merge_report
        return
    report = merge(model, reversible=True, quantized=quantized, dtype=dtype)
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


def _state_problems(state: ModelState, *, reversible: bool) -> list[str]:
    if state.is_merged:
        return ["the adapters are merged already: call randlora.unmerge(model) first"]
    problems = []
    if state.is_disabled:
        problems.append("the adapters are switched off: merge outside of randlora.disabled(model)")
    if not state.active:
        problems.append(f"no adapter is active: activate one of {', '.join(state.adapters)}")
    inactive = [name for name in state.adapters if name not in state.active]
    if inactive and not reversible:
        problems.append(
            f"{', '.join(inactive)} would be lost: save and remove what is not active, or merge with reversible=True"
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


def _weight_problems(sites: Sequence[AdaptedSite], into: Into) -> list[str]:
    problems = []
    for site in sites:
        layer, weight = site.layer, site.weight
        if weight is None:
            problems.append(f"{site.fqn} computes its weight from other parameters: remove the parametrization first")
        elif weight.is_meta or weight.numel() == 0 or type(weight.data) is not Tensor:
            problems.append(f"the weight of {site.fqn} is not all here (meta, offloaded or sharded): gather it first")
        elif site.shape != layer.shape:
            problems.append(
                f"{site.fqn} was {layer.shape[0]} x {layer.shape[1]} when the adapter came and is "
                f"{site.shape[0]} x {site.shape[1]} now: save the adapter, eject it, and load one that fits"
            )
        elif (reason := layer.merge_obstacle(site.owner, into)) is not None:
            problems.append(f"{site.fqn} {reason}")
    return problems


def _forward_notes(sites: Sequence[AdaptedSite]) -> tuple[str, ...]:
    """Return a note on layers whose forward is not their kind's, where merging may change what is computed."""
    own = [
        site.fqn
        for site in sites
        if site.layer.plain_forward() is not None and not site.layer.runs_plain_forward(site.owner)
    ]
    if not own:
        return ()
    note = (
        f"a forward of their own: {shortened(own)}; merged, they compute what they did with the adapter only where "
        "that is linear in the weight: compare outputs before and after"
    )
    return (note,)


def _notes(root: nn.Module, sites: Sequence[AdaptedSite], into: Into) -> tuple[str, ...]:
    is_plain_now = into.quantized == "dequantize" and any(isinstance(site.layer, QuantizedLayer) for site in sites)
    if not is_plain_now or getattr(getattr(root, "config", None), "quantization_config", None) is None:
        return ()
    note = (
        "the model's config still says that it is quantized, so what save_pretrained writes would not load: to save, "
        "merge the files with randlora.files.merge, or, but for Conv1D layers (GPT-2), call model.dequantize() before "
        "the adapter is loaded, then merge"
    )
    return (note,)


def _model_dtype(census: Census) -> torch.dtype | None:
    """Return the dtype that linear layers are given: that of norms, else of what the model has beside codes."""
    own = [
        (held.module, held.parameter.dtype)
        for held in census.parameters
        if held.parameter.is_floating_point() and not is_quantized(held.module)
    ]
    norms = [dtype for module, dtype in own if is_norm(module)]
    return next(iter(norms or [dtype for _, dtype in own]), None)


def _fold_all(sites: Sequence[AdaptedSite], weights: dict[str, float], into: Into) -> dict[str, RoundingLoss]:
    """Fold into every weight, or into none."""
    rounding = {}
    try:
        for site in sites:
            merged = site.layer.merged(site.owner, weights, into)
            require_finite(site.fqn, merged.weight)
            site.layer.fold(site.owner, merged)
            if merged.rounding is not None:
                rounding[site.fqn] = merged.rounding
    except BaseException:
        for site in sites:
            site.layer.unfold(site.owner)
        raise
    return rounding

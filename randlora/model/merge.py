"""`merge`, `merged` and `unmerge`: merging the active adapters into the weights, permanently or reversibly.

A merged weight is computed in float32 or wider and rounded once. A reversible merge keeps the original weight, so that
unmerging restores every bit in every dtype. A quantized weight is dequantized, added to, and either quantized again or
left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import ConfigError, MergeError, raise_collected
from randlora.hints import require_types, shortly
from randlora.layers.base import AdapterLayer
from randlora.layers.quantized import QuantizedLayer
from randlora.layers.read_weight import ReadWeight
from randlora.layers.update import Into, Quantized, RoundingLoss
from randlora.model.change import all_or_nothing, one_at_a_time
from randlora.model.install import detach_all, lost_sites, require_detachable, require_own, unfold_all
from randlora.model.ranks import ranks_holding
from randlora.model.train_also import lost_parameters
from randlora.placement.dtensor import reshard
from randlora.placement.offloaded import Offloaded
from randlora.placement.place import Kept, place_of
from randlora.placement.ranks import Ranks, agreed
from randlora.report import MergeReport
from randlora.state import CHANGING, ModelState, adapted_root
from randlora.targets.match import shortened
from randlora.targets.site import AdaptedSite
from randlora.targets.ties import tie_problems
from randlora.targets.walk import Census, is_norm, is_quantized


@torch.inference_mode(mode=False)  # the weights must not be inference tensors
@one_at_a_time
def merge(
    model: nn.Module, *, reversible: bool = False, quantized: Quantized = "requantize", dtype: torch.dtype | None = None
) -> MergeReport:
    """Merge the active adapters into the weights, in place.

    The weights before and after are both in memory until the last layer is merged.

    Args:
        model: A model with adapters.
        reversible: Whether to keep the adapters and the original weights for `unmerge`. Otherwise the layers become
            plain again, the adapters are removed, and ``requires_grad`` flags are restored.
        quantized: What to do with bitsandbytes layers. ``"requantize"`` keeps the kind of layer and quantizes the
            merged weight: the layer stays small, but part of the update is lost to rounding; the report says how much.
            ``"dequantize"`` turns each into an `nn.Linear`, the same module object with its hooks, without loss, which
            takes 2 to 8 times the memory.
        dtype: The dtype of dequantized layers, which do not cast their inputs as quantized ones do. ``None`` means the
            dtype of the model's norms, else of its first parameter outside of quantized layers, else the one that each
            layer computes in.

    Returns:
        The report, with the merged layers and the rounding error of each requantized one.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For an unknown value of ``quantized``, a dtype that is not floating, or a dtype with
            ``"requantize"``.
        MergeError: If no adapter is active, the adapters are disabled or merged already, an inactive adapter would be
            lost, a weight has no values (meta, offloaded or sharded), an adapted module was replaced, a merged weight
            would not be finite, or a quantized layer has its own forward that an `nn.Linear` would not run. The model
            is then unchanged.
    """
    reshard(model)
    root, state = adapted_root(model)
    census = Census.of(root)
    ranks = ranks_holding(census, state, is_written=True)
    sites = [site for site in census.adapted if state.active.keys() & site.layer.adapters.keys()]
    with agreed(ranks):
        require_types(merge, {"reversible": reversible, "quantized": quantized})
        raise_collected(ConfigError, _option_problems(quantized, dtype), doing="merge")
        into = Into(quantized, dtype or model_dtype(census))
        require_own(census, state, "merge")
        active = [state.adapters[name] for name in state.active]
        lost = [*lost_sites(census, active), *lost_parameters(state, active)]
        tied = tie_problems(census, sites)
        problems = [*_state_problems(state, reversible=reversible), *lost, *tied, *weight_problems(sites, into)]
        raise_collected(MergeError, problems, doing="merge")
        if not reversible:
            require_detachable(census, "merge")
    notes = _notes(root, sites, into, reversible=reversible)  # before merging, which may change classes
    with all_or_nothing(census, state), _unfolded_if_raised(sites) as kept:
        rounding = _fold_all(sites, state.active, into, ranks)
        targets = tuple(site.fqn for site in sites)
        report = MergeReport(dict(state.active), targets, reversible=reversible, rounding=rounding, notes=notes)
        for basis in state.bank:
            basis.release()  # a merged model does not use them
        if reversible:
            guarded = census.around_adapted
            state.loading_guards = [each.register_load_state_dict_pre_hook(_refuse_loading) for each in guarded]
            state.merge_report = report
            return report
        kept |= {site.layer: site.layer.unmerged for site in sites}
        for site in sites:
            site.layer.keep_merged(site.owner)
        detach_all(census, state)
    return report


@one_at_a_time
def unmerge(model: nn.Module) -> tuple[str, ...]:
    """Restore, bit for bit, the weights from before ``merge(model, reversible=True)``.

    If the model is sharded, all processes call this together.

    Args:
        model: A model whose adapters are merged.

    Returns:
        FQNs of the restored layers.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If its adapters are not merged.
    """
    return _unmerge(model)


def _unmerge(model: nn.Module, *, is_agreed: bool = True) -> tuple[str, ...]:
    """Restore the weights; if ``is_agreed``, together with the other processes that hold parts of them."""
    reshard(model)
    root, state = adapted_root(model)
    census = Census.of(root)
    ranks = ranks_holding(census, state, is_written=True) if is_agreed else None

    def restored() -> tuple[str, ...]:
        with all_or_nothing(census, state), agreed(ranks):
            if not state.is_merged:
                raise MergeError("cannot unmerge: the adapters are not merged; first merge(model, reversible=True)")
            return unfold_all(census, state)

    try:
        return restored()
    except BaseException as error:  # an `Exception` is raised in all processes, which wait for one that is interrupted
        if ranks is not None and not isinstance(error, Exception) and state.is_merged:
            restored()
        raise


@contextmanager
def merged(
    model: nn.Module, *, quantized: Quantized = "requantize", dtype: torch.dtype | None = None
) -> Iterator[MergeReport]:
    """Merge the active adapters inside a ``with`` block, for inference at the base model's speed.

    Blocks can be nested, and may overlap, in several threads or tasks: the adapters are merged until the last one ends.
    Only the block that merges uses its options.

    Args:
        model: A model with adapters.
        quantized: See `merge`.
        dtype: See `merge`.

    Yields:
        The report of the merge, which may be that of an outer block.

    Raises:
        RandLoRAError: Any error of `merge`.
    """
    _, state = adapted_root(model)
    block, is_kept, has_raised = object(), False, True

    def end() -> None:
        with CHANGING:
            state.merged_blocks = [other for other in state.merged_blocks if other is not block]
            if state.is_merged and not state.merged_blocks and not is_kept:
                # after an error of this process alone, the others may never come here
                _unmerge(model, is_agreed=not has_raised)

    try:
        with CHANGING:
            is_kept = state.is_merged and not state.merged_blocks  # by `merge`, which `unmerge` undoes
            report = state.merge_report or merge(model, reversible=True, quantized=quantized, dtype=dtype)
            if not is_kept:
                state.merged_blocks.append(block)
        yield report
        has_raised = False
    finally:
        try:
            end()
        except BaseException:  # an interrupt, after which nothing else would
            end()
            raise


def _refuse_loading(module: nn.Module, *args: object) -> None:  # noqa: ARG001  # a hook's signature
    """Raise an error before anything is loaded into a part of a model that is merged into: unmerging would undo it."""
    raise MergeError(
        "cannot load a state dict while the adapters are merged: call randlora.unmerge(model) first, or load after the "
        "`with randlora.merged(model)` block"
    )


def require_finite(fqn: str, weight: Tensor) -> Tensor:
    """Return a merged weight if it is finite; else raise `MergeError`."""
    if not torch.isfinite(weight).all():
        raise MergeError(
            f"the merged weight of {fqn} would not be finite in {weight.dtype}: check the adapter and the base weight "
            "for NaN or infinite values, lower the adapter's weight, or merge in a wider dtype"
        )
    return weight


def _state_problems(state: ModelState, *, reversible: bool) -> list[str]:
    if state.is_merged:
        return ["the adapters are merged already: call randlora.unmerge(model) first"]
    problems = []
    if state.is_disabled:
        problems.append("the adapters are disabled: merge outside of randlora.disabled(model)")
    if not state.active:
        problems.append(f"no adapter is active: activate one of {', '.join(state.adapters)}")
    inactive = [name for name in state.adapters if name not in state.active]
    if inactive and not reversible:
        problems.append(
            f"{', '.join(inactive)} would be lost: save and remove inactive adapters, or merge with reversible=True"
        )
    return problems


def _option_problems(quantized: Quantized, dtype: torch.dtype | None) -> list[str]:
    problems = []
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        problems.append(f"dtype must be a floating dtype or None, got {shortly(dtype)}")
    if dtype is not None and quantized == "requantize":
        problems.append("dtype= applies to dequantized layers only: give quantized='dequantize' too, or omit dtype")
    return problems


def weight_problems(sites: Sequence[AdaptedSite], into: Into) -> list[str]:
    """Return messages about weights that have no values here, or that cannot be merged into."""
    problems = []
    for site in sites:
        layer, weight = site.layer, site.weight
        if weight is None:
            problems.append(f"{site.fqn} computes its weight from other parameters: remove the parametrization first")
        elif _is_incomplete(site, weight):
            problems.append(
                f"the weight of {site.fqn} is incomplete (meta, offloaded or sharded): load or gather it first"
            )
        elif (reason := layer.merge_obstacle(site.owner, into)) is not None:
            problems.append(f"{site.fqn} {reason}")
    return problems


def _is_incomplete(site: AdaptedSite, weight: nn.Parameter) -> bool:
    """Whether a weight has no values, or not all of them and not in a place that they can be merged into."""
    place = None if isinstance(site.layer, QuantizedLayer) else place_of(site.owner, site.layer.attribute)
    if place is None:
        return weight.is_meta or weight.numel() == 0 or type(weight.data) is not Tensor
    return weight.is_meta and not isinstance(place, Offloaded)


def _notes(root: nn.Module, sites: Sequence[AdaptedSite], into: Into, *, reversible: bool) -> tuple[str, ...]:
    """Return notes on layers with their own forward, and on a config that no longer describes the model."""
    notes = []
    own = [
        site.fqn
        for site in sites
        if site.layer.plain_forward() is not None
        and not isinstance(site.layer, ReadWeight)  # whatever the forward is, it read the same weight
        and not site.layer.runs_plain_forward(site.owner)
    ]
    if own:
        notes.append(
            f"layers with their own forward: {shortened(own)}; merged, their output is the same as with the adapter "
            "only if the forward is linear in the weight: compare outputs before and after"
        )
    places = {site.fqn: place_of(site.owner, site.layer.attribute) for site in sites}
    on_disk = {fqn: place.folder for fqn, place in places.items() if isinstance(place, Offloaded) and place.folder}
    if on_disk:
        notes.append(
            f"the merged weights of {shortened(list(on_disk))}, which accelerate offloads to disk, are in new files in "
            f"{', '.join(sorted(set(on_disk.values())))} that are deleted with the model: the files that held these "
            "weights are not changed; to keep the merged model, save it"
        )
    becomes_plain = into.quantized == "dequantize" and any(isinstance(site.layer, QuantizedLayer) for site in sites)
    is_called_quantized = getattr(getattr(root, "config", None), "quantization_config", None) is not None
    if becomes_plain and is_called_quantized and not reversible:
        notes.append(
            "the model's config still says that it is quantized, so files written by save_pretrained would not load: "
            "to save, merge the files with randlora.files.merge, or, except with Conv1D layers (GPT-2), call "
            "model.dequantize() before loading the adapter, then merge"
        )
    return tuple(notes)


def model_dtype(census: Census) -> torch.dtype | None:
    """Return the dtype of the inputs of linear layers: that of norms, else of the first unquantized parameter."""
    own = [
        (held.module, held.parameter.dtype)
        for held in census.parameters
        if held.parameter.is_floating_point() and not is_quantized(held.module)
    ]
    norms = [dtype for module, dtype in own if is_norm(module)]
    return next(iter(norms or [dtype for _, dtype in own]), None)


def _fold_all(
    sites: Sequence[AdaptedSite], weights: dict[str, float], into: Into, ranks: Ranks | None
) -> dict[str, RoundingLoss]:
    """Merge into all weights and return the rounding errors. If any process fails, all raise."""
    rounding: dict[str, RoundingLoss] = {}
    with agreed(ranks):
        failed: Exception | None = None
        for site in sites:
            try:
                merged = site.layer.merged(site.owner, weights, into)
                if failed is not None:  # the other processes still need this one to gather
                    continue
                require_finite(site.fqn, merged.weight)
                site.layer.fold(site.owner, merged)
            except Exception as error:
                if ranks is None:
                    raise
                failed = failed or error
            else:
                if merged.rounding is not None:
                    rounding[site.fqn] = merged.rounding
        if failed is not None:
            raise failed
    return rounding


@contextmanager
def _unfolded_if_raised(sites: Sequence[AdaptedSite]) -> Iterator[dict[AdapterLayer, tuple[Any] | None]]:
    """Restore the values that were written in place, as of sharded weights, if the block raises.

    Other weights are exchanged for merged ones, which `all_or_nothing` undoes.

    Yields:
        A dict for the block to fill with what `AdapterLayer.unmerged` was before it dropped that.
    """
    kept: dict[AdapterLayer, tuple[Any] | None] = {}
    try:
        yield kept
    except BaseException:
        for site in sites:
            layer = site.layer
            layer.unmerged = layer.unmerged or kept.get(layer)
            if layer.unmerged is not None and isinstance(layer.unmerged[0], Kept):
                layer.unfold(site.owner)
        raise

"""`merge`, `merged` and `unmerge`: merging the active adapters into the weights, permanently or reversibly.

A merged weight is computed from the original one in float32 or wider and rounded once, all updates in the order in
which the adapters were added. A reversible merge keeps the original weight, so that unmerging restores every bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial

import torch
from torch import nn

from randlora.config import Factor
from randlora.errors import ConfigError, MergeError, raise_collected, warn
from randlora.hints import listed, require_types, shortly
from randlora.layers.base import AdapterLayer
from randlora.layers.weight import Into, Quantized, RoundingLoss
from randlora.model.install import detach_all, lost_parts, merged_sites, require_detachable, restore_originals
from randlora.model.mergeable import (
    differences_from_product,
    exchanged_weights,
    merge_notes,
    model_dtype,
    name_problems,
    option_problems,
    product_problems,
    refuse_backward,
    remerge_problems,
    replaced_problems,
    require_finite,
    require_merged_weights,
    state_problems,
    weight_problems,
)
from randlora.model.train_also import moved_note, untrained_notes
from randlora.model.view import all_or_nothing, collective, opened, require_own, together
from randlora.places import Kept
from randlora.ranks import agree, alone, run_collectives
from randlora.report import MergeReport
from randlora.state import CHANGING, ModelState
from randlora.targets.census import AdaptedSite, Census
from randlora.targets.left_out import tie_problems
from randlora.targets.match import shortened

LOSSY = 0.1  # the share of the norm of an update that rounding to codes may lose without a warning


@collective(writes=True)
@torch.inference_mode(mode=False)  # the weights must not be inference tensors
def merge(
    model: nn.Module,
    *,
    adapters: str | Iterable[str] | None = None,
    reversible: bool = False,
    quantized: Quantized = "requantize",
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Merge the active adapters, or some of them, into the weights, in place.

    The old and the new weights are both in memory until the last layer is merged. Reversibly merged adapters remain
    active; others can be active on top of them, and be merged later. The weights do not depend on the order of merging.
    If the model is sharded, all processes call this together.

    Args:
        model: A model with adapters.
        adapters: The names of the active adapters to merge; ``None`` means all. If some adapters are not merged, they
            stay active on top, and the merge must be reversible.
        reversible: Whether to keep the adapters and the original weights for `unmerge`. Otherwise the layers become
            plain again, the adapters are removed, and ``requires_grad`` flags are restored.
        quantized: What to do with bitsandbytes layers. ``"requantize"`` keeps the kind of layer and quantizes the
            merged weight: the layer stays small, but part of the update is lost to rounding; the report says how much.
            ``"dequantize"`` turns each layer into an `nn.Linear`, the same module object. Nothing is lost, and it takes
            2 to 8 times the memory.
        dtype: The dtype of dequantized layers. ``None`` means the dtype of the model's norms, or else of its first
            parameter outside of quantized layers, or else each layer's compute dtype.

    Returns:
        The report, with the merged layers and the rounding error of each requantized layer.

    Raises:
        AdapterError: If the model has no adapter.
        ConfigError: For an unknown value of ``quantized``, or a dtype that is not floating or not for its layers.
        MergeError: If no adapter can be merged now, one would be lost, a weight has no values here or cannot be merged
            into, a merged weight would not be finite, or a test on a small random input shows that a layer's custom
            forward does not use the weight as a plain product. The model is then unchanged.

    Warns:
        UserWarning: If rounding to codes loses more than a tenth of an update, as it mostly does in 4 bits.
    """
    with opened(model, None, writes=True) as view:
        census, state = view.census, view.state
        names = None if adapters is None else listed(adapters)
        factors = {name: each for name, each in state.active_unmerged.items() if names is None or name in names}
        sites = [site for site in census.adapted if site.layer.factors(factors)]
        first = [site for site in sites if site.layer.original is None]
        require_types(merge, {"reversible": reversible, "quantized": quantized})
        raise_collected(ConfigError, option_problems(quantized, dtype), doing="merge")
        into = Into(quantized, dtype or model_dtype(census))
        require_own(census, state, "merge")
        raise_collected(MergeError, name_problems(state, names), doing="merge")
        merging = [state.adapters[name] for name in factors]
        lost = lost_parts(census, state, merging)
        values = [*tie_problems(census, sites), *weight_problems(first, into), *remerge_problems(sites)]
        differences = {} if values else differences_from_product(first)  # of weights that have values
        problems = state_problems(state, sites, factors, reversible=reversible)
        problems += [*replaced_problems(state), *lost, *values, *product_problems(differences)]
        if state.is_merged and state.merge_options != (quantized, dtype):
            problems.append(
                "others are merged with different options: give the same quantized and dtype, or unmerge them"
            )
        raise_collected(MergeError, problems, doing="merge")
        if not reversible:
            require_detachable(census, "merge")
        untried = [site for site, difference in differences.items() if difference is None]
        notes = (
            *merge_notes(view.root, first, untried, into, reversible=reversible),  # before merging changes classes
            *untrained_notes(census, state, merging),
            *moved_note(
                census, state, merging, "the merged model has them as they are now, and no file of the adapter"
            ),
        )
        with _restored_if_raised(first) as kept:  # all is checked; from here on, the model changes
            active = _in_order(state, state.merged | factors)
            rounding = _write_all_merged(sites, active, into)
            _warn_if_lossy(rounding)
            targets = tuple(site.fqn for site in sites)
            copied = {name: copy(factor) for name, factor in factors.items()}
            report = MergeReport(copied, targets, reversible=reversible, rounding=rounding, notes=notes)
            if not state.active_unmerged.keys() - factors.keys():
                for basis in state.bank:
                    basis.release()  # a merged model does not use them
            if reversible:
                if not state.is_merged:
                    guards = [each.register_load_state_dict_pre_hook(_refuse_loading) for each in census.around_adapted]
                    guards.append(view.root.register_forward_hook(refuse_backward))
                    guards.append(view.root.register_forward_pre_hook(require_merged_weights))
                    state.merge_guards = guards
                state.merged, state.merge_options, state.merge_report = active, (quantized, dtype), report
                state.exchanged = exchanged_weights(census)
                for site in sites:
                    site.layer.seat(site.owner)
            else:
                kept |= {site.layer: site.layer.original for site in sites}
                for site in sites:
                    site.layer.keep_merged(site.owner)
                detach_all(census, state)
            agree()  # before it is certain that nothing is to be restored
            return report


def _warn_if_lossy(rounding: Mapping[str, RoundingLoss]) -> None:
    if lossy := {fqn: loss.relative for fqn, loss in rounding.items() if loss.relative > LOSSY}:
        warn(
            f"rounding to codes loses up to {max(lossy.values()):.0%} of the update of {shortened([*lossy])}: merge "
            "with quantized='dequantize', or merge the saved adapter into the base that is not quantized, with "
            "randlora.files.merge"
        )


def _in_order(state: ModelState, weights: Mapping[str, Factor]) -> dict[str, Factor]:
    return {name: weights[name] for name in state.adapters if name in weights}


@collective(writes=True)
@torch.inference_mode(mode=False)
def unmerge(model: nn.Module, adapters: str | Iterable[str] | None = None) -> tuple[str, ...]:
    """Restore, bit for bit, the weights from before ``merge(model, reversible=True)``, for all or some adapters.

    If the model is sharded, all processes call this together.

    Args:
        model: A model whose adapters are merged.
        adapters: The names of the adapters to unmerge; ``None`` means all. They become active on top of the adapters
            that are still merged. The weights are the same as if only the others had been merged.

    Returns:
        FQNs of the restored layers.

    Raises:
        AdapterError: If the model has no adapter.
        MergeError: If its adapters are not merged, or a weight cannot be restored or merged again.
    """
    with opened(model, None) as view:
        state, census = view.state, view.census
        names = [*state.merged] if adapters is None else listed(adapters)
        staying = {name: factor for name, factor in state.merged.items() if name not in names}
        if not state.is_merged:
            raise MergeError("cannot unmerge: the adapters are not merged; first merge(model, reversible=True)")
        unknown = [name for name in names if not isinstance(name, str) or name not in state.merged]
        problems = [f"{shortly(name)} is not merged: {', '.join(state.merged)} is" for name in unknown]
        raise_collected(MergeError, problems, doing="unmerge")
        agree()
        with all_or_nothing(census, state):
            return _merge_fewer(census, state, staying) if staying else restore_originals(census, state)


def _merge_fewer(census: Census, state: ModelState, staying: Mapping[str, Factor]) -> tuple[str, ...]:
    """Restore the weights from before other adapters than these were merged, and return the FQNs of the layers."""
    leaving = state.merged.keys() - staying.keys()
    sites = [site for site in merged_sites(census) if site.layer.factors(leaving)]
    again = [site for site in sites if site.layer.factors(staying)]
    raise_collected(MergeError, remerge_problems(again), doing="unmerge")
    quantized, dtype = state.merge_options
    _write_all_merged(again, _in_order(state, staying), Into(quantized, dtype or model_dtype(census)))
    for site in sites:
        if not site.layer.factors(staying):
            site.layer.restore_original(site.owner)
    state.merged, state.exchanged = _in_order(state, staying), exchanged_weights(census)
    for site in sites:
        site.layer.seat(site.owner)
    return tuple(site.fqn for site in sites)


@contextmanager
def merged(
    model: nn.Module, *, quantized: Quantized = "requantize", dtype: torch.dtype | None = None
) -> Iterator[MergeReport]:
    """Merge the active adapters inside a ``with`` block, for inference at the base model's speed.

    One block of a model can be open at a time. It merges the adapters that are active and not merged yet, and unmerges
    these at its end. Other threads may run the model in it. If the model is sharded, all processes enter it together.
    ``quantized`` and ``dtype`` are as in `merge`.

    Yields:
        The report of the merge, or of the last one if everything is already merged.

    Raises:
        MergeError: If a block of this model is open.
        RandLoRAError: Any error of `merge`.
    """
    state: ModelState | None = None
    merged_here: list[str] = []  # adapters that this block merges; the state knows the open block by this very list

    def end() -> None:
        if state is None:  # it was not found
            return
        with CHANGING:
            if state.merged_block is merged_here:
                state.merged_block = None
            if names := [name for name in merged_here if name in state.merged]:
                with alone():  # after an error of one process alone, the others would wait for it
                    unmerge(model, names)

    try:
        with together(model, writes=True), opened(model, None) as view:
            state = view.state
            if state.merged_block is not None:
                raise MergeError(
                    "a block of randlora.merged is open already, whose end would unmerge this one: open one around "
                    "all, or call randlora.merge(model, reversible=True) before and randlora.unmerge(model) after"
                )
            if state.active_unmerged or not state.is_merged:
                merged_here += state.active_unmerged  # first, or an interrupt might leave them merged
                state.merged_block = merged_here
                quantized, dtype = state.merge_options or (quantized, dtype)
                merge(model, reversible=True, quantized=quantized, dtype=dtype)
            report = state.merge_report
        yield report
    finally:
        try:
            end()
        except BaseException:  # an interrupt, after which nothing else would
            end()
            raise


def _refuse_loading(module: nn.Module, *args: object) -> None:  # noqa: ARG001  # a hook's signature
    """Raise an error before anything is loaded into a part of a model that is merged into: unmerging would undo it."""
    raise MergeError("cannot load a state dict while adapters are merged: unmerge them, or end the block of merged")


def _write_all_merged(sites: Sequence[AdaptedSite], names: Collection[str], into: Into) -> dict[str, RoundingLoss]:
    rounding: dict[str, RoundingLoss] = {}

    def write(site: AdaptedSite) -> None:
        factors = site.layer.factors(names)
        if site.layer.is_quantized:
            site.layer.restore_original(site.owner)  # its original codes, if it is merged into already, to add to
        merged = site.layer.compute_merged(site.owner, factors, into)
        require_finite(site.fqn, merged.weight)
        site.layer.write_merged(site.owner, merged)
        if merged.rounding is not None:
            rounding[site.fqn] = merged.rounding

    agree()
    run_collectives(partial(write, site) for site in sites)
    agree()
    return rounding


@contextmanager
def _restored_if_raised(sites: Sequence[AdaptedSite]) -> Iterator[dict[AdapterLayer, Kept | None]]:
    """Restore the values that were written in place, such as of sharded weights, if the block raises."""
    # what `AdapterLayer.original` was before the block drops it; `all_or_nothing` undoes the rest
    kept: dict[AdapterLayer, Kept | None] = {}
    try:
        yield kept
    except BaseException:
        for site in sites:
            layer = site.layer
            layer.original = layer.original or kept.get(layer)
            if layer.original is not None and layer.original.place is not None:
                layer.restore_original(site.owner)
        raise

"""Checks and notes of a merge, and the refusal of a backward pass while adapters are merged."""

from __future__ import annotations

import copy
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import MergeError
from randlora.functional.scratch import is_transformed
from randlora.hints import shortly
from randlora.layers.base import is_plain_tensor
from randlora.layers.diagonals import Diagonal
from randlora.layers.update import Into, Quantized
from randlora.places import Plain, Whole, lent, place_at
from randlora.state import ModelState, attached_state
from randlora.targets.census import AdaptedSite, Census, is_norm, is_quantized
from randlora.targets.match import shortened


def require_finite(fqn: str, weight: Tensor) -> Tensor:
    """Return a merged weight. Raises a `MergeError` if it is not finite."""
    if not torch.isfinite(weight).all():
        raise MergeError(
            f"the merged weight of {fqn} would not be finite in {weight.dtype}: check the adapter and the base weight "
            "for NaN or infinite values, lower the adapter's factor, or merge in a wider dtype"
        )
    return weight


def name_problems(state: ModelState, names: Sequence[str] | None) -> list[str]:
    """Return messages about names that cannot be merged, because they are not active or are merged already."""
    if names is None:
        return []
    if not names:
        return ["adapters is empty: name those to merge, or leave it out to merge all that are active"]
    return state.unknown(names) + [
        f"{name!r} is merged already"
        if name in state.merged
        else f"{name!r} is not active: activate it first, with the factor to merge it with"
        for name in state.adapters
        if name in names and name not in state.active_unmerged
    ]


def state_problems(state: ModelState, names: Iterable[str], *, reversible: bool) -> list[str]:
    """Return messages about states of adapters that do not allow merging the named ones."""
    if state.is_merged and (not reversible or not state.active_unmerged):
        return ["the adapters are merged already: call randlora.unmerge(model) first"]
    problems = []
    if state.is_disabled:
        problems.append(f"the adapters are disabled: merge outside of {state.disabled_by}")
    if not state.active:
        problems.append(f"no adapter is active: activate one of {', '.join(state.adapters)}")
    left = [name for name in state.adapters if name not in names]
    if left and not reversible:
        which = "other" if set(left) & state.active.keys() else "inactive"
        problems.append(
            f"{', '.join(left)} would be lost: save and remove {which} adapters, or merge with reversible=True"
        )
    return problems


def trained_problems(state: ModelState, sites: Sequence[AdaptedSite], names: Iterable[str]) -> list[str]:
    """Return messages about weights of which an adapter that would not be merged, but stays active, trains a copy."""
    weights = {id(site.weight) for site in sites}
    return [
        f"{name!r} would not be merged, but trains a copy of {fqn}, which is merged into: merge it too"
        for name in state.active_unmerged.keys() - set(names)
        for fqn, copy in state.adapters[name].trained.items()
        if id(copy) in weights
    ]


def remerge_problems(sites: Sequence[AdaptedSite]) -> list[str]:
    """Return messages about weights that cannot be merged into again, because their values are not in one place."""
    return [
        f"{site.fqn} is merged into already, and its weight is sharded or offloaded: unmerge all, and merge together"
        for site in sites
        if site.layer.unmerged is not None and (site.layer.unmerged.place is not None or not _is_here(site))
    ]


def _is_here(site: AdaptedSite) -> bool:
    """Whether all values of a weight, or all of its codes, are in this process."""
    return site.place.part is None if site.layer.is_quantized else isinstance(site.place, Plain)


def option_problems(quantized: Quantized, dtype: torch.dtype | None) -> list[str]:
    """Return messages about invalid options of a merge."""
    problems = []
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        problems.append(f"dtype must be a floating dtype or None, got {shortly(dtype)}")
    if dtype is not None and quantized == "requantize":
        problems.append("dtype= applies to dequantized layers only: give quantized='dequantize' too, or omit dtype")
    return problems


def weight_problems(sites: Sequence[AdaptedSite], into: Into | None) -> list[str]:
    """Return messages about weights that have no values here, or that cannot be merged into.

    ``None`` means that merged weights are only computed.
    """
    problems = []
    for site in sites:
        layer, weight = site.layer, site.weight
        if weight is None:
            problems.append(f"{site.fqn} computes its weight from other parameters: remove the parametrization first")
        elif _is_incomplete(site, weight):
            problems.append(
                f"the weight of {site.fqn} is incomplete (meta, fake, offloaded or sharded): load or gather it first"
            )
        elif (reason := layer.merge_obstacle(site.owner, into)) is not None:
            problems.append(f"{site.fqn} {reason}")
    return problems


def _is_incomplete(site: AdaptedSite, weight: Tensor) -> bool:
    """Whether a weight has no values, or not all of them and not in a place that they can be merged into."""
    place = place_at(weight) if site.layer.is_quantized else site.place
    is_part = lent(weight) is not None and weight.dim() < 2  # as no weight that is adapted has
    return is_part or not place.is_complete or (isinstance(place, Whole) and not weight.numel())


def merge_notes(
    root: nn.Module, sites: Sequence[AdaptedSite], untried: Iterable[AdaptedSite], into: Into, *, reversible: bool
) -> tuple[str, ...]:
    """Return notes on layers with their own forward, and on a config that no longer describes the model."""
    notes = []
    own = [site.fqn for site in untried if site.layer.plain_forward() is not None]
    if own:
        notes.append(
            f"layers with their own forward, which could not be tried: {shortened(own)}; once merged, their output is "
            "the same as with the adapter only if the forward is linear in the weight: compare outputs before and "
            "after"
        )
    on_disk = {site.fqn: folder for site in sites if (folder := site.place.folder) is not None}
    if on_disk:
        notes.append(
            f"the merged weights of {shortened(list(on_disk))}, which accelerate offloads to disk, are in new files in "
            f"{', '.join(sorted(set(on_disk.values())))}, which are deleted with the model; the original files are not "
            "changed. To keep the merged model, save it"
        )
    becomes_plain = into.quantized == "dequantize" and any(site.layer.is_quantized for site in sites)
    is_called_quantized = getattr(getattr(root, "config", None), "quantization_config", None) is not None
    if becomes_plain and is_called_quantized and not reversible:
        notes.append(
            "the model's config still says that it is quantized, so files written by save_pretrained would not load: "
            "call randlora.files.save_merged(model, directory) before a merge, or merge the files with "
            "randlora.files.merge"
        )
    return tuple(notes)


def model_dtype(census: Census) -> torch.dtype | None:
    """Return the dtype of the inputs of linear layers: the dtype of norms, else of the first unquantized parameter."""
    own = [
        (held.module, held.parameter.dtype)
        for held in census.parameters
        if held.parameter.is_floating_point() and not is_quantized(held.module)
    ]
    norms = [dtype for module, dtype in own if is_norm(module)]
    return next(iter(norms or [dtype for _, dtype in own]), None)


def refuse_backward(root: nn.Module, args: object, output: Any) -> Any:  # noqa: ARG001  # a hook's signature
    """Return the output of a merged model such that ``backward()`` raises a `MergeError`. Used as a forward hook.

    `torch.autograd.grad` still works, because gradients of chosen inputs are right.
    """
    state = attached_state(root)
    if state is None or not torch.is_grad_enabled() or is_transformed() or not _would_train_nothing(root, state):
        return None
    return _guarded(output)


def _would_train_nothing(root: nn.Module, state: ModelState) -> bool:
    """Whether adapters require grad that are merged, and none that is active on top of them."""
    diagonals = [module._parameters for module in root.modules() if isinstance(module, Diagonal)]

    def are_trained(names: Iterable[str]) -> bool:
        held = (parameters.get(name) for name in names for parameters in diagonals)
        return any(parameter is not None and parameter.requires_grad for parameter in held)

    return are_trained(state.merged) and not are_trained(state.active_unmerged)


def _guarded(output: Any) -> Any:
    """Return an output with the same bits whose tensors also depend on a leaf that refuses a gradient."""
    if is_plain_tensor(output) and output.requires_grad:
        leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        leaf.register_hook(_refuse)
        return output - leaf  # -0.0 + 0.0 would be 0.0
    if isinstance(output, MutableMapping):  # also a ModelOutput of transformers
        for key in [*output]:
            output[key] = _guarded(output[key])
    elif type(output) in (tuple, list):
        return type(output)(map(_guarded, output))
    elif isinstance(output, tuple) and (make := getattr(type(output), "_make", None)) is not None:  # a named tuple
        return make(map(_guarded, output))
    elif is_dataclass(output) and not isinstance(output, type):
        guarded = copy.copy(output)
        for each in fields(output):
            object.__setattr__(guarded, each.name, _guarded(getattr(output, each.name)))  # also of a frozen one
        return guarded
    return output


def _refuse(gradient: Tensor) -> None:  # noqa: ARG001  # a hook's signature
    raise MergeError(
        "cannot run backward through a model whose adapters are merged, because Λ and Γ would get no gradients: call "
        "randlora.unmerge(model) first, or end the `with randlora.merged(model)` block; to train only other "
        "parameters, call randlora.set_trainable(model, name, False)"
    )

"""Whether a model can be merged: checks and notes, the refusal of a backward pass, and a trial of layers' forwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import MergeError, raise_collected
from randlora.functional.scratch import is_transformed
from randlora.hints import shortly
from randlora.layers.base import AdapterLayer, is_plain_tensor
from randlora.layers.diagonals import Diagonal
from randlora.layers.in_place import plain_class
from randlora.layers.registry import find_layer
from randlora.layers.scopes import run_forward
from randlora.layers.weight import COMPUTED, Into, Quantized, rounded_sum
from randlora.model.view import holding_copies
from randlora.places import Plain, Whole, place_at, whole_only_inside
from randlora.state import ExchangedWeight, ModelState, attached_state
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


def state_problems(
    state: ModelState, sites: Sequence[AdaptedSite], names: Collection[str], *, reversible: bool, call: str = "merge"
) -> list[str]:
    """Return messages about states of adapters that do not allow merging the named ones into these weights."""
    if state.is_merged and (not reversible or not state.active_unmerged):
        return ["the adapters are merged already: call randlora.unmerge(model) first"]
    problems = []
    if state.is_disabled:
        problems.append(f"the adapters are disabled: {call} outside of {state.disabled_by}")
    if not state.active:
        problems.append(f"no adapter is active: activate one of {', '.join(state.adapters)}")
    left = [name for name in state.adapters if name not in names]
    if left and not reversible:
        which = "other" if set(left) & state.active.keys() else "inactive"
        problems.append(
            f"{', '.join(left)} would be lost: save and remove {which} adapters, or merge with reversible=True"
        )
    weights = {id(site.weight) for site in sites}
    return problems + [
        f"{name!r} would not be merged, but trains a copy of {fqn}, which is merged into: merge it too"
        for name in state.active_unmerged
        if name not in names
        for fqn, copy in state.adapters[name].trained.items()
        if id(copy) in weights
    ]


def remerge_problems(sites: Sequence[AdaptedSite]) -> list[str]:
    """Return messages about weights that cannot be merged into again, because their values are not in one place."""

    def is_here(site: AdaptedSite) -> bool:
        return site.place.part is None if site.layer.is_quantized else isinstance(site.place, Plain)

    return [
        f"{site.fqn} is merged into already, and its weight is sharded: unmerge all, and merge together"
        for site in sites
        if (kept := site.layer.original) is not None and (kept.place is not None or not is_here(site))
    ]


def option_problems(quantized: Quantized, dtype: torch.dtype | None) -> list[str]:
    """Return messages about invalid options of a merge."""
    problems = []
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        problems.append(f"dtype must be a floating dtype or None, got {shortly(dtype)}")
    if dtype is not None and quantized == "requantize":
        problems.append("dtype= applies to dequantized layers only: give quantized='dequantize' too, or omit dtype")
    return problems


def weight_problems(sites: Sequence[AdaptedSite], into: Into | None) -> list[str]:
    """Return messages about weights that have no values here, or cannot be merged into, or for ``None`` be computed."""
    problems, offloaded = [], []
    for site in sites:
        layer, weight = site.layer, site.weight
        if weight is None:
            problems.append(f"{site.fqn} {COMPUTED}")
        elif into is not None and site.place.is_loaded_on_call:
            offloaded.append(site.fqn)
        elif _is_incomplete(site, weight):
            problems.append(
                f"the weight of {site.fqn} is incomplete (meta, fake, offloaded, sharded): load or gather it"
            )
        elif (reason := layer.merge_obstacle(site.owner, into)) is not None:
            problems.append(f"{site.fqn} {reason}")
    if offloaded:
        problems.append(
            f"accelerate offloads the weights of {shortened(offloaded)}, which are not merged into: write the merged "
            "model with randlora.files.save_merged(model, directory), or save the adapter and merge it into the "
            "model's files with randlora.files.merge"
        )
    return problems if into is None else problems + quantized_since(sites)


def quantized_since(sites: Iterable[AdaptedSite]) -> list[str]:
    """Return messages about weights that were quantized after they were adapted, for which their layers have no way."""
    kinds = ((site, find_layer(site.owner)) for site in sites if not site.layer.is_quantized)
    return [
        f"the weight of {site.fqn} was quantized after it was adapted (a {type(site.weight).__name__} now): save the "
        "adapter, and load it into a model that is quantized first; or merge before you quantize"
        for site, kind in kinds
        if isinstance(kind, type) and kind.is_quantized
    ]


def _is_incomplete(site: AdaptedSite, weight: Tensor) -> bool:
    """Whether a weight has no values, or not all of them and not in a place that they can be merged into."""
    place = place_at(weight) if site.layer.is_quantized else site.place
    is_part = weight.dim() < 2 and whole_only_inside(weight) is not None  # as no weight that is adapted has
    return is_part or not place.is_complete or (isinstance(place, Whole) and not weight.numel())


def merge_notes(
    root: nn.Module, sites: Sequence[AdaptedSite], untried: Iterable[AdaptedSite], into: Into, *, reversible: bool
) -> Iterator[str]:
    """Yield notes on layers with their own forward, and on a config that no longer describes the model."""
    if own := [site.fqn for site in untried if site.layer.plain_forward() is not None]:
        yield (
            f"layers with their own forward, which could not be tried: {shortened(own)}; once merged, their output is "
            "the same as with the adapter only if the forward is linear in the weight: compare outputs"
        )
    becomes_plain = into.quantized == "dequantize" and any(site.layer.is_quantized for site in sites)
    is_called_quantized = getattr(getattr(root, "config", None), "quantization_config", None) is not None
    if becomes_plain and is_called_quantized and not reversible:
        yield (
            "the model's config still says that it is quantized, so files written by save_pretrained would not load: "
            "call randlora.files.save_merged(model, directory) before a merge, or merge the files with "
            "randlora.files.merge"
        )


def model_dtype(census: Census) -> torch.dtype | None:
    """Return the dtype of the inputs of linear layers: the dtype of norms, else of the first unquantized parameter."""
    own = [held for held in census.parameters if held.tensor.is_floating_point()]
    norms = [held for held in own if is_norm(held.module)]
    return next((held.tensor.dtype for held in (*norms, *own) if not is_quantized(held.module)), None)


def refuse_backward(root: nn.Module, args: object, output: Any) -> Any:  # noqa: ARG001  # a hook's signature
    """Return the output of a merged model such that ``backward()`` raises, but not `torch.autograd.grad`; a hook."""
    state = attached_state(root)
    if state is None or not torch.is_grad_enabled() or is_transformed():
        return None
    diagonals = [module._parameters for module in root.modules() if isinstance(module, Diagonal)]

    def are_trained(names: Iterable[str]) -> bool:
        parameters = (table.get(name) for name in names for table in diagonals)
        return any(parameter is not None and parameter.requires_grad for parameter in parameters)

    is_misused = are_trained(state.merged) and not are_trained(state.active_unmerged)
    return _guarded(output, always=root.training) if is_misused else None


def _guarded(output: Any, *, always: bool) -> Any:
    """Return an output whose tensors, ``always`` or if they require grad, depend on a leaf that refuses a gradient."""
    guard = partial(_guarded, always=always)
    if is_plain_tensor(output) and (output.requires_grad or always):
        leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        leaf.register_hook(_refuse)
        return output - leaf  # -0.0 + 0.0 would be 0.0
    if isinstance(output, MutableMapping):  # also a ModelOutput of transformers
        for key in [*output]:
            output[key] = guard(output[key])
    elif type(output) in (tuple, list):
        return type(output)(map(guard, output))
    elif isinstance(output, tuple) and (make := getattr(type(output), "_make", None)) is not None:  # a named tuple
        return make(map(guard, output))
    elif is_dataclass(output) and not isinstance(output, type):
        guarded = copy.copy(output)
        for each in fields(output):
            object.__setattr__(guarded, each.name, guard(getattr(output, each.name)))  # also of a frozen one
        return guarded
    return output


def _refuse(gradient: Tensor) -> None:  # noqa: ARG001  # a hook's signature
    raise MergeError(
        "cannot run backward through a model whose adapters are merged, because Λ and Γ would get no gradients: call "
        "randlora.unmerge(model) first, or end the `with randlora.merged(model)` block; to train only other "
        "parameters, call randlora.set_trainable(model, name, False)"
    )


def exchanged_weights(census: Census) -> list[ExchangedWeight]:
    """Return the parameters that a reversible merge exchanged."""
    return [
        ExchangedWeight(site.owner._parameters, site.layer, site.owner._parameters.get(site.layer.attribute))
        for site in census.adapted
        if site.layer.original is not None and site.layer.original.place is None
    ]


def replaced_problems(state: ModelState) -> list[str]:
    """Return a message if a model has the original values, as `state_dict` does, in place of merged weights."""
    lost = [
        next(iter(layer.adapters.values())).fqn
        for parameters, layer, merged in state.exchanged
        if (weight := parameters.get(layer.attribute)) is not merged and _is_original(layer, weight)
    ]
    problem = (
        "accelerate offloaded the model while its adapters were merged reversibly, and took the original weights of "
        f"{shortened(lost)}, without the updates: call accelerate.hooks.remove_hook_from_submodules(model), then "
        "randlora.unmerge(model)"
    )
    return [problem] if lost else []


def _is_original(layer: AdapterLayer, weight: Tensor | None) -> bool:
    if weight is None or weight.is_meta or layer.original is None or layer.is_quantized:
        return weight is not None and weight.is_meta
    own: Tensor = layer.original.values
    return type(weight.data) is Tensor and weight.shape == own.shape and torch.equal(weight, own.to(weight))


def require_merged_weights(root: nn.Module, args: object) -> None:  # noqa: ARG001  # a hook's signature
    """Raise a `MergeError` if a model has lost weights that adapters are merged into. Used as a forward pre-hook."""
    state = None if torch.compiler.is_compiling() else attached_state(root)
    raise_collected(MergeError, [] if state is None else replaced_problems(state), doing="run the model")


TOLERANCE = 0.02
"""How far a forward may differ from the product, as a share of it. Results in 16 bits are within a quarter of this."""

TOKENS = 2, 3  # the shape of the input that a forward is tried on, without its features


def differences_from_product(sites: Iterable[AdaptedSite]) -> dict[AdaptedSite, float | None]:
    """Return `difference_from_product` of each layer that an adapter adds to and whose forward is not its kind's."""
    own = [site for site in sites if site.layer.is_called and not site.layer.runs_plain_forward(site.owner)]
    # a forward that reads the weight from its attribute treats it the same after a merge
    return {site: difference_from_product(site) for site in own if not site.layer.is_read}


def product_problems(differences: Mapping[AdaptedSite, float | None]) -> list[str]:
    """Return messages about weights for which ``f(W + D)(x) - f(W)(x)`` is not ``x @ D.T``, which an adapter adds."""
    return [
        f"{site.fqn} has its own forward ({plain_class(site.owner).__name__}), which responds to a change of its "
        f"weight with an output that differs from what the adapter adds, by {difference:.0%} of it. Leave the adapter "
        "unmerged, or exclude the layer"
        for site, difference in differences.items()
        if difference is not None and difference > TOLERANCE
    ]


@torch.no_grad()
def difference_from_product(site: AdaptedSite) -> float | None:
    """Return how far the effect of a change of the weight differs from the product, as a share; ``None`` if untried."""
    owner, layer = site.owner, site.layer
    weight = layer.find_weight(owner)
    if weight is None or type(weight.data) is not Tensor or weight.is_meta or not weight.numel():
        return None
    if layer.is_quantized or not isinstance(site.place, Plain):  # a computed weight has no place
        return None
    generator, wide = torch.Generator("cpu").manual_seed(0), torch.promote_types(weight.dtype, torch.float32)
    out_features, in_features = layer.shape

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu").to(weight.device, wide)

    x = drawn(*TOKENS, in_features).to(weight.dtype)
    change = drawn(out_features, 1) * drawn(1, in_features)
    norm = torch.linalg.vector_norm(weight, dtype=wide)
    size = torch.where((norm > 0) & norm.isfinite(), norm, out_features**0.5)
    change *= size / torch.linalg.vector_norm(change)
    product = x.to(wide) @ change.T
    before = _output(site, x, weight)
    after = _output(site, x, rounded_sum(weight, layer.in_storage_layout(change)))
    if before is None or after is None or not before.shape == after.shape == product.shape:
        return None
    difference = after.to(wide) - before.to(wide) - product
    share = float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(product))
    return share if math.isfinite(share) else None


def _output(site: AdaptedSite, x: Tensor, weight: Tensor) -> Tensor | None:
    """Return what a forward returns if its module has a weight; ``None`` if it needs a different input or fails."""
    owner, layer = site.owner, site.layer
    forward: Callable[..., Any] = layer.own_forward or MethodType(plain_class(owner).forward, owner)
    with holding_copies(owner, [layer]):
        owner.eval()
        owner._parameters[layer.attribute] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        try:
            output = run_forward(owner, forward, x)
        except Exception:
            return None
    return output if isinstance(output, Tensor) else None

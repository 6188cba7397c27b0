"""The weights that a reversible merge put into a model, and whether the model still has them.

accelerate offloads what `state_dict` returns. While adapters are merged reversibly, these are the original weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from randlora.errors import MergeError, raise_collected
from randlora.layers.base import AdapterLayer
from randlora.state import ModelState, attached_state
from randlora.targets.census import Census
from randlora.targets.match import shortened


def exchanged_weights(census: Census) -> list[tuple[dict[str, Any], AdapterLayer, Any]]:
    """Return the parameters that are exchanged for merged ones; see `ModelState.merged_weights`."""
    merged = [site for site in census.adapted if site.layer.unmerged is not None and site.layer.unmerged.place is None]
    held = [(site.owner._parameters, site.layer) for site in merged]
    return [(parameters, layer, parameters.get(layer.attribute)) for parameters, layer in held]


def replaced_problems(state: ModelState) -> list[str]:
    """Return a message if a model has the original values in place of weights that adapters are merged into."""
    lost = [
        next(iter(layer.adapters.values())).fqn
        for held, layer, merged in state.merged_weights
        if held.get(layer.attribute) is not merged and _is_original(layer, held.get(layer.attribute))
    ]
    problem = (
        "accelerate offloaded the model while its adapters were merged reversibly, and took the original weights of "
        f"{shortened(lost)}, without the updates: call accelerate.hooks.remove_hook_from_submodules(model), then "
        "randlora.unmerge(model)"
    )
    return [problem] if lost else []


def _is_original(layer: AdapterLayer, weight: Tensor | None) -> bool:
    """Whether a parameter that is in the place of a merged one has the original values, or none."""
    if weight is None or weight.is_meta or layer.unmerged is None or layer.is_quantized:
        return weight is not None and weight.is_meta
    own: Tensor = layer.unmerged.values
    return type(weight.data) is Tensor and weight.shape == own.shape and torch.equal(weight, own.to(weight))


def require_merged_weights(root: nn.Module, args: object) -> None:  # noqa: ARG001  # a hook's signature
    """Raise a `MergeError` if a model has lost weights that adapters are merged into. Used as a forward pre-hook."""
    state = None if torch.compiler.is_compiling() else attached_state(root)
    raise_collected(MergeError, [] if state is None else replaced_problems(state), doing="run the model")

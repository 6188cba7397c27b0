"""Outside of a forward, a weight that is adapted and read is the base's parameter, which may be replaced."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import randlora
from randlora.errors import AdapterError
from tests.kit import same_bits
from tests.laws import assert_close
from tests.read_kinds import ReadKind, every_read_kind


@every_read_kind
def test_a_weight_that_is_read_can_be_assigned_and_is_the_base_of_the_update(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    owner, own = kind.owner(model), kind.weight(model)
    assert getattr(owner, kind.attribute) is own
    value = nn.Parameter(own.detach() * 2, requires_grad=False)
    setattr(owner, kind.attribute, value)
    assert getattr(owner, kind.attribute) is value
    with torch.no_grad():
        kind.weight(other).mul_(2)
    assert same_bits(kind.run(model), kind.run(other))
    randlora.eject(model)
    assert getattr(owner, kind.attribute) is value


@every_read_kind
def test_what_code_writes_into_a_weight_outside_of_a_forward_is_kept(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    getattr(kind.owner(model), kind.attribute).data.mul_(2)
    with torch.no_grad():
        kind.owner(other).get_parameter(kind.attribute).mul_(2)
    assert same_bits(kind.run(model), kind.run(other))


@every_read_kind
def test_loading_may_assign_weights(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    with torch.no_grad():
        kind.owner(other).get_parameter(kind.attribute).mul_(2)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert same_bits(kind.run(model), kind.run(other))
    assert kind.owner(model).get_parameter(kind.attribute).data_ptr() == state[kind.parameter_fqn].data_ptr()


REWRITES: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm-old": torch.nn.utils.weight_norm,
    "spectral_norm-old": torch.nn.utils.spectral_norm,
    "prune": prune.identity,
    "parametrize": lambda owner, name: parametrize.register_parametrization(owner, name, nn.Identity()),
}


@every_read_kind
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_a_weight_that_is_computed_since_is_an_error_of_the_forward_that_would_lose_the_update(
    kind: ReadKind, rewrite: Callable[[nn.Module, str], Any]
) -> None:
    if kind.place == "out_proj":
        pytest.skip("no forward of it runs: docs/limits.md")
    model = kind.adapted()
    rewrite(kind.owner(model), kind.attribute)
    with pytest.raises(AdapterError, match=rf"{kind.attribute} of an adapted \w+ is no parameter any more"):
        kind.run(model)


@every_read_kind
def test_a_parametrization_can_be_removed_again(kind: ReadKind) -> None:
    model = kind.adapted()
    before, owner = kind.run(model), kind.owner(model)
    parametrize.register_parametrization(owner, kind.attribute, nn.Identity())
    parametrize.remove_parametrizations(owner, kind.attribute)
    assert same_bits(kind.run(model), before)
    randlora.eject(model)


def test_a_merged_layer_can_be_fused() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)).eval()
    randlora.inject(model, r=3, targets=["0"])
    with torch.no_grad():
        for parameter in randlora.trainable_parameters(model):
            parameter.fill_(0.3)
    x = torch.randn(2, 8, 5)
    expected, merged = model(x), copy.deepcopy(model)
    randlora.merge(merged)
    assert_close(fusion.fuse_conv_bn_eval(*merged)(x), expected, torch.float32)

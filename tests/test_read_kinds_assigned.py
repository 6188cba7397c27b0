"""Replacing or removing a weight that is adapted and read is refused, by whatever code would do it."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import randlora
from randlora.errors import AdapterError
from tests.kit import all_bits, same_bits, untouched
from tests.read_kinds import ReadKind, every_read_kind, or_medium

EXPLAINED = r"cannot replace or resize .* of an adapted \w+: merge or eject its adapters first.*get_parameter"


@every_read_kind
def test_a_weight_that_is_read_cannot_be_assigned_or_deleted(kind: ReadKind) -> None:
    model = kind.adapted()
    owner, before = kind.owner(model), kind.run(model)
    value = nn.Parameter(getattr(owner, kind.attribute).detach().clone())
    with untouched(model), pytest.raises(AdapterError, match=EXPLAINED):
        setattr(owner, kind.attribute, value)
    with untouched(model), pytest.raises(AdapterError, match=EXPLAINED):
        setattr(owner, kind.attribute, None)
    with untouched(model), pytest.raises(AdapterError, match=EXPLAINED):
        delattr(owner, kind.attribute)
    assert same_bits(kind.run(model), before)
    setattr(owner, kind.attribute, kind.owner(model).get_parameter(kind.attribute))  # as in tying once more
    assert same_bits(kind.run(model), before)
    randlora.eject(model)
    setattr(owner, kind.attribute, value)
    assert getattr(owner, kind.attribute) is value


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
    "prune": lambda owner, name: prune.l1_unstructured(owner, name, 0.5),
    "parametrize": lambda owner, name: parametrize.register_parametrization(owner, name, nn.Identity()),
}


@every_read_kind
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("is_disabled", [False, or_medium(False, True)])
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_a_parametrization_of_an_adapted_weight_is_refused_before_anything_changes(
    kind: ReadKind, rewrite: Callable[[nn.Module, str], Any], *, is_disabled: bool
) -> None:
    model = kind.adapted()
    owner, before = kind.owner(model), kind.run(model)
    held, buffers, bits = list(owner.__dict__), dict(owner.named_buffers()), all_bits(model.state_dict())
    with randlora.disabled(model) if is_disabled else nullcontext(), pytest.raises(AdapterError, match=EXPLAINED):
        rewrite(owner, kind.attribute)
    assert (list(owner.__dict__), dict(owner.named_buffers())) == (held, buffers)
    assert not (*owner._forward_pre_hooks, *owner._state_dict_hooks)
    assert all_bits(model.state_dict()) == bits
    assert same_bits(kind.run(model), before)
    randlora.eject(model)
    kind.run(model)


def test_fusing_an_adapted_convolution_is_refused_and_works_once_merged() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)).eval()
    randlora.inject(model, r=3, targets=["0"])
    with torch.no_grad():
        for parameter in randlora.trainable_parameters(model):
            parameter.fill_(0.3)
    x = torch.randn(2, 8, 5)
    expected = model(x)
    with untouched(model), pytest.raises(AdapterError, match=EXPLAINED):
        fusion.fuse_conv_bn_eval(*model)
    merged = copy.deepcopy(model)
    randlora.merge(merged)
    torch.testing.assert_close(fusion.fuse_conv_bn_eval(*merged)(x), expected)

"""diffusers' ``fuse_qkv_projections()``: what is adapted is called, before it and after it, or it is said."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, TargetError
from tests.diffusion_models import flux, noise, patches, unet
from tests.kit import fill, same_bits, untouched

pytestmark = [pytest.mark.medium, pytest.mark.filterwarnings("ignore:.*gemm_4bit")]
every_model = pytest.mark.parametrize(("build", "draw"), [(flux, patches), (unet, noise)], ids=["flux", "unet"])
Build = Callable[[], Any]


def inputs(draw: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.manual_seed(0)
    return draw()


@every_model
def test_of_joined_projections_the_joined_are_adapted_and_a_single_one_is_refused(build: Build, draw: Any) -> None:
    model, given = build().eval(), inputs(draw)
    model.fuse_qkv_projections()
    refused = r"\.to_v \(Linear\) is not called, because \w+ calls to_qkv"
    with untouched(model), pytest.raises(TargetError, match=refused):
        randlora.inject(model, r=2, targets=["to_v"])
    report = randlora.inject(model, r=2)
    assert "to_qkv" in {fqn.rpartition(".")[2] for fqn in report.targets}
    left = [why for fqn, why in report.skipped.items() if fqn.endswith(".to_v")]
    assert any("calls to_qkv instead, so an adapter would have no effect" in why for why in left)
    output = fill(model)(**given).sample
    output.sum().backward()
    assert [name for name, value in model.named_parameters() if "lambda" in name and value.grad is None] == []
    with torch.no_grad(), randlora.merged(model):
        torch.testing.assert_close(model(**given).sample, output, rtol=1e-4, atol=1e-4)


@every_model
def test_joining_what_is_adapted_is_an_error_when_it_is_used_until_it_is_undone(build: Build, draw: Any) -> None:
    model, given = build().eval(), inputs(draw)
    before = hooks(model)
    randlora.inject(model, r=2)
    expected = fill(model)(**given).sample
    model.fuse_qkv_projections()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AdapterError, match=r"to_q is adapted and is not called, .* undo fuse_qkv_projections"):
            each(**given)
    model.unfuse_qkv_projections()
    assert same_bits(model(**given).sample, expected)
    randlora.eject(model)
    assert hooks(model) == before
    model.fuse_qkv_projections()
    model(**given)


def test_taking_apart_what_is_adapted_is_an_error_and_where_that_deletes_it_it_is_said() -> None:
    models: list[Any] = [unet().eval(), flux()]
    for model in models:
        model.fuse_qkv_projections()
        randlora.inject(model, r=2)
        model.unfuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"to_qkv is adapted and is not called, because Attention calls to_q, to_k"):
        models[0](**inputs(noise))
    with pytest.raises(AdapterError, match=r"to_qkv no longer has adapter 'default': the module was replaced"):
        [*randlora.trainable_parameters(models[1])]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())

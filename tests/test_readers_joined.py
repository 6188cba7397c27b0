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
def test_of_joined_projections_the_joined_are_adapted(build: Build, draw: Any) -> None:
    model, given = build().eval(), inputs(draw)
    model.fuse_qkv_projections()
    report = randlora.inject(model, r=2)
    named = {fqn.rpartition(".")[2] for fqn in report.targets}
    assert "to_qkv" in named
    left = [why for fqn, why in report.skipped.items() if fqn.endswith(".to_v")]
    assert any("calls to_qkv instead, so an adapter would have no effect" in why for why in left)
    output = fill(model)(**given).sample
    output.sum().backward()
    assert [name for name, value in model.named_parameters() if "lambda" in name and value.grad is None] == []
    with torch.no_grad(), randlora.merged(model):
        torch.testing.assert_close(model(**given).sample, output, rtol=1e-4, atol=1e-4)


@every_model
def test_a_single_one_that_is_named_is_an_error(build: Build, draw: Any) -> None:
    model = build()
    model(**inputs(draw))
    model.fuse_qkv_projections()
    with (
        untouched(model),
        pytest.raises(TargetError, match=r"\.to_v \(Linear\) is not called, because \w+ calls to_qkv"),
    ):
        randlora.inject(model, r=2, targets=["to_v"])


@every_model
def test_joining_what_is_adapted_is_an_error_when_it_is_used_until_it_is_undone(build: Build, draw: Any) -> None:
    model, given = build().eval(), inputs(draw)
    randlora.inject(model, r=2)
    expected = fill(model)(**given).sample
    model.fuse_qkv_projections()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AdapterError, match=r"to_q is adapted and is not called, .* undo fuse_qkv_projections"):
            each(**given)
    model.unfuse_qkv_projections()
    assert same_bits(model(**given).sample, expected)


def test_taking_apart_what_is_adapted_is_an_error_of_an_older_attention_which_keeps_it() -> None:
    model: Any = unet().eval()
    given = inputs(noise)
    model.fuse_qkv_projections()
    randlora.inject(model, r=2)
    model.unfuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"to_qkv is adapted and is not called, because Attention calls to_q, to_k"):
        model(**given)


def test_taking_apart_what_is_adapted_deletes_it_which_is_said() -> None:
    model: Any = flux()
    model.fuse_qkv_projections()
    randlora.inject(model, r=2)
    model.unfuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"to_qkv no longer has adapter 'default': the module was replaced"):
        [*randlora.trainable_parameters(model)]


@every_model
def test_what_is_ejected_may_be_joined(build: Build, draw: Any) -> None:
    model = build()
    before = hooks(model)
    randlora.inject(model, r=2)
    randlora.eject(model)
    assert hooks(model) == before
    model.fuse_qkv_projections()
    model(**inputs(draw))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())

"""bitsandbytes layers that an evaluation on a CPU repacked: gradients pass them, and they merge."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import randlora
from randlora.layers import bnb_codes
from tests.codes import written_out
from tests.laws import assert_close, same_bits
from tests.quantized import needs_repacking
from tests.test_layers_bnb import adapted, four_bits


@needs_repacking
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
def test_gradients_pass_a_layer_that_an_evaluation_repacked(nested: bool) -> None:
    """A layer of bitsandbytes alone leads none, and torch warns of it."""
    model, layer = adapted(four_bits(bias=False, compress_statistics=nested))
    x = torch.randn(5, 64, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), x)[0]
    model.eval()
    model(x.detach())
    model.train()
    assert layer.weight.quant_state.packing_format_for_cpu
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        layer.base_layer(x).sum().backward()
    assert x.grad is None
    for is_training in (True, False):
        found = torch.autograd.grad(model.train(is_training)(x).square().sum(), x)[0]
        assert_close(found, wanted, torch.bfloat16)  # the scales are rounded to it


@needs_repacking
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
def test_a_layer_that_an_evaluation_repacked_merges(nested: bool, quantized: Any) -> None:
    model, layer = adapted(four_bits(compress_statistics=nested))
    x = torch.randn(5, 64)
    wanted = layer.base_layer(x) + x @ layer.delta_weight({"default": 1.0}).T
    model.eval()(x)
    packed, state = layer.weight.data.clone(), layer.weight.quant_state
    with randlora.merged(model, quantized=quantized) as report:
        found = model(x)
    assert report is not None
    allowed = 64 * x.abs().max() * report.errors["0"].step if quantized == "requantize" else 0.02
    assert (found - wanted).abs().max() <= allowed
    assert same_bits(layer.weight.data, packed)
    assert layer.weight.quant_state is state
    randlora.merge(model)
    assert model[0].weight.quant_state.nested == nested


@needs_repacking
def test_scales_that_a_state_dict_left_turned_are_read_right() -> None:
    model, layer = adapted(four_bits(compress_statistics=False))
    wanted = bnb_codes.write_out_4bit(layer.weight.data, layer.weight.quant_state)
    model.eval()(torch.randn(5, 64))
    model.state_dict()
    state = layer.weight.quant_state
    if state.absmax.ndim == 1:
        pytest.skip("this bitsandbytes turns them back")
    found = bnb_codes.write_out_4bit(layer.weight.data, state)
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=0)  # the scales were rounded to bfloat16


@needs_repacking
def test_scales_that_a_state_dict_left_turned_are_turned_back_before_the_layer_runs() -> None:
    """A layer of bitsandbytes alone misreads them."""
    model, layer = adapted(four_bits(256, bias=False, compress_statistics=False))
    x = torch.randn(5, 256)
    expected, fresh = model(x), layer.base_layer(x)
    for is_training in (True, False):
        with torch.no_grad():
            model.eval()(x)
        model.state_dict()
        if layer.weight.quant_state.absmax.ndim == 1:
            pytest.skip("this bitsandbytes turns them back")
        assert_close(model.train(is_training)(x), expected, torch.bfloat16)
        with randlora.disabled(model):
            assert_close(model(x), fresh, torch.bfloat16)


@needs_repacking
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_new_codes_of_a_repacked_layer_are_stored_as_its_own_were(storage: torch.dtype) -> None:
    model, layer = adapted(four_bits(quant_storage=storage))
    model.eval()(torch.randn(5, 64))
    assert layer.weight.quant_state.packing_format_for_cpu
    randlora.merge(model)
    assert model[0].weight.dtype == storage


@pytest.mark.parametrize("is_training", [True, False])
def test_transforms_pass_a_layer_that_an_evaluation_may_have_repacked(is_training: bool) -> None:
    """A layer of bitsandbytes alone passes no gradient transform."""
    model, _ = adapted(four_bits(bias=False))
    x = torch.randn(5, 64, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), x)[0]
    model.eval()(x.detach())
    model.train(is_training)
    found = torch.func.grad(lambda x: model(x).square().sum())(x.detach())
    assert_close(found, wanted, torch.bfloat16)
    assert_close(torch.func.vmap(model)(x.detach()), model(x), torch.float32)


def _with_dropout(model: Any) -> None:
    model[0].adapters["default"].config = replace(model[0].adapters["default"].config, dropout=1e-9)


def _with_hook(model: Any) -> None:
    model[0].base_layer.register_forward_hook(lambda _module, _args, output: output)


@needs_repacking
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("change", [_with_dropout, _with_hook])
def test_gradients_pass_a_repacked_layer_whose_own_forward_runs(change: Callable[[Any], None], nested: bool) -> None:
    model, _ = adapted(four_bits(bias=False, compress_statistics=nested))
    change(model)
    x = torch.randn(5, 64, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), x)[0]
    for is_training in (True, False):
        model.eval()(x.detach())
        found = torch.autograd.grad(model.train(is_training)(x).square().sum(), x)[0]
        assert_close(found, wanted, torch.bfloat16)


@needs_repacking
@pytest.mark.parametrize("in_features", [64, 128])
def test_an_evaluation_before_backward_changes_no_gradient(in_features: int) -> None:
    """It repacks the codes that backward reads; a layer of bitsandbytes alone gets that wrong."""
    model, _ = adapted(four_bits(in_features, bias=False))
    x = torch.randn(5, in_features, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), x)[0]
    loss = model(x).square().sum()
    with torch.no_grad():
        model.eval()(torch.randn(3, in_features))
    assert same_bits(torch.autograd.grad(loss, x)[0], wanted)


@needs_repacking
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
def test_training_puts_codes_back_in_order(nested: bool) -> None:
    model, layer = adapted(four_bits(128, compress_statistics=nested))
    codes, wanted = layer.weight.data.clone(), written_out(layer.base_layer)
    model.eval()(torch.randn(5, 128))
    model.train()(torch.randn(5, 128))
    assert same_bits(layer.weight.data, codes)
    assert layer.weight.quant_state.nested == nested
    torch.testing.assert_close(written_out(layer.base_layer), wanted, rtol=0.01, atol=0)


@needs_repacking
def test_evaluation_leaves_codes_repacked() -> None:
    model, layer = adapted(four_bits())
    model.eval()
    for _ in range(2):
        model(torch.randn(5, 64))
        assert layer.weight.quant_state.packing_format_for_cpu
    seen = layer.weight.data
    model(torch.randn(5, 64))
    assert layer.weight.data_ptr() == seen.data_ptr()


@needs_repacking
def test_codes_put_in_order_in_inference_mode_can_be_trained_on() -> None:
    model, layer = adapted(four_bits(bias=False))
    x = torch.randn(5, 64, requires_grad=True)
    model.eval()(x.detach())
    with torch.inference_mode():
        model.train()(x.detach())
    assert not layer.weight.data.is_inference()
    assert not layer.weight.quant_state.absmax.is_inference()
    layer.base_layer(model(x)[:, :64]).sum().backward()
    assert x.grad is not None

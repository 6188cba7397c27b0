"""bitsandbytes layers that an evaluation on a CPU repacked: gradients pass them, and they merge."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.layers import in_place
from randlora.quantized import bnb
from randlora.quantized.bnb import MAY_REPACK
from tests.codes import written_out
from tests.kit import same_bits
from tests.laws import adapter_layer, assert_close, plain, update_of
from tests.quantized import needs_repacking
from tests.test_quantized_layers import adapted, four_bits

pytestmark = needs_repacking

every_nesting = pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])


def repack(layer: Any) -> None:
    """Let bitsandbytes repack a layer's codes, as a forward pass of it alone or a state dict may bring them."""
    twin: Any = plain(layer).eval()
    twin.__dict__[MAY_REPACK] = True
    with torch.no_grad():
        twin(torch.randn(5, layer.in_features))
    layer.weight, layer.quant_state = twin.weight, twin.weight.quant_state
    assert layer.weight.quant_state.packing_format_for_cpu


def turn(layer: Any) -> None:
    """Leave the scales as bitsandbytes leaves them when it saves what it had repacked."""
    repack(layer)
    nn.Linear.eval(layer)
    layer.state_dict()
    if layer.weight.quant_state.absmax.ndim == 1:
        pytest.skip("this bitsandbytes turns them back")


def held(layer: Any) -> list[object]:
    weight, state = layer.weight, layer.weight.quant_state
    return [weight, state, state.packing_format_for_cpu, weight.data.clone(), state.absmax.clone()]


def assert_held(layer: Any, before: list[object]) -> None:
    for found, expected in zip(held(layer), before, strict=True):
        assert same_bits(found, expected) if type(found) is Tensor else found is expected  # type: ignore[arg-type]


def input_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(layer(x).square().sum(), x)[0]


@every_nesting
def test_codes_are_put_in_order_when_the_adapter_comes_and_kept_so(nested: bool) -> None:
    layer = four_bits(compress_statistics=nested)
    wanted = written_out(layer)
    layer.eval()(torch.randn(5, 64))
    assert layer.weight.quant_state.packing_format_for_cpu
    with torch.inference_mode():
        model, layer = adapted(layer)
    assert not layer.weight.quant_state.packing_format_for_cpu
    assert layer.weight.quant_state.nested == nested
    torch.testing.assert_close(written_out(layer), wanted, rtol=0.01, atol=0)
    before = held(layer)
    for is_training in (False, True, False):
        model.train(is_training)(torch.randn(5, 64))
        assert_held(layer, before)
    for each in (model.train(), plain(layer)):  # though put in order in inference mode
        input_gradient(each, torch.randn(5, 64, requires_grad=True))


@pytest.mark.parametrize(
    ("is_allowed", "is_prepared", "ending"),
    [(True, False, randlora.eject), (True, True, randlora.eject), (False, False, randlora.merge)],
)
def test_bitsandbytes_may_repack_again_once_the_adapters_are_gone(
    is_allowed: bool, is_prepared: bool, ending: Callable[[Any], Any]
) -> None:
    base = four_bits()
    base.__dict__[MAY_REPACK] = is_allowed
    model, layer = adapted(base)
    if is_prepared:
        randlora.prepare_quantized(model)
    assert not vars(layer)[MAY_REPACK]
    with randlora.merged(model, quantized="dequantize"):
        assert MAY_REPACK not in vars(layer)
    assert not vars(layer)[MAY_REPACK]
    ending(model)
    assert vars(layer)[MAY_REPACK] == (is_allowed and not is_prepared)


@pytest.mark.parametrize(("nested", "quantized"), [(True, "requantize"), (False, "requantize"), (False, "dequantize")])
def test_a_repacked_layer_merges_and_comes_back(nested: bool, quantized: Any) -> None:
    model, layer = adapted(four_bits(compress_statistics=nested))
    x = torch.randn(5, 64)
    wanted = plain(layer)(x) + x @ update_of(layer).T
    repack(layer)
    before = held(layer)
    with randlora.merged(model.eval(), quantized=quantized) as report:
        found = model(x)
    allowed = 64 * x.abs().max() * report.rounding["0"].step if quantized == "requantize" else 0.02
    assert (found - wanted).abs().max() <= allowed
    assert_held(layer, before)
    randlora.merge(model)
    assert model[0].weight.quant_state.nested == nested


def test_a_layer_computes_right_with_scales_that_a_state_dict_left_turned() -> None:
    """A layer of bitsandbytes alone misreads them."""
    model, layer = adapted(four_bits(256, bias=False, compress_statistics=False))
    x = torch.randn(5, 256)
    expected, base, weight = model(x), plain(layer)(x), written_out(layer)
    turn(layer)
    before = held(layer)
    for is_training in (True, False):
        assert_close(model.train(is_training)(x), expected, torch.bfloat16)
        with randlora.disabled(model):
            assert_close(model(x), base, torch.bfloat16)
    assert_held(layer, before)
    found = bnb.write_out_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(found.double(), weight, rtol=2**-8, atol=0)  # the scales were rounded to bfloat16


def _nothing(layer: Any) -> None:
    """Leave it to the adapter to multiply."""


def _with_dropout(layer: Any) -> None:
    adapter = adapter_layer(layer).adapters["default"].adapter
    adapter.config = replace(adapter.config, dropout=1e-9)


def _with_a_forward_of_its_own(layer: Any) -> None:
    own = layer.randlora_base
    layer.__class__ = own
    subclass = type("Own", (own,), {"forward": lambda self, x: own.forward(self, 2 * x)})
    layer.__class__ = in_place.adapted_class(subclass, (), in_place.Adapted)


@every_nesting
@pytest.mark.parametrize("change", [_nothing, _with_dropout, _with_a_forward_of_its_own])
def test_gradients_and_transforms_pass_a_layer_that_is_repacked(change: Callable[[Any], None], nested: bool) -> None:
    """A layer of bitsandbytes alone leads none, and torch warns of it."""
    model, layer = adapted(four_bits(bias=False, compress_statistics=nested))
    change(layer)
    x = torch.randn(5, 64, requires_grad=True)
    wanted = input_gradient(model, x)
    repack(layer)
    before = held(layer)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        plain(layer)(x).sum().backward()
    assert x.grad is None
    for is_training in (True, False):
        assert_close(input_gradient(model.train(is_training), x), wanted, torch.bfloat16)  # the scales are rounded
        if change is _nothing:
            found = torch.func.grad(lambda x: model(x).square().sum())(x.detach())
            assert_close(found, wanted, torch.bfloat16)
            assert_close(torch.func.vmap(model)(x.detach()), model(x), torch.float32)
    assert_held(layer, before)


def test_codes_repacked_before_backward_change_no_gradient() -> None:
    """Backward reads the codes again; a layer of bitsandbytes alone gets that wrong."""
    model, layer = adapted(four_bits(bias=False))
    x = torch.randn(5, 64, requires_grad=True)
    wanted = input_gradient(model, x)
    loss = model(x).square().sum()
    layer.__dict__[MAY_REPACK] = True
    with torch.no_grad():
        model.eval()(torch.randn(3, 64))
    assert layer.weight.quant_state.packing_format_for_cpu
    assert same_bits(torch.autograd.grad(loss, x)[0], wanted)

"""bitsandbytes' layers: what their codes mean; what is refused; what a forward keeps and changes."""

import copy
import gc
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any
from unittest.mock import Mock

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearNF4, Params4bit
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, RandLoRAError, TargetError
from randlora.quantized import bnb
from randlora.quantized.bnb import MAY_REPACK
from tests.codes import assert_rounded_to_nearest, step, written_out
from tests.kit import adapt, same_bits
from tests.laws import adapter_layer, assert_close, plain, update_of
from tests.layer_kinds import BITSANDBYTES, LayerKind, every_quantized_kind
from tests.quantized import needs_repacking, of_4_bits

every_nesting = pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])


def four_bits(in_features: int = 64, out_features: int = 96, **options: Any) -> Any:
    return of_4_bits(in_features, out_features, repacks=True, **options)


def eight_bits(**options: Any) -> Any:
    return Linear8bitLt(64, 96, **{"has_fp16_weights": False, **options})


def adapted(base: nn.Module, r: int = 8, **options: Any) -> tuple[Any, Any]:
    model = nn.Sequential(base)
    return adapt(model, **{"r": r, "alpha": 4, "targets": "all-linear", **options}), model[0]


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    quant_type=st.sampled_from(bnb.QUANT_TYPES),
    blocksize=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    storage=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)
def test_4_bit_codes_are_written_out_as_their_tables_say_and_rounded_to_the_nearest_level(
    shape: tuple[int, int], quant_type: str, blocksize: int, nested: bool, storage: torch.dtype
) -> None:
    assume(shape[0] * shape[1] % 8 == 0 or storage == torch.uint8)
    dtype = torch.bfloat16 if nested else torch.float32
    options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": quant_type}
    layer: Any = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.float32)
    block = torch.arange(shape[0] * shape[1]).view(shape) // blocksize
    weight = torch.randn(shape) * 16.0 ** (block % 2)  # so that a code read with the scale of the next block is another
    layer.weight = Params4bit(weight.to(dtype), quant_storage=storage, **options)
    layer.to("cpu")
    codes, state = layer.weight.data, layer.weight.quant_state
    found, expected = bnb.write_out_4bit(codes, state), written_out(layer)
    is_misread = not torch.allclose(found.double(), expected, rtol=2e-2 if nested else 1e-5, atol=1e-6)
    assert bnb.is_misread(codes, state) == is_misread
    assert not is_misread or shape[1] % blocksize  # rows that blocks divide are always read right
    for other in (torch.float64, torch.bfloat16):
        assert same_bits(bnb.write_out_4bit(codes, state, other), found.to(other))
    weight = torch.randn(shape) * 9
    codes, state = bnb.round_to_4bit(weight, state, storage)
    layer.weight = Params4bit(codes, quant_state=state, bnb_quantized=True)
    assert_rounded_to_nearest(layer, weight)
    assert bnb.step_4bit(state) == pytest.approx(step(layer).max().item(), rel=1e-5)
    assert (codes.dtype, state.blocksize, state.quant_type, state.dtype) == (storage, blocksize, quant_type, dtype)


def with_state(**changed: Any) -> Any:
    layer = four_bits()
    vars(layer.weight.quant_state).update(changed)
    return layer


REFUSED: list[tuple[Callable[[], Any], str | None, str]] = [
    (lambda: Linear4bit(64, 96), "0.50", "0 is not quantized yet: move the model to its device first"),
    (eight_bits, "0.50", "0 is not quantized yet"),
    (lambda: Linear4bit(64, 96, device="meta"), "0.50", r"0 has no values \(its weight is on the meta device or off"),
    (lambda: eight_bits(device="meta"), "0.50", "0 has no values"),
    (lambda: eight_bits(has_fp16_weights=True), "0.50", r"0 has 16-bit weights .*has_fp16_weights=True"),
    (lambda: with_state(quant_type="af4"), "0.50", r"0 has codes of type 'af4', expected one of nf4, fp4"),
    (lambda: with_state(shape=torch.Size((64, 96))), "0.50", r"0 was quantized as \(64, 96\), .* = \(96, 64\)"),
    (lambda: four_bits(48, bias=False), "0.50", r"0 has rows of 48 entries and blocks of 64, .* incorrectly"),
    (four_bits, "0.45.5", r"0 needs bitsandbytes 0\.50 or newer, found 0\.45\.5: python -m pip install --upgrade bit"),
    (lambda: eight_bits().to("cpu"), "0.45.5", r"0 needs bitsandbytes 0\.50"),
    (four_bits, None, r"0 needs bitsandbytes, which is not installed: python -m pip install .*\[bnb\]"),
    (lambda: eight_bits().to("cpu"), None, "0 needs bitsandbytes, which is not installed"),
]


@pytest.mark.parametrize(("build", "version", "said"), REFUSED)
def test_what_cannot_be_adapted_is_refused_with_its_name_and_a_remedy(
    build: Callable[[], Any], version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = build()
    if "incorrectly" in said and torch.allclose(layer(torch.eye(48)).T.double(), written_out(layer), atol=1e-6):
        pytest.skip("this bitsandbytes reads them right")
    monkeypatch.setattr(
        bnb, "version", Mock(return_value=version, side_effect=None if version else PackageNotFoundError)
    )
    monkeypatch.setattr(bnb, "missing", bnb.missing.__wrapped__)
    model, kind, held = nn.Sequential(layer), type(layer), dict(layer.named_parameters())
    with pytest.raises(TargetError, match=said):  # of some there is no state dict to compare
        randlora.inject(model, r=4, targets=["0"])
    assert (model[0] is layer, type(layer) is kind, dict(layer.named_parameters()) == held) == (True, True, True)


@pytest.mark.parametrize(
    ("owner", "name"), [(bitsandbytes, "matmul_4bit"), (Linear4bit, "forward")], ids=["kernel", "forward"]
)
def test_own_forwards_run_in_evaluation_and_if_replaced(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LinearNF4): ...  # type: ignore[misc]

    model, layer = adapted(Own(64, 96, compute_dtype=torch.float32, bias=False).to("cpu"))
    assert type(adapter_layer(layer)).__name__ == "Linear4bitAdapter"
    own, x = getattr(owner, name), torch.randn(5, 64)
    expected = 2 * plain(layer)(x) + x @ update_of(layer).T
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 2 * own(*args, **kwargs))
    assert_close(model.train(name == "forward")(x), expected, torch.float32)


FULL, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("dtype", "given"), [(FULL, BRAIN), (BRAIN, FULL), (HALF, HALF), (None, BRAIN)])
def test_the_output_has_the_dtype_of_the_input_not_of_the_layer(dtype: torch.dtype | None, given: torch.dtype) -> None:
    model, layer = adapted(four_bits(compute_dtype=dtype))
    x, fresh = torch.randn(5, 64).to(given), copy.deepcopy(model)
    nn.init.zeros_(fresh[0].randlora_lambda["default"])
    own = plain(layer)(x)
    assert same_bits(fresh(x), own)
    output, computed = layer(x), dtype or given
    assert output.dtype == own.dtype == given
    assert layer.compute_dtype == computed
    coarse = max((computed, given), key=lambda each: torch.finfo(each).eps)
    assert_close(output, own.double() + x.double() @ update_of(layer).double().T, coarse)
    assert layer(x.float()).dtype == torch.float32
    assert layer.compute_dtype == computed


@pytest.mark.parametrize("name", ["NF4-double", "8bit-outliers"])
def test_nothing_as_large_as_the_weight_stays_between_forward_and_backward(name: str) -> None:
    (kind,) = (kind for kind in BITSANDBYTES if kind.name == name)
    _, layer = adapted(kind.build(256, 192, False, torch.float32), r=7)  # bases of other shapes
    x = torch.randn(4, 256, requires_grad=True)
    output = layer(x)
    alive = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    shapes = {found.shape for found in alive if found.is_floating_point()}
    assert not shapes & {(192, 256), (256, 192)}
    output.sum().backward()
    assert x.grad is not None


TOLD = "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "has_fp16_weights"


@every_quantized_kind
def test_a_trained_bias_keeps_its_dtype_whatever_runs_and_new_codes_are_held_as_the_old_ones(kind: LayerKind) -> None:
    """A layer of bitsandbytes alone casts its bias in place, under the optimizer's feet."""
    base, x = kind.build(24, 20, True, torch.bfloat16), torch.randn(5, 24).bfloat16()
    dtype = torch.float32 if kind.library == "bitsandbytes" else torch.bfloat16  # others take none of another dtype
    base.bias = own = nn.Parameter(torch.randn(20).to(dtype))
    plain_bias, held = own.detach().clone(), dict(vars(base.weight))
    model, layer = adapted(base, 4, train_also=["0.bias"])
    bias, kept_as = layer.bias.detach().clone(), type(layer.weight)  # which bfloat16 would round
    expected = x.double() @ (kind.weight(base) + update_of(layer)).T + bias
    for is_training in (True, False):
        output = model.train(is_training)(x)
        assert (output - expected).abs().max() <= 0.05 * expected.abs().max()  # 8 bits round their inputs too
        output.sum().backward()
        assert layer.bias.grad.dtype == torch.float32
        assert same_bits(layer.bias.detach(), bias)
    for block in (randlora.disabled, randlora.merged):
        with block(model):
            model(x)
            found = vars(layer.weight)
    assert {name: found[name] for name in TOLD if name in held} == {name: held[name] for name in TOLD if name in held}
    assert found.get("module") is (layer if "module" in held else None)
    assert type(layer.weight) is kept_as
    assert same_bits(layer.bias.detach(), bias)
    randlora.eject(model)
    assert layer.bias is own
    assert same_bits(own.detach(), plain_bias)


# What an evaluation on a CPU repacks is refused, and adapted layers are kept from it


@pytest.mark.parametrize(("way", "storage"), [("requantize", torch.bfloat16), ("dequantize", torch.uint8)])
def test_a_weight_that_lost_its_state_to_the_layer_merges_and_comes_back(way: Any, storage: torch.dtype) -> None:
    """As ``load_state_dict(assign=True)`` and sharding leave it, which wants codes in another dtype."""
    model, layer = adapted(four_bits(quant_storage=storage))
    x = torch.randn(5, 64, requires_grad=True)
    expected = model(x)
    assert_close(expected, plain(layer)(x) + x @ update_of(layer).T, torch.float32)
    model.load_state_dict(model.state_dict(), assign=True, strict=False)
    held = layer.weight, layer.quant_state
    assert not hasattr(held[0], "quant_state")
    with randlora.merged(model, quantized=way):
        merged = model(x)
        assert layer.weight.dtype == (storage if way == "requantize" else torch.float32)
    assert (merged - expected).abs().max() < 0.3 * expected.abs().max()
    assert (layer.weight is held[0], layer.quant_state is held[1]) == (True, True)
    assert same_bits(model(x), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@every_nesting
def test_what_bitsandbytes_repacks_is_known_by_its_private_names_and_refused(
    storage: torch.dtype, nested: bool
) -> None:
    """On every CPU, because packing itself is plain torch. See randlora/quantized/bnb.py."""
    layer = of_4_bits(64, 32, bias=False, compress_statistics=nested, quant_storage=storage)
    assert hasattr(layer, MAY_REPACK)
    weight: Any = layer.weight
    assert not bnb.is_repacked(weight.quant_state)
    weight.data, layer.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert bnb.is_repacked(weight.quant_state)
    model = nn.Sequential(layer)
    for refused in (lambda: randlora.inject(model, r=4, targets=["0"]), lambda: randlora.prepare_quantized(model)):
        with pytest.raises(RandLoRAError, match=r"0 was repacked by bitsandbytes .* again, from files .* saved before"):
            refused()
    with pytest.raises(RandLoRAError, match="was repacked"):
        bnb.write_out_4bit(weight.data, layer.quant_state)
    layer.state_dict()  # which leaves scales transposed, in files too, unless they are quantized
    assert bnb.is_repacked(weight.quant_state) is not nested


@needs_repacking
@every_nesting
@pytest.mark.parametrize(
    ("is_allowed", "is_prepared", "ending"),
    [(True, False, randlora.eject), (True, True, randlora.eject), (False, False, randlora.merge)],
)
def test_codes_stay_in_order_while_there_is_an_adapter(
    is_allowed: bool, is_prepared: bool, ending: Callable[[Any], Any], nested: bool
) -> None:
    layer = four_bits(compress_statistics=nested)
    layer.__dict__[MAY_REPACK] = is_allowed
    wanted = written_out(layer)
    with torch.inference_mode():
        model, layer = adapted(layer)
    if is_prepared:
        randlora.prepare_quantized(model)
    for is_training in (False, True, False):
        x = torch.randn(5, 64, requires_grad=True)
        assert torch.autograd.grad(model.train(is_training)(x).sum(), x)[0].any()
        with torch.no_grad():
            model(x)
        assert not bnb.is_repacked(layer.weight.quant_state)
    assert torch.equal(written_out(layer), wanted)
    with randlora.merged(model, quantized="dequantize"):
        assert MAY_REPACK not in vars(layer)
    assert not vars(layer)[MAY_REPACK]
    ending(model)
    assert vars(layer)[MAY_REPACK] == (is_allowed and not is_prepared)


@needs_repacking
@every_nesting
def test_codes_that_are_repacked_under_an_adapter_give_an_error_and_never_other_numbers(nested: bool) -> None:
    """A layer of bitsandbytes alone leads no gradients, and misreads scales that its state dict has turned."""
    model, layer = adapted(four_bits(256, bias=False, compress_statistics=nested))
    x = torch.randn(5, 256, requires_grad=True)
    output = model(x)
    loss, wanted = output.square().sum(), torch.autograd.grad(model(x).square().sum(), x)[0]
    layer.__dict__[MAY_REPACK] = True
    with torch.no_grad():
        model.eval()(torch.randn(3, 256))
    assert same_bits(torch.autograd.grad(loss, x)[0], wanted)
    for is_training in (True, False):
        for refused in (lambda: model(x), lambda: model(x.detach()), lambda: randlora.merge(model)):
            model.train(is_training)
            with pytest.raises(AdapterError, match="the weight of an adapted Linear4bit was repacked"):
                refused()
    layer.state_dict()  # which puts codes in order, and leaves scales that are not quantized turned
    if layer.weight.quant_state.absmax.ndim == 2:
        with pytest.raises(AdapterError, match="was repacked"):
            model(x)
    else:
        assert_close(model(x), output, torch.bfloat16)  # the scales were rounded

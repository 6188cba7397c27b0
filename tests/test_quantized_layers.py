"""bitsandbytes' layers: what their codes mean, what is refused, and what a forward of theirs keeps and changes."""

import copy
import gc
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearNF4, Params4bit
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora.errors import TargetError
from randlora.quantized import bnb
from tests.codes import assert_rounded_to_nearest, step, written_out
from tests.kit import fill, same_bits, untouched
from tests.laws import adapter_layer, assert_close, plain, update_of
from tests.layer_kinds import BITSANDBYTES, LayerKind, every_quantized_kind
from tests.quantized import of_4_bits

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
coded = given(
    shape=shapes,
    quant_type=st.sampled_from(bnb.QUANT_TYPES),
    blocksize=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    storage=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)


def quantized(weight: Tensor, quant_type: str, blocksize: int, nested: bool, storage: torch.dtype) -> Linear4bit:
    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32)
    layer.weight = Params4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    layer.to("cpu")
    return layer


def four_bits(in_features: int = 64, out_features: int = 96, **options: Any) -> Any:
    return of_4_bits(in_features, out_features, repacks=True, **options)


def adapted(base: nn.Module, r: int = 8) -> tuple[Any, Any]:
    model = nn.Sequential(base)
    randlora.inject(model, r=r, alpha=4, targets="all-linear")
    fill(model)
    return model, model[0]


@coded
def test_4_bit_codes_are_written_out_as_their_tables_say(
    shape: tuple[int, int], quant_type: str, blocksize: int, nested: bool, storage: torch.dtype
) -> None:
    assume(shape[0] * shape[1] % 8 == 0 or storage == torch.uint8)
    layer = quantized(torch.randn(shape), quant_type, blocksize, nested, storage)
    codes, state = layer.weight.data, layer.weight.quant_state
    found, expected = bnb.write_out_4bit(codes, state), written_out(layer)
    is_misread = not torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert bnb.is_misread(codes, state) == is_misread
    assert not is_misread or shape[1] % blocksize  # rows that blocks divide are always read right
    for dtype in (torch.float64, torch.bfloat16):
        assert same_bits(bnb.write_out_4bit(codes, state, dtype), found.to(dtype))


@coded
def test_4_bit_rounding_goes_to_the_nearest_level(
    shape: tuple[int, int], quant_type: str, blocksize: int, nested: bool, storage: torch.dtype
) -> None:
    assume(shape[0] * shape[1] % 8 == 0 or storage == torch.uint8)
    dtype, weight = torch.bfloat16 if nested else torch.float32, torch.randn(shape) * 9
    layer = quantized(torch.randn(shape, dtype=dtype), quant_type, blocksize, nested, storage)
    codes, state = bnb.round_to_4bit(weight, layer.weight.quant_state, storage)
    layer.weight = Params4bit(codes, quant_state=state, bnb_quantized=True)
    assert_rounded_to_nearest(layer, weight)
    assert bnb.step_4bit(state) == pytest.approx(step(layer).max().item(), rel=1e-5)
    assert (codes.dtype, state.blocksize, state.quant_type, state.dtype) == (storage, blocksize, quant_type, dtype)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_what_bitsandbytes_repacks_has_the_private_names_that_are_read_here(storage: torch.dtype, nested: bool) -> None:
    """On every CPU, because packing itself is plain torch. See randlora/quantized/bnb.py."""
    layer = quantized(torch.randn(32, 64), "nf4", 64, nested, storage)
    assert hasattr(layer, bnb.MAY_REPACK)
    codes, state, wanted = layer.weight.data.clone(), layer.weight.quant_state, written_out(layer)
    assert bnb.quantization(state, storage) == (nested, torch.float32, storage)
    layer.weight.data, layer.quant_state = functional._convert_weight_packed_for_cpu(layer.weight.data, state)
    assert state.packing_format_for_cpu
    assert bnb.is_out_of_order(state)
    assert not bnb.is_out_of_order(state, repacked=False)
    assert bnb.quantization(state, torch.uint8) == (nested, torch.float32, storage)
    found = bnb.write_out_4bit(layer.weight.data, state)
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=0)  # the scales are rounded
    bnb.restore_order(layer.weight, state)
    assert torch.equal(layer.weight.data.view(torch.uint8), codes.view(torch.uint8))
    assert not bnb.is_out_of_order(state)
    torch.testing.assert_close(written_out(layer), wanted, rtol=0.01, atol=0)


NOT_YET = "0 is not quantized yet: move the model to its device first"
NO_VALUES = r"0 has no values \(its weight is on the meta device or offloaded\)"


def with_state(**changed: Any) -> Any:
    layer = four_bits()
    vars(layer.weight.quant_state).update(changed)
    return layer


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Linear4bit(64, 96), NOT_YET),
        (lambda: Linear8bitLt(64, 96, has_fp16_weights=False), NOT_YET),
        (lambda: Linear4bit(64, 96, device="meta"), NO_VALUES),
        (lambda: Linear8bitLt(64, 96, has_fp16_weights=False, device="meta"), NO_VALUES),
        (lambda: Linear8bitLt(64, 96), r"0 has 16-bit weights .*has_fp16_weights=True"),
        (lambda: with_state(quant_type="af4"), r"0 has codes of type 'af4', expected one of nf4, fp4"),
        (lambda: with_state(shape=torch.Size((64, 96))), r"0 was quantized as \(64, 96\), expected .* = \(96, 64\)"),
        (lambda: four_bits(48, bias=False), r"0 has rows of 48 entries and blocks of 64, .* dequantizes incorrectly"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_its_name_and_a_remedy(build: Callable[[], Any], said: str) -> None:
    layer = build()
    if "incorrectly" in said and torch.allclose(layer(torch.eye(48)).T.double(), written_out(layer), atol=1e-6):
        pytest.skip("this bitsandbytes reads them right")
    model, held = nn.Sequential(layer), {name: (each, each.requires_grad) for name, each in layer.named_parameters()}
    with pytest.raises(TargetError, match=said):
        randlora.inject(model, r=4, targets=["0"])
    assert model[0] is layer
    assert all(layer.get_parameter(name) is each for name, (each, _) in held.items())
    assert all(each.requires_grad == trains for each, trains in held.values())


@pytest.mark.parametrize("build", [four_bits, lambda: Linear8bitLt(64, 96, has_fp16_weights=False).to("cpu")])
@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("0.45.5", r"0 needs bitsandbytes 0\.50 or newer, found 0\.45\.5: python -m pip install --upgrade bitsandb"),
        (None, r"0 needs bitsandbytes, which is not installed: python -m pip install .*\[bnb\]"),
    ],
)
def test_a_bitsandbytes_that_is_missing_or_too_old_is_named_with_the_extra(
    build: Callable[[], Any], found: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(_name: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(bnb, "version", version)
    monkeypatch.setattr(bnb, "missing", bnb.missing.__wrapped__)
    model = nn.Sequential(build())
    with untouched(model), pytest.raises(TargetError, match=said):
        randlora.inject(model, r=4, targets=["0"])


@pytest.mark.parametrize(
    ("owner", "name"), [(bitsandbytes, "matmul_4bit"), (Linear4bit, "forward")], ids=["kernel", "forward"]
)
def test_the_layers_own_forward_runs_in_evaluation_and_if_somebody_replaced_it(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(LinearNF4): ...  # type: ignore[misc]

    model, layer = adapted(Own(64, 96, compute_dtype=torch.float32, bias=False).to("cpu"))
    assert type(adapter_layer(layer)).__name__ == "Linear4bitAdapter"
    own, x = getattr(owner, name), torch.randn(5, 64)
    expected = 2 * plain(layer)(x) + x @ update_of(layer).T
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: 2 * own(*args, **kwargs))
    assert_close(model.train(name == "forward")(x), expected, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (None, torch.bfloat16),
    ],
)
def test_the_output_has_the_dtype_of_the_input_and_is_computed_in_that_of_the_layer_else_of_its_first_input(
    dtype: torch.dtype | None, given: torch.dtype
) -> None:
    model, layer = adapted(four_bits(compute_dtype=dtype))
    x = torch.randn(5, 64).to(given)
    with torch.no_grad():
        fresh = copy.deepcopy(model)
        fresh[0].randlora_lambda["default"].zero_()
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
    assert _dense() == []
    output.sum().backward()
    assert x.grad is not None


def _dense() -> list[torch.Size]:
    alive = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return [found.shape for found in alive if found.is_floating_point() and found.shape in {(192, 256), (256, 192)}]


@pytest.mark.parametrize(("quantized", "storage"), [("requantize", torch.bfloat16), ("dequantize", torch.uint8)])
def test_a_weight_that_lost_its_state_to_the_layer_merges_and_comes_back(quantized: Any, storage: torch.dtype) -> None:
    """As ``load_state_dict(assign=True)`` and sharding leave it, which wants codes in another dtype."""
    model, layer = adapted(four_bits(quant_storage=storage))
    x = torch.randn(5, 64, requires_grad=True)
    expected = model(x)
    assert_close(expected, plain(layer)(x) + x @ update_of(layer).T, torch.float32)
    model.load_state_dict(model.state_dict(), assign=True, strict=False)
    held = layer.weight, layer.quant_state
    assert not hasattr(held[0], "quant_state")
    with randlora.merged(model, quantized=quantized):
        merged = model(x)
        assert layer.weight.dtype == (storage if quantized == "requantize" else torch.float32)
    assert (merged - expected).abs().max() < 0.3 * expected.abs().max()
    assert (layer.weight is held[0], layer.quant_state is held[1]) == (True, True)
    assert same_bits(model(x), expected)


@every_quantized_kind
def test_a_trained_bias_keeps_its_dtype_whatever_runs(kind: LayerKind) -> None:
    """A layer of bitsandbytes alone casts it in place, under the optimizer's feet."""
    base = kind.build(24, 20, True, torch.bfloat16)
    own = base.bias = nn.Parameter(torch.randn(20))
    x = torch.randn(5, 24).bfloat16()
    try:
        copy.deepcopy(base)(x)  # which casts its bias
    except RuntimeError:
        pytest.skip("the layer alone takes no bias of another dtype")
    model, plain_bias = nn.Sequential(base), own.detach().clone()
    randlora.inject(model, r=4, train_also=["0.bias"])
    fill(model)
    layer: Any = model[0]
    bias = layer.bias.detach().clone()  # which bfloat16 would round
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
    assert same_bits(layer.bias.detach(), bias)
    randlora.eject(model)
    assert layer.bias is own
    assert same_bits(own.detach(), plain_bias)


@every_quantized_kind
def test_new_codes_are_held_as_the_old_ones_were(kind: LayerKind) -> None:
    model, layer = adapted(kind.build(128, 32, True, torch.float32))
    own, kept_as = dict(vars(layer.weight)), type(layer.weight)
    randlora.merge(model)
    assert type(model[0].weight) is kept_as
    told = "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "has_fp16_weights"
    found = vars(model[0].weight)
    assert {name: found[name] for name in told if name in own} == {name: own[name] for name in told if name in own}
    assert found.get("module") is (model[0] if "module" in own else None)

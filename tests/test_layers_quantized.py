"""Merging into quantized layers: the sum is right, the rounding is reported, and every byte comes back."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import randlora
from randlora import AdapterLayer, ConfigError, MergeError
from randlora.layers.folding import Quantized
from tests.laws import Snapshot, assert_close, fill, same_bits, untouched
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_quantized_kind, every_quantized_kind_and_dtype

sides = st.integers(2, 40).filter(lambda side: side % 16)  # of some such rows, bitsandbytes misreads the codes
shapes = st.tuples(sides, sides)
every_way = pytest.mark.parametrize("quantized", ["requantize", "dequantize"])


def one_layer(kind: LayerKind, shape: tuple[int, int], dtype: torch.dtype, *, alpha: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(kind.build(*shape, True, dtype))
    randlora.inject(model, r=3, alpha=alpha, stream="portable")
    fill(model)
    return model


def update(model: nn.Sequential) -> Tensor:
    layer = model[0]
    assert isinstance(layer, AdapterLayer)
    return layer.delta_weight({"default": 1.0}).detach().double()


def base(model: nn.Sequential) -> nn.Module:
    layer = model[0]
    return layer.base_layer if isinstance(layer, AdapterLayer) else layer


@every_quantized_kind
@given(shape=shapes, alpha=st.floats(0.01, 30))
def test_a_requantized_weight_is_the_nearest_to_base_and_update(
    kind: LayerKind, shape: tuple[int, int], alpha: float
) -> None:
    """Half a step from the exact sum, or three quarters where the scales are codes themselves."""
    model = one_layer(kind, shape, torch.float32, alpha=alpha)
    exact = kind.weight(base(model)) + update(model)
    (error,) = randlora.merge(model).errors.values()
    assert getattr(model[0], "quant_state", None) is getattr(model[0].weight, "quant_state", None)
    off = kind.weight(model[0]) - exact
    assert kind.step is not None
    share = 0.75 if kind.name.endswith("double") else 0.5
    assert (off.abs() <= share * kind.step(model[0]) + 1e-5 * exact.abs().max()).all()
    assert error.largest == pytest.approx(off.abs().max().item(), rel=1e-3, abs=1e-5 * exact.abs().max().item())
    assert error.step == pytest.approx(kind.step(model[0]).max().item(), rel=1e-5)
    assert error.largest <= error.step


@every_quantized_kind
def test_the_reported_error_is_relative_to_what_was_merged(kind: LayerKind) -> None:
    model = one_layer(kind, (24, 20), torch.float32)
    exact, merged_in = kind.weight(base(model)) + update(model), torch.linalg.vector_norm(update(model))
    report = randlora.merge(model)
    off = torch.linalg.vector_norm(kind.weight(model[0]) - exact)
    assert report.errors["0"].relative == pytest.approx((off / merged_in).item(), rel=1e-3)
    assert f"rounding took {report.errors['0'].relative:.1%}" in str(report)
    assert "most in 0, by" in str(report)


@every_quantized_kind_and_dtype
@given(shape=shapes)
def test_a_dequantized_layer_is_plain_and_computes_what_the_adapted_one_does(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    model = one_layer(kind, shape, dtype)
    exact, bias = kind.weight(base(model)) + update(model), base(model).bias
    x = torch.randn(5, shape[0]).to(dtype)
    expected = model(x)
    report = randlora.merge(model, quantized="dequantize", dtype=dtype)
    linear = model[0]
    assert type(linear) is nn.Linear
    assert linear.weight.dtype == dtype
    assert linear.bias is bias
    assert not linear.weight.requires_grad
    assert report.errors == {}
    assert_close(linear.weight, exact, dtype)
    assert_close(model(x), expected, dtype)


@every_quantized_kind
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)], ids=["up", "down", "square"])
def test_the_update_that_is_merged_is_the_one_that_was_applied(kind: LayerKind, shape: tuple[int, int]) -> None:
    """PEFT multiplies its factors in the wrong order."""
    model = one_layer(kind, shape, torch.float32)
    identity = torch.eye(shape[0])
    applied = model(identity) - base(model)(identity)
    before = kind.weight(base(model))
    randlora.merge(model, quantized="dequantize", dtype=torch.float32)
    assert_close(model[0].weight - before, applied.T, torch.float32)  # type: ignore[operator]


def test_a_dequantized_layer_that_never_ran_has_the_dtype_of_norms_else_of_what_else_there_is_else_its_own() -> None:
    def merged(*others: nn.Module) -> list[torch.dtype]:
        layers = [kind.build(24, 24, True, torch.bfloat16) for kind in (LAYER_KINDS[2], LAYER_KINDS[-1])]
        model = nn.Sequential(*others, *layers)
        randlora.inject(model, r=3, targets="all-linear")
        randlora.merge(model, quantized="dequantize")
        return [model.get_parameter(f"{len(others) + index}.weight").dtype for index in range(2)]

    embedding, norm = nn.Embedding(4, 24, dtype=torch.float16), nn.LayerNorm(24)
    assert merged(embedding, norm) == [torch.float32, torch.float32]
    assert merged(embedding) == [torch.float16, torch.float16]
    assert merged() == [torch.bfloat16, torch.float32]  # 8 bits compute in no dtype of their own


@pytest.mark.parametrize("is_training", [True, False])
def test_a_dequantized_layer_stays_in_the_mode_of_the_model(is_training: bool) -> None:
    model = one_layer(LAYER_KINDS[2], (24, 20), torch.float32).train(is_training)
    randlora.merge(model, quantized="dequantize")
    assert model[0].training == is_training


@every_quantized_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_dequantized_layer_takes_the_inputs_that_the_quantized_one_took(
    kind: LayerKind, dtype: torch.dtype, given: torch.dtype
) -> None:
    """A plain layer does not cast them."""
    model = one_layer(kind, (24, 20), dtype)
    x = torch.randn(5, 24).to(given)
    expected = model(x)
    randlora.merge(model, quantized="dequantize")
    assert model[0].weight.dtype == given
    assert_close(model(x), expected, torch.bfloat16)


@every_quantized_kind
def test_a_dequantized_layer_goes_by_the_last_input_and_not_by_the_first_or_the_norms(kind: LayerKind) -> None:
    model = nn.Sequential(nn.LayerNorm(24), kind.build(24, 20, True, torch.bfloat16))
    randlora.inject(model, r=3)
    model[1](torch.randn(5, 24))
    model[1](torch.randn(5, 24).half())
    randlora.merge(model, quantized="dequantize")
    assert model[1].weight.dtype == torch.float16


@every_quantized_kind
@pytest.mark.parametrize("has_run", [False, True], ids=["autocast only", "plain before"])
def test_autocast_hides_the_dtype_of_inputs_and_leaves_that_of_the_model(kind: LayerKind, has_run: bool) -> None:
    model = nn.Sequential(nn.Linear(24, 24), kind.build(24, 20, True, torch.bfloat16))
    randlora.inject(model, r=3, targets=["1"])
    x = torch.randn(5, 24)
    if has_run:
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    randlora.merge(model, quantized="dequantize")
    assert model(x).dtype == torch.float32


@every_quantized_kind
def test_a_model_that_was_converted_after_it_ran_is_dequantized_for_its_new_dtype(kind: LayerKind) -> None:
    model = nn.Sequential(nn.Linear(24, 24), kind.build(24, 20, True, torch.float32))
    randlora.inject(model, r=3, targets=["1"])
    model(torch.randn(5, 24))
    model.bfloat16()
    randlora.merge(model, quantized="dequantize")
    assert model(torch.randn(5, 24).bfloat16()).dtype == torch.bfloat16


@every_way
@every_quantized_kind
@given(shape=shapes)
def test_every_byte_and_the_state_of_the_codes_come_back(
    quantized: Quantized, kind: LayerKind, shape: tuple[int, int]
) -> None:
    model = one_layer(kind, shape, torch.float32)
    x = torch.randn(5, shape[0])
    expected, before, layer = model(x), Snapshot.of(model), base(model)
    held = _contents(layer)
    with randlora.merged(model, quantized=quantized):
        model(x)
        saved = model.state_dict()
        assert saved.keys() == before.tensors.keys()
        assert all(same_bits(saved[name], tensor) for name, tensor in before.tensors.items())
    before.assert_equals(Snapshot.of(model))
    assert base(model) is layer
    assert all(found is kept for found, kept in zip(_contents(layer), held, strict=True))
    assert same_bits(model(x), expected)
    assert model.eval() is model
    randlora.eject(model)
    assert model[0] is layer


def _contents(layer: Any) -> list[object]:
    if hasattr(layer, "state"):
        return [layer.weight, layer.state.CB, layer.state.SCB]
    return [layer.weight, layer.weight.quant_state, layer.quant_state]


@every_way
@every_quantized_kind
def test_ejecting_inside_merged_gives_the_original_layer(kind: LayerKind, quantized: Quantized) -> None:
    layer = kind.build(24, 20, True, torch.float32)
    model = nn.Sequential(layer)
    before = Snapshot.of(model)
    randlora.inject(model, r=3)
    fill(model)
    with randlora.merged(model, quantized=quantized):
        randlora.eject(model)
    before.assert_equals(Snapshot.of(model))


@every_way
@every_quantized_kind
def test_a_merge_that_would_not_be_finite_changes_nothing(kind: LayerKind, quantized: Quantized) -> None:
    model = nn.Sequential(kind.build(24, 20, True, torch.float32), kind.build(20, 24, True, torch.float32))
    randlora.inject(model, r=3)
    fill(model)
    with torch.no_grad():
        model.get_parameter("1.randlora_lambda.default").fill_(float("nan"))
    held = _contents(model[0].base_layer)
    with untouched(model), pytest.raises(MergeError, match="merged weight of 1 would not be finite"):
        randlora.merge(model, quantized=quantized)
    assert all(found is kept for found, kept in zip(_contents(model[0].base_layer), held, strict=True))


def test_an_overflow_of_a_dequantized_dtype_is_refused() -> None:
    model = one_layer(LAYER_KINDS[-1], (24, 20), torch.float32, alpha=1e7)
    with untouched(model), pytest.raises(MergeError, match=r"would not be finite in torch\.float16"):
        randlora.merge(model, quantized="dequantize", dtype=torch.float16)


def _hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _module, _args, output: output)


def _own_forward(layer: nn.Module) -> None:
    layer.__dict__["forward"] = layer.forward  # accelerate's way


def _own_class(layer: nn.Module) -> None:
    parent: Any = type(layer)
    layer.__class__ = type("Own", (parent,), {"forward": lambda self, x: 3 * parent.forward(self, x)})


@pytest.mark.parametrize("change", [_hook, _own_forward, _own_class])
@every_quantized_kind
def test_a_layer_that_does_more_is_requantized_but_not_replaced(kind: LayerKind, change: Any) -> None:
    model = one_layer(kind, (24, 20), torch.float32)
    layer = base(model)
    change(layer)
    with (
        untouched(model),
        pytest.raises(MergeError, match=r"0 has hooks or a forward .* quantized='requantize'"),
    ):
        randlora.merge(model, quantized="dequantize")
    randlora.merge(model)
    assert model[0] is layer


@every_way
@every_quantized_kind
def test_a_layer_that_was_put_in_after_the_adapter_is_not_merged_into(kind: LayerKind, quantized: Quantized) -> None:
    """As ``model.dequantize()`` of transformers does, for one."""
    model = one_layer(kind, (24, 20), torch.float32)
    model[0].base_layer = nn.Linear(24, 20)
    with untouched(model), pytest.raises(MergeError, match=r"0 holds a Linear that was put in after .* eject it"):
        randlora.merge(model, quantized=quantized)


@every_quantized_kind
def test_options_that_mean_nothing_are_refused(kind: LayerKind) -> None:
    model = one_layer(kind, (24, 20), torch.float32)
    said = r"(?s)one of requantize, dequantize, got 'round'.*a floating dtype or None, got torch.int8"
    with untouched(model), pytest.raises(ConfigError, match=said):
        randlora.merge(model, quantized="round", dtype=torch.int8)  # type: ignore[arg-type]


@every_quantized_kind
def test_a_dtype_for_codes_is_refused(kind: LayerKind) -> None:
    model = one_layer(kind, (24, 20), torch.float32)
    with untouched(model), pytest.raises(ConfigError, match="codes have none: give quantized='dequantize' too"):
        randlora.merge(model, dtype=torch.float32)


@every_quantized_kind
def test_merging_nothing_leaves_every_code(kind: LayerKind) -> None:
    """Rounding could change scales that are codes themselves."""
    model = nn.Sequential(kind.build(24, 20, True, torch.float32), kind.build(20, 24, True, torch.float32))
    randlora.inject(model, r=3)
    fill(model)
    with torch.no_grad():
        model.get_parameter("0.randlora_lambda.default").zero_()
    layer = model[0].base_layer
    held = _contents(layer)
    report = randlora.merge(model)
    assert model[0] is layer
    assert all(found is kept for found, kept in zip(_contents(layer), held, strict=True))
    assert list(report.errors) == ["1"]

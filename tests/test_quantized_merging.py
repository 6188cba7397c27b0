"""Merging into quantized layers: the sum is right, the rounding is reported, and every byte comes back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

import randlora
from randlora.errors import ConfigError, MergeError
from randlora.layers.update import Quantized
from tests.codes import assert_rounded_to_nearest
from tests.kit import all_bits, assert_unchanged, fill, same_bits, snapshot, untouched
from tests.laws import assert_close, plain, update_of
from tests.layer_kinds import BITSANDBYTES, LAYER_KINDS, LayerKind, every_quantized_kind, every_quantized_kind_and_dtype

sides = st.integers(2, 40).filter(lambda side: side % 16)  # of some such rows, bitsandbytes misreads the codes
shapes = st.tuples(sides, sides)
every_way = pytest.mark.parametrize("quantized", ["requantize", "dequantize"])


def one_layer(kind: LayerKind, shape: tuple[int, int], dtype: torch.dtype, *, alpha: float = 1.0) -> Any:
    model = nn.Sequential(kind.build(*shape, True, dtype))
    randlora.inject(model, r=3, alpha=alpha, stream="portable")
    fill(model)
    return model


def update(model: nn.Sequential) -> Tensor:
    return update_of(model[0]).detach().double()


def base(model: nn.Sequential) -> Any:
    """Return the layer as it was before the adapter: a copy."""
    return plain(model[0])


@every_quantized_kind
@given(shape=shapes, alpha=st.floats(0.01, 30))
def test_a_requantized_weight_is_the_nearest_to_base_and_update(
    kind: LayerKind, shape: tuple[int, int], alpha: float
) -> None:
    model = one_layer(kind, shape, torch.float32, alpha=alpha)
    exact = kind.weight(base(model)) + update(model)
    (loss,) = randlora.merge(model).rounding.values()
    assert getattr(model[0], "quant_state", None) is getattr(model[0].weight, "quant_state", None)
    assert_rounded_to_nearest(model[0], exact)
    off = kind.weight(model[0]) - exact
    assert kind.step is not None
    assert loss.largest == pytest.approx(off.abs().max().item(), rel=1e-3, abs=1e-5 * exact.abs().max().item())
    assert loss.step == pytest.approx(kind.step(model[0]).max().item(), rel=1e-5)
    assert loss.largest <= loss.step


@every_quantized_kind
def test_the_reported_loss_is_relative_to_what_was_merged(kind: LayerKind) -> None:
    model = one_layer(kind, (24, 20), torch.float32)
    exact, merged_in = kind.weight(base(model)) + update(model), torch.linalg.vector_norm(update(model))
    report = randlora.merge(model)
    off = torch.linalg.vector_norm(kind.weight(model[0]) - exact)
    assert report.rounding["0"].relative == pytest.approx((off / merged_in).item(), rel=1e-3)
    assert f"the rounding error is {report.rounding['0'].relative:.1%}" in str(report)
    assert "largest in 0: up to" in str(report)


@every_quantized_kind_and_dtype
@given(shape=shapes, is_training=st.booleans())
def test_a_dequantized_layer_is_plain_and_computes_what_the_adapted_one_does(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int], is_training: bool
) -> None:
    model = one_layer(kind, shape, dtype)
    exact, bias, layer = kind.weight(model[0]) + update(model), model[0].bias, model[0]
    x = torch.randn(5, shape[0]).to(dtype)
    expected = model(x)
    model.train(is_training)
    report = randlora.merge(model, quantized="dequantize", dtype=dtype)
    linear = model[0]
    assert linear is layer
    assert type(linear) is nn.Linear
    assert linear.training == is_training
    assert vars(linear).keys() == vars(nn.Linear(1, 1)).keys()
    assert linear.weight.dtype == dtype
    assert linear.bias is bias
    assert not linear.weight.requires_grad
    assert report.rounding == {}
    assert repr(linear) == repr(nn.Linear(*shape))
    assert_close(linear.weight, exact, dtype)
    if not kind.rounds_inputs:
        assert_close(model(x), expected, dtype)


def test_a_dequantized_layer_has_the_dtype_of_norms_else_of_what_else_there_is_else_its_own() -> None:
    def merged(*others: nn.Module) -> list[torch.dtype]:
        layers = [kind.build(24, 24, True, torch.bfloat16) for kind in (LAYER_KINDS[2], BITSANDBYTES[-1])]
        model = nn.Sequential(*others, *layers)
        randlora.inject(model, r=3, targets="all-linear")
        randlora.merge(model, quantized="dequantize")
        return [model.get_parameter(f"{len(others) + index}.weight").dtype for index in range(2)]

    embedding, norm = nn.Embedding(4, 24, dtype=torch.float16), nn.LayerNorm(24)
    assert merged(embedding, norm) == [torch.float32, torch.float32]
    assert merged(embedding) == [torch.float16, torch.float16]
    assert merged() == [torch.bfloat16, torch.float32]  # 8 bits compute in no dtype of their own


@every_quantized_kind
def test_the_dtype_of_a_dequantized_layer_is_read_from_the_model_and_not_from_what_it_was_given(
    kind: LayerKind,
) -> None:
    model = nn.Sequential(nn.LayerNorm(24), kind.build(24, 20, True, torch.bfloat16))
    randlora.inject(model, r=3, targets=["1"])
    model[1](torch.randn(5, 24).to(torch.half if kind.casts_inputs else torch.bfloat16))
    if kind.casts_inputs:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(5, 24))
    randlora.merge(model, quantized="dequantize")
    assert model[1].weight.dtype == torch.float32
    assert model(torch.randn(5, 24)).dtype == torch.float32


@every_way
@every_quantized_kind
@given(shape=shapes)
def test_every_byte_and_the_state_of_the_codes_come_back(
    quantized: Quantized, kind: LayerKind, shape: tuple[int, int]
) -> None:
    model = one_layer(kind, shape, torch.float32)
    x = torch.randn(5, shape[0])
    expected, before, layer = model(x), snapshot(model), model[0]
    held, attributes, saved = _contents(layer), vars(layer).keys(), all_bits(model.state_dict())
    with randlora.merged(model, quantized=quantized):
        model(x)
        assert all_bits(model.state_dict()) == saved
    assert_unchanged(model, before)
    assert model[0] is layer
    assert vars(layer).keys() == attributes
    assert all(found is kept for found, kept in zip(_contents(layer), held, strict=True))
    assert same_bits(model(x), expected)
    own = layer.randlora_base
    randlora.eject(model)
    assert model[0] is layer
    assert type(layer) is own


def _contents(layer: Any) -> list[object]:
    if hasattr(layer.weight, "qdata"):
        return [layer.weight]
    if hasattr(layer, "state"):
        return [layer.weight, layer.state.CB, layer.state.SCB]
    return [layer.weight, layer.weight.quant_state, layer.quant_state]


@every_way
@every_quantized_kind
def test_ejecting_inside_merged_gives_the_original_layer(kind: LayerKind, quantized: Quantized) -> None:
    layer = kind.build(24, 20, True, torch.float32)
    model = nn.Sequential(layer)
    before = snapshot(model)
    randlora.inject(model, r=3)
    fill(model)
    with randlora.merged(model, quantized=quantized):
        randlora.eject(model)
    assert_unchanged(model, before)


@every_way
@every_quantized_kind
def test_a_merge_that_would_not_be_finite_changes_nothing(kind: LayerKind, quantized: Quantized) -> None:
    model = nn.Sequential(kind.build(24, 20, True, torch.float32), kind.build(20, 24, True, torch.float32))
    randlora.inject(model, r=3)
    fill(model)
    with torch.no_grad():
        model.get_parameter("1.randlora_lambda.default").fill_(float("nan"))
    held = _contents(model[0])
    with untouched(model), pytest.raises(MergeError, match="merged weight of 1 would not be finite"):
        randlora.merge(model, quantized=quantized)
    assert all(found is kept for found, kept in zip(_contents(model[0]), held, strict=True))


def test_an_overflow_of_a_dequantized_dtype_is_refused() -> None:
    model = one_layer(BITSANDBYTES[-1], (24, 20), torch.float32, alpha=1e7)
    with untouched(model), pytest.raises(MergeError, match=r"would not be finite in torch\.float16"):
        randlora.merge(model, quantized="dequantize", dtype=torch.float16)


def _own_forward(layer: nn.Module) -> None:
    plain_forward = layer.forward
    layer.__dict__["forward"] = lambda x: 3 * plain_forward(x)


def _own_class(layer: nn.Module) -> None:
    parent: Any = type(layer)
    layer.__class__ = type("Own", (parent,), {"forward": lambda self, x: 3 * parent.forward(self, x)})


@pytest.mark.parametrize("change", [_own_forward, _own_class])
@every_quantized_kind
def test_a_layer_that_does_more_is_requantized_but_not_made_plain(kind: LayerKind, change: Any) -> None:
    layer = kind.build(24, 20, True, torch.float32)
    change(layer)
    model, own = nn.Sequential(layer), type(layer)
    randlora.inject(model, r=3)
    fill(model)
    said = r"0 has its own forward, .* quantized='requantize'"
    with untouched(model), pytest.raises(MergeError, match=said):
        randlora.merge(model, quantized="dequantize")
    randlora.merge(model)
    assert model[0] is layer
    assert type(layer) is own


@every_quantized_kind
def test_a_layer_whose_class_changed_since_is_not_made_plain_even_for_a_while(kind: LayerKind) -> None:
    model = one_layer(kind, (24, 20), torch.float32)
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    changed = type(model[0])
    said = r"0 changed its class to Parametrized\w+ after it was adapted"
    with untouched(model), pytest.raises(MergeError, match=said):
        randlora.merge(model, quantized="dequantize", reversible=True)
    assert type(model[0]) is changed


@every_way
@every_quantized_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_merged_is_merged_and_unmerges_to_the_same_codes(
    kind: LayerKind, quantized: Quantized, copied: Callable[[nn.Module], Any]
) -> None:
    if copied is not copy.deepcopy and not kind.pickles:
        pytest.skip("it cannot be pickled")
    model = one_layer(kind, (24, 20), torch.float32)
    x = torch.randn(5, 24)
    expected, saved = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with randlora.merged(model, quantized=quantized) as report:
        twin, merged = copied(model), model(x)
    assert same_bits(twin(x), merged)
    with randlora.merged(twin) as found:
        assert found == report
    assert randlora.adapters(twin)[0].is_merged
    randlora.unmerge(twin)
    assert not randlora.adapters(twin)[0].is_merged
    assert same_bits(twin(x), expected)
    found_state = twin.state_dict()
    assert all(same_bits(found_state[name], tensor) for name, tensor in saved.items())
    assert twin[0] is not model[0]
    codes = [getattr(layer.weight, "qdata", layer.weight) for layer in (twin[0], model[0])]
    assert codes[0].data_ptr() != codes[1].data_ptr()
    randlora.eject(twin)
    assert type(twin[0]) is model[0].randlora_base


@every_way
@every_quantized_kind
def test_a_bias_trained_beside_is_saved_as_it_is_while_a_plain_layer_has_it_rounded(
    kind: LayerKind, quantized: Quantized, tmp_path: Path
) -> None:
    model = nn.Sequential(kind.build(24, 20, True, torch.float32))
    randlora.inject(model, r=3, train_also=["0.bias"])
    fill(model)
    bias = model[0].bias
    randlora.save(model, tmp_path / "before")
    options: Any = {"dtype": torch.bfloat16} if quantized == "dequantize" else {}
    with randlora.merged(model, quantized=quantized, **options):
        model(torch.randn(5, 24).to(torch.bfloat16 if options or kind.casts_inputs else torch.float32))
        randlora.save(model, tmp_path / "while")
        assert model[0].bias.dtype == (torch.bfloat16 if options else torch.float32)
    assert model[0].bias is bias
    randlora.save(model, tmp_path / "after")
    names = "before", "while", "after"
    before, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    for other in others:
        assert other.keys() == before.keys()
        assert all(same_bits(other[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantized": "round"}, "one of requantize, dequantize, got 'round'"),
        ({"quantized": "dequantize", "dtype": torch.int8}, r"a floating dtype or None, got torch\.int8"),
        ({"dtype": torch.float32}, "applies to dequantized layers only"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    model = one_layer(LAYER_KINDS[2], (24, 20), torch.float32)
    with untouched(model), pytest.raises(ConfigError, match=said):
        randlora.merge(model, **options)


@every_quantized_kind
def test_merging_nothing_leaves_every_code(kind: LayerKind) -> None:
    """Rounding could change scales that are codes themselves."""
    model = nn.Sequential(kind.build(24, 20, True, torch.float32), kind.build(20, 24, True, torch.float32))
    randlora.inject(model, r=3)
    fill(model)
    with torch.no_grad():
        model.get_parameter("0.randlora_lambda.default").zero_()
    layer = model[0]
    held = _contents(layer)
    report = randlora.merge(model)
    assert model[0] is layer
    assert all(found is kept for found, kept in zip(_contents(layer), held, strict=True))
    assert list(report.rounding) == ["1"]

"""Merging into quantized layers: the sum is right, the rounding is reported, and every byte comes back."""

import copy
import pickle
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import randlora
from randlora.errors import ConfigError, MergeError
from randlora.layers.weight import Quantized
from tests.codes import assert_rounded_to_nearest
from tests.kit import adapt, all_bits, fill, same_bits, untouched
from tests.laws import assert_close, plain, update_of
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_quantized_kind

sides = st.integers(2, 40).filter(lambda side: side % 16)  # of some such rows, bitsandbytes misreads the codes
shapes = st.tuples(sides, sides)
NF4, INT8 = (next(kind for kind in LAYER_KINDS if kind.name == name) for name in ("NF4-double", "8bit"))
one_of_each_library = pytest.mark.parametrize(
    "kind", [kind for kind in LAYER_KINDS if kind.name in ("NF4-double", "8bit", "int8")], ids=lambda kind: kind.name
)


def one_layer(kind: LayerKind, shape: tuple[int, int], dtype: torch.dtype, *, alpha: float = 1.0) -> Any:
    model = nn.Sequential(kind.build(*shape, True, dtype))
    return adapt(model, r=3, alpha=alpha, stream="portable")


@every_quantized_kind
@settings(max_examples=12)
@given(shape=shapes, alpha=st.floats(0.01, 30), is_training=st.booleans(), data=st.data())
def test_a_weight_is_requantized_to_the_nearest_codes_or_dequantized_to_what_the_adapted_layer_computes_with(
    kind: LayerKind, shape: tuple[int, int], alpha: float, is_training: bool, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(kind.dtypes))
    model, x = one_layer(kind, shape, dtype, alpha=alpha), torch.randn(5, shape[0]).to(dtype)
    update = update_of(model[0]).detach().double()
    exact, bias, layer, rounded = kind.weight(plain(model[0])) + update, model[0].bias, model[0], copy.deepcopy(model)
    if dtype == torch.float32:
        report = randlora.merge(rounded)
        loss, off = report.rounding["0"], kind.weight(rounded[0]) - exact
        assert getattr(rounded[0], "quant_state", None) is getattr(rounded[0].weight, "quant_state", None)
        assert_rounded_to_nearest(rounded[0], exact)
        assert kind.step is not None
        assert loss.largest == pytest.approx(off.abs().max().item(), rel=1e-3, abs=1e-5 * exact.abs().max().item())
        assert loss.step == pytest.approx(kind.step(rounded[0]).max().item(), rel=1e-5)
        assert loss.largest <= loss.step
        assert loss.relative == pytest.approx((off.norm() / update.norm()).item(), rel=1e-2)
        assert f"the rounding error is {loss.relative:.1%}" in str(report)
        assert "largest in 0: up to" in str(report)
    expected = model(x)
    report = randlora.merge(model.train(is_training), quantized="dequantize", dtype=dtype)
    assert (model[0] is layer, type(layer), layer.training, report.rounding) == (True, nn.Linear, is_training, {})
    assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()
    assert (layer.weight.dtype, layer.bias is bias, layer.weight.requires_grad) == (dtype, True, False)
    assert_close(layer.weight, exact, dtype)
    if not kind.rounds_inputs:
        assert_close(model(x), expected, dtype)


def test_a_dequantized_layer_has_the_dtype_of_norms_else_of_what_else_there_is_else_its_own() -> None:
    def merged(*others: nn.Module) -> list[torch.dtype]:
        quantized = [kind.build(24, 24, True, torch.bfloat16) for kind in (NF4, INT8)]
        model = nn.Sequential(*others, *quantized)
        randlora.inject(model, r=3, targets="all-linear")
        for layer in quantized:
            layer(torch.randn(5, 24).half())  # what it was given does not count
        randlora.merge(model, quantized="dequantize")
        return [model.get_parameter(f"{len(others) + index}.weight").dtype for index in range(2)]

    embedding, norm = nn.Embedding(4, 24, dtype=torch.float16), nn.LayerNorm(24)
    assert merged(embedding, norm) == [torch.float32, torch.float32]
    assert merged(embedding) == [torch.float16, torch.float16]
    assert merged() == [torch.bfloat16, torch.float32]  # 8 bits compute in no dtype of their own


def _own_forward(layer: nn.Module) -> None:
    plain_forward = layer.forward
    layer.__dict__["forward"] = lambda x: 3 * plain_forward(x)


def _own_class(layer: nn.Module) -> None:
    parent: Any = type(layer)
    layer.__class__ = type("Own", (parent,), {"forward": lambda self, x: 3 * parent.forward(self, x)})


@one_of_each_library
def test_a_layer_that_does_more_is_requantized_but_not_made_plain(kind: LayerKind) -> None:
    for change in (_own_forward, _own_class):
        layer = kind.build(24, 20, True, torch.float32)
        change(layer)
        model, own = nn.Sequential(layer), type(layer)
        randlora.inject(model, r=3)
        said = r"0 has its own forward, .* quantized='requantize'"
        with untouched(fill(model)), pytest.raises(MergeError, match=said):
            randlora.merge(model, quantized="dequantize")
        randlora.merge(model)
        assert (model[0] is layer, type(layer)) == (True, own)


def test_a_merge_that_cannot_be_is_refused() -> None:
    dequantize: dict[str, Any] = {"quantized": "dequantize"}
    rows: list[tuple[LayerKind, float, dict[str, Any], type[Exception], str]] = [
        (NF4, 1, {**dequantize, "reversible": True}, MergeError, "0 changed its class to Parametr"),
        (INT8, 1e7, {**dequantize, "dtype": torch.float16}, MergeError, r"would not be finite in torch\.float16"),
        (NF4, 1, {"quantized": "round"}, ConfigError, "one of requantize, dequantize, got 'round'"),
        (NF4, 1, {**dequantize, "dtype": torch.int8}, ConfigError, r"a floating dtype or None, got torch\.int8"),
        (NF4, 1, {"dtype": torch.float32}, ConfigError, "applies to dequantized layers only"),
    ]
    for kind, alpha, options, error, said in rows:
        model = one_layer(kind, (24, 20), torch.float32, alpha=alpha)
        if "class" in said:
            parametrize.register_parametrization(model[0], "bias", nn.Identity())
        with untouched(model), pytest.raises(error, match=said):
            randlora.merge(model, **options)


@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
@one_of_each_library
def test_a_copy_made_while_merged_unmerges_to_the_same_codes(kind: LayerKind, quantized: Quantized) -> None:
    model, x = one_layer(kind, (24, 20), torch.float32), torch.randn(5, 24, requires_grad=True)
    expected, saved = model(x), all_bits(model.state_dict())
    with randlora.merged(model, quantized=quantized) as report:
        twins, merged = (copy.deepcopy(model), pickle.loads(pickle.dumps(model))), model(x)
        assert all_bits(model.state_dict()) == saved
    for twin in twins:
        assert same_bits(twin(x), merged)
        with randlora.merged(twin) as found:
            assert found == report
        randlora.unmerge(twin)
        assert same_bits(twin(x), expected)
        assert same_bits(*(torch.autograd.grad(each(x).sum(), x)[0] for each in (twin, model)))
        assert all_bits(twin.state_dict()) == saved
        codes = [getattr(layer.weight, "qdata", layer.weight) for layer in (twin[0], model[0])]
        assert codes[0].data_ptr() != codes[1].data_ptr()
        randlora.eject(twin)
        assert type(twin[0]) is model[0].randlora_base
    if kind.library == "torchao":  # bitsandbytes' parameters cannot be moved there
        randlora.merge(model, reversible=True, quantized=quantized)
        randlora.unmerge(model.to("meta"))
        assert model[0].weight.is_meta, "the codes are where the layer was moved to"


@pytest.mark.filterwarnings("always:rounding to codes loses:UserWarning")
def test_a_merge_that_loses_more_than_a_tenth_of_an_update_warns_with_what_loses_nothing() -> None:
    def losses(kind: LayerKind, alpha: float, verb: Any, **options: Any) -> list[str]:
        model = one_layer(kind, (24, 20), torch.float32, alpha=alpha)
        with warnings.catch_warnings(record=True) as caught:
            with verb(model, **options) if verb is randlora.merged else nullcontext(verb(model, **options)) as report:
                assert report.targets == ("0",)
            assert all(each.filename == __file__ for each in caught)
        said = [str(each.message) for each in caught]
        lost = report.rounding["0"].relative if report.rounding else 0.0
        assert bool(said) == (lost > 0.1)
        assert all(f"up to {lost:.0%} of the update of 0: merge with quantized='deq" in each for each in said)
        return said

    for verb in (randlora.merge, randlora.merged):
        assert len(losses(NF4, 1, verb)) == len(losses(INT8, 0.01, verb)) == 1
        assert losses(NF4, 1, verb, quantized="dequantize") == losses(INT8, 30, verb) == []
    model = one_layer(NF4, (24, 20), torch.float32)
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"randlora\.files\.merge$"):
            randlora.merge(model)


@one_of_each_library
def test_merging_nothing_leaves_every_code(kind: LayerKind) -> None:
    """Rounding could change scales that are codes themselves."""
    model = nn.Sequential(*(kind.build(24, 24, True, torch.float32) for _ in range(2)))
    randlora.inject(model, r=3)
    with torch.no_grad():
        fill(model).get_parameter("0.randlora_lambda.default").zero_()
    held = model[0].weight, all_bits(model[0].state_dict())
    report = randlora.merge(model)
    assert model[0].weight is held[0]
    assert {**held[1], **all_bits(model[0].state_dict())} == held[1]
    assert list(report.rounding) == ["1"]

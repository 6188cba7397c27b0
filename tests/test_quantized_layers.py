"""bitsandbytes' layers: what is refused, what a forward of theirs leaves behind, and what training on them holds."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, LinearNF4, Params4bit
from torch import Tensor, nn

import randlora
from randlora.errors import TargetError
from randlora.quantized import bnb
from tests.codes import written_out
from tests.further import further
from tests.kit import fill, same_bits, untouched
from tests.laws import adapter_layer, assert_close, plain, update_of
from tests.layer_kinds import BITSANDBYTES, LayerKind, compiles_codes, every_quantized_kind
from tests.quantized import of_4_bits


def four_bits(in_features: int = 64, out_features: int = 96, **options: Any) -> Any:
    return of_4_bits(in_features, out_features, repacks=True, **options)


def adapted(base: nn.Module, r: int = 8) -> tuple[Any, Any]:
    model = nn.Sequential(base)
    randlora.inject(model, r=r, alpha=4, targets="all-linear")
    fill(model)
    return model, model[0]


# What is refused, before anything is touched


NOT_YET = "0 is not quantized yet: move the model to its device first"
NO_VALUES = r"0 has no values \(its weight is on the meta device or offloaded\)"


def _unknown_type() -> Any:
    layer = four_bits()
    layer.weight.quant_state.quant_type = "af4"
    return layer


def _turned() -> Any:
    layer = four_bits()
    layer.weight.quant_state.shape = torch.Size((64, 96))
    return layer


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Linear4bit(64, 96), NOT_YET),
        (lambda: Linear8bitLt(64, 96, has_fp16_weights=False), NOT_YET),
        (lambda: Linear4bit(64, 96, device="meta"), NO_VALUES),
        (lambda: Linear8bitLt(64, 96, has_fp16_weights=False, device="meta"), NO_VALUES),
        (lambda: Linear8bitLt(64, 96), r"0 has 16-bit weights .*has_fp16_weights=True"),
        (_unknown_type, r"0 has codes of type 'af4', expected one of nf4, fp4"),
        (_turned, r"0 was quantized as \(64, 96\), expected \(out, in\) = \(96, 64\)"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_its_name_and_a_remedy(build: Callable[[], Any], said: str) -> None:
    layer = build()
    model, holds = nn.Sequential(layer), dict(layer.named_parameters())
    trains = {name for name, parameter in holds.items() if parameter.requires_grad}
    with pytest.raises(TargetError, match=said):
        randlora.inject(model, r=4, targets=["0"])
    assert model[0] is layer
    assert all(layer.get_parameter(name) is parameter for name, parameter in holds.items())
    assert {name for name, parameter in holds.items() if parameter.requires_grad} == trains


def test_codes_that_bitsandbytes_misreads_are_refused() -> None:
    layer = four_bits(48, bias=False)
    if torch.allclose(layer(torch.eye(48)).T.double(), written_out(layer), atol=1e-6):
        pytest.skip("this bitsandbytes reads them right")
    model = nn.Sequential(layer)
    said = r"0 has rows of 48 entries and blocks of 64, .* dequantizes incorrectly on a CPU"
    with untouched(model), pytest.raises(TargetError, match=said):
        randlora.inject(model, r=4, targets=["0"])


@pytest.mark.parametrize("build", [four_bits, lambda: Linear8bitLt(64, 96, has_fp16_weights=False).to("cpu")])
def test_without_bitsandbytes_the_layer_is_named(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "missing", lambda: "needs bitsandbytes")
    model = nn.Sequential(build())
    with untouched(model), pytest.raises(TargetError, match="0 needs bitsandbytes"):
        randlora.inject(model, r=4, targets=["0"])


def test_a_subclass_is_served_as_its_parent_is() -> None:
    class Own(LinearNF4): ...  # type: ignore[misc]

    _, layer = adapted(Own(64, 96, compute_dtype=torch.float32).to("cpu"))
    assert isinstance(layer, Own)
    assert type(adapter_layer(layer)).__name__ == "Linear4bitAdapter"


def test_in_evaluation_the_layers_own_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = adapted(four_bits())
    model.eval()
    seen: list[Tensor] = []
    matmul: Any = bitsandbytes.matmul_4bit

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(matmul(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", watched)
    x = torch.randn(5, 64)
    assert_close(model(x) - seen[0], x @ update_of(layer).T, torch.float32)
    assert len(seen) == 1


# Computing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input_and_is_computed_in_that_of_the_layer(
    dtype: torch.dtype, given: torch.dtype
) -> None:
    model, layer = adapted(four_bits(compute_dtype=dtype))
    x = torch.randn(5, 64).to(given)
    with torch.no_grad():
        fresh = copy.deepcopy(model)
        fresh[0].randlora_lambda["default"].zero_()
    own = plain(layer)(x)
    assert same_bits(fresh(x), own)
    output, update = layer(x), update_of(layer)
    assert output.dtype == own.dtype == given
    coarse = max((dtype, given), key=lambda each: torch.finfo(each).eps)
    assert_close(output, own.double() + x.double() @ update.double().T, coarse)


def test_a_layer_without_a_dtype_of_its_own_takes_that_of_its_first_input() -> None:
    _, layer = adapted(four_bits(compute_dtype=None))
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert layer.compute_dtype is None
    first, second = layer(x), layer(x)
    assert layer.compute_dtype == torch.bfloat16
    assert layer(x.float()).dtype == torch.float32
    assert layer.compute_dtype == torch.bfloat16
    assert_close(first, second, torch.bfloat16)


def test_codes_may_be_stored_in_another_dtype() -> None:
    """As sharding wants it."""
    model, layer = adapted(four_bits(quant_storage=torch.bfloat16))
    x = torch.randn(5, 64)
    assert_close(layer(x), plain(layer)(x) + x @ update_of(layer).T, torch.float32)
    assert update_of(layer).dtype == torch.float32
    randlora.merge(model)
    assert model[0].weight.dtype == model[0].weight.quant_storage == torch.bfloat16
    assert model(x).dtype == torch.float32


@pytest.mark.parametrize(
    "kind",
    [kind if kind.name in ("NF4-double", "8bit-outliers") else further(kind) for kind in BITSANDBYTES],
    ids=lambda kind: kind.name,
)
def test_nothing_as_large_as_the_weight_stays_between_forward_and_backward(kind: LayerKind) -> None:
    """No dense copy of it, above all."""
    base = kind.build(256, 192, False, torch.float32)
    _, layer = adapted(base, r=7)  # bases of other shapes
    x = torch.randn(4, 256, requires_grad=True)
    output = layer(x)
    assert _dense() == []
    output.sum().backward()
    assert _dense() == []
    assert x.grad is not None


def _dense() -> list[torch.Size]:
    """List the floating tensors of the weight's shape that are alive."""
    gc.collect()
    alive = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return [found.shape for found in alive if found.is_floating_point() and found.shape in {(192, 256), (256, 192)}]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own affair
@compiles_codes
def test_compiled_nothing_as_large_as_the_weight_is_kept_either() -> None:
    model, _ = adapted(four_bits(256, 192), r=7)
    compiled: Any = torch.compile(model, backend="aot_eager_decomp_partition")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compiled(x)
    assert_close(output, model(x), torch.float32)
    assert not [tensor for tensor in kept if tensor.is_floating_point() and sorted(tensor.shape) == [192, 256]]


def test_a_forward_that_somebody_put_in_its_place_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = adapted(four_bits())
    own: Any = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda *args: 2 * own(*args))
    x = torch.randn(5, 64)
    assert_close(model(x), plain(layer)(x) + x @ update_of(layer).T, torch.float32)


@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
def test_a_weight_that_lost_its_state_to_the_layer_merges_and_comes_back(quantized: Any) -> None:
    """As ``load_state_dict(assign=True)`` and sharding leave it."""
    model, layer = adapted(four_bits())
    x = torch.randn(5, 64, requires_grad=True)
    expected = model(x)
    model.load_state_dict(model.state_dict(), assign=True, strict=False)
    held = layer.weight, layer.quant_state
    assert not hasattr(held[0], "quant_state")
    with randlora.merged(model, quantized=quantized):
        model(x)
    assert layer.weight is held[0]
    assert layer.quant_state is held[1]
    assert same_bits(model(x), expected)


@every_quantized_kind
def test_a_trained_bias_keeps_its_dtype_whatever_runs(kind: LayerKind) -> None:
    """A layer of bitsandbytes alone casts it in place, under the optimizer's feet."""
    base = kind.build(24, 20, True, torch.bfloat16)
    own = base.bias = nn.Parameter(torch.randn(20))
    x = torch.randn(5, 24).bfloat16()
    try:
        base(x)
    except RuntimeError:
        pytest.skip("the layer alone takes no bias of another dtype")
    model, plain_bias = nn.Sequential(base), own.detach().clone()
    randlora.inject(model, r=4, train_also=["0.bias"])
    fill(model)
    layer: Any = model[0]
    bias = layer.bias.detach().clone()  # which bfloat16 would round
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=0.0)
    expected = x.double() @ (kind.weight(base) + update_of(layer)).T + bias
    for is_training in (True, False, True):
        output = model.train(is_training)(x)
        assert (output - expected).abs().max() <= 0.05 * expected.abs().max()  # 8 bits round their inputs too
        output.sum().backward()
        optimizer.step()
        assert layer.bias.grad.dtype == torch.float32
        assert same_bits(layer.bias.detach(), bias)
    with randlora.disabled(model):
        model(x)
    with randlora.merged(model):
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


def test_an_8_bit_layer_merges_whether_or_not_it_has_run() -> None:
    """Its scales lie in another place afterwards."""
    for has_run in (False, True):
        weight = torch.randn(96, 64)
        base = Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
        base.weight = Int8Params(weight, requires_grad=False)
        model, layer = adapted(base.to("cpu"))
        x = torch.randn(5, 64)
        if has_run:
            model(x)
        assert (layer.state.SCB is not None) == has_run
        wanted = weight + update_of(layer)
        randlora.merge(model)
        found = written_out(model[0])
        assert (found - wanted).abs().max() <= 2 * wanted.abs().max() / 127  # rounded twice by half a step


def test_the_codes_of_a_pickled_layer_are_read_though_it_lost_its_class() -> None:
    """Bitsandbytes leaves the class of the weight behind."""
    model, _ = adapted(four_bits())
    x = torch.randn(5, 64, requires_grad=True)
    twin = pickle.loads(pickle.dumps(model))
    assert not isinstance(twin[0].weight, Params4bit)
    assert same_bits(twin(x), model(x))
    randlora.merge(twin)
    randlora.merge(model)
    assert same_bits(twin(x), model(x))

"""What is torchao's own among the quantized layers of the table: gradients of inputs, scales of blocks, its text."""

from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import randlora
from tests.codes import written_out
from tests.kit import all_bits, fill, same_bits
from tests.laws import assert_close, diagonals, update_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own, of versions of Python and of the compiler

try:
    from torchao import quantization
    from torchao.quantization import Int8Tensor as Int8Tensor
    from torchao.utils import TorchAOBaseTensor
except Exception as error:  # it raises whatever comes of a torch that it was not built for
    pytest.skip(f"torchao does not go with this torch: {error}", allow_module_level=True)

CONFIGS = {
    "int8": quantization.Int8WeightOnlyConfig,
    "int8-inputs": quantization.Int8DynamicActivationInt8WeightConfig,
    "float8": quantization.Float8WeightOnlyConfig,
    "int4": partial(quantization.IntxWeightOnlyConfig, weight_dtype=getattr(torch, "int4", None)),
    "int4-inputs": partial(
        quantization.Int8DynamicActivationIntxWeightConfig,
        weight_dtype=getattr(torch, "int4", None),
        weight_granularity=quantization.granularity.PerAxis(0),
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def quantized(config: Any, *widths: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(before, after, dtype=dtype) for before, after in pairwise(widths)]
    model = nn.Sequential(*layers)
    quantization.quantize_(model, config())
    return model


@every_config
def test_gradients_are_those_of_the_dequantized_layer_and_check_finds_nothing(config: Any) -> None:
    model, x = quantized(config, 12, 8), torch.randn(4, 12, requires_grad=True)
    randlora.inject(model, r=3, targets="all")
    fill(model)
    model(x).sum().backward()
    weight = written_out(model[0]) + update_of(model[0]).detach()
    assert_close(x.grad, weight.sum(0).expand(4, 12), torch.float32)  # type: ignore[arg-type]
    assert all(parameter.grad is not None for parameter in diagonals(model[0]))
    assert model[0].weight.grad is None
    assert not randlora.check(model, x).problems


@every_config
@pytest.mark.parametrize("how", ["requantize", "dequantize"])
def test_adapters_are_merged_one_after_the_other_and_the_state_dict_stays(config: Any, how: Any) -> None:
    model, x = quantized(config, 12, 8), torch.randn(4, 12)
    text = vars(model[0])["extra_repr"]
    for name in ("a", "b"):
        randlora.inject(model, r=3, targets="all", name=name)
        fill(model, name)
    randlora.activate(model, ["a", "b"])
    before, output = all_bits(model.state_dict()), model(x)
    for name in ("a", "b"):
        randlora.merge(model, adapters=name, reversible=True, quantized=how)
        assert all_bits(model.state_dict()) == before
    assert ("extra_repr" in vars(model[0])) == (how == "requantize")  # the text of a quantized layer
    assert (model(x) - output).norm() < 0.2 * output.norm()
    randlora.unmerge(model)
    assert all_bits(model.state_dict()) == before
    assert same_bits(model(x), output)
    assert vars(model[0])["extra_repr"] is text


@pytest.mark.parametrize(("bits", "mapping"), [(2, "SYMMETRIC"), (4, "ASYMMETRIC")])
def test_codes_in_groups_are_merged_into_groups_of_the_same_size(bits: int, mapping: str) -> None:
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=quantization.granularity.PerGroup(8),
        mapping_type=quantization.MappingType[mapping],
    )
    model = quantized(lambda: config, 24, 20)
    randlora.inject(model, r=3, targets="all")
    fill(model)
    layer: Any = model[0]
    exact = written_out(layer) + update_of(layer).detach()
    randlora.merge(model)
    expected = quantized(lambda: config, 24, 20)
    expected[0].weight = nn.Parameter(exact.float(), requires_grad=False)
    quantization.quantize_(expected, config)
    anew: Any = expected[0].weight
    torch.testing.assert_close(layer.weight.scale, anew.scale)
    assert torch.equal(layer.weight.zero_point, anew.zero_point)
    step = layer.weight.scale.repeat_interleave(8, 1)
    assert ((written_out(layer) - exact).abs() <= 1.01 * step).all()  # half of it, and as much where zero is rounded


class Packed(TorchAOBaseTensor):  # type: ignore[misc]  # torchao carries no types
    """A format that is unknown here, as of int4 packed for a GPU."""

    tensor_data_names: ClassVar[list[str]] = ["qdata"]
    tensor_attribute_names: ClassVar[list[str]] = []

    def __new__(cls, qdata: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)

    def __init__(self, qdata: torch.Tensor) -> None:
        self.qdata = qdata


@Packed.implements_torch_function(nn.functional.linear)  # type: ignore[untyped-decorator]
def _product(function: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:  # torchao's signature
    x, weight, bias = args
    return nn.functional.linear(x, weight.qdata / 64, bias)


def test_a_weight_in_an_unknown_format_is_adapted_and_not_merged_into() -> None:
    model, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(4, 12)
    model[0].weight = nn.Parameter(Packed(torch.randint(-40, 41, (8, 12)).float()), requires_grad=False)
    expected = model(x)
    randlora.inject(model, r=3, targets="all")
    fill(model)
    update = update_of(model[0])
    assert_close(model(x), expected + x @ update.T, torch.float32)
    with pytest.raises(randlora.errors.MergeError, match="0 has codes that only the forward of Linear reads"):
        randlora.merge(model)


def test_a_scale_for_blocks_of_rows_is_refused() -> None:
    model = quantized(CONFIGS["int8"], 12, 20)
    weight: Any = model[0].weight
    weight.block_size = [2, 12]
    with pytest.raises(randlora.errors.TargetError, match="a scale for each block"):
        randlora.inject(model, r=3, targets="all")


def test_a_bias_is_trained_with_an_input_without_a_batch() -> None:
    model = quantized(CONFIGS["int8-inputs"], 12, 20)
    randlora.inject(model, r=3, targets="all", train_also=["0.bias"])
    model(torch.randn(12)).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.ones(20))  # type: ignore[arg-type]

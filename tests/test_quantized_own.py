"""A layer of a user's own, with codes in buffers, that merges by rounding or becomes a plain layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from randlora.layers import register_layer
from randlora.quantized import QuantizedLayer
from tests.kit import all_bits, fill, same_bits
from tests.laws import assert_close


class Rounded(nn.Module):
    """A linear layer in int8 with a scale for each row; its bias is a buffer, too."""

    codes: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        codes, scales = rounded(torch.randn(out_features, in_features) / 10)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x @ (self.codes * self.scales).T + self.bias


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, and a scale for each row."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


@register_layer(Rounded)
class RoundedAdapter(QuantizedLayer):
    """Adapts it."""

    @classmethod
    def plain_forward(cls) -> Any:
        """Return the forward that is a product with the dequantized weight."""
        return Rounded.forward

    def written_out(self, owner: Any, held: Any = None) -> Tensor:
        """Dequantize."""
        codes, scales = held or self.codes(owner)
        product: Tensor = codes * scales
        return product

    def requantized(self, owner: nn.Module, weight: Tensor) -> tuple[Any, float]:  # noqa: ARG002
        """Quantize."""
        codes, scales = rounded(weight)
        return (codes, scales), float(scales.max())

    def codes(self, owner: Any) -> Any:
        """Return codes and scales."""
        return owner.codes, owner.scales

    def put_in(self, owner: Any, held: Any) -> None:
        """Replace codes and scales."""
        owner.codes, owner.scales = held


def adapted() -> nn.Sequential:
    """Return such layers with an adapter, the same ones each time."""
    torch.manual_seed(0)
    model = nn.Sequential(Rounded(8, 12), nn.GELU(), Rounded(12, 6))
    randlora.inject(model, r=3, alpha=6)
    return fill(model)


@pytest.mark.parametrize("how", ["requantize", "dequantize"])
def test_a_merge_is_undone_bit_for_bit_and_the_state_dict_stays(how: Any) -> None:
    model, x = adapted(), torch.randn(3, 8)
    before, output = all_bits(model.state_dict()), model(x)
    with randlora.merged(model, quantized=how) as report:
        assert sorted(report.rounding) == (["0", "2"] if how == "requantize" else [])
        assert (model(x) - output).norm() < 0.05 * output.norm()
        assert all_bits(model.state_dict()) == before
    assert all_bits(model.state_dict()) == before
    assert same_bits(model(x), output)


def test_a_plain_layer_has_no_codes_and_the_bias(tmp_path: Path) -> None:
    model, x = adapted(), torch.randn(3, 8)
    output = model(x)
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    tensors = dict(randlora.merged_tensors(model))
    assert [*tensors] == names
    randlora.files.save_merged(model, tmp_path / "merged")
    assert all_bits(load_file(tmp_path / "merged" / "model.safetensors")) == all_bits(tensors)
    randlora.merge(model, quantized="dequantize")
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert all_bits(model.state_dict()) == all_bits(tensors)
    assert [*model.state_dict()] == names
    assert_close(model(x), output.double(), torch.float32)

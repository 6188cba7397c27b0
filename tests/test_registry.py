"""Kinds of layers are found by type or name, the nearest parent first."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import TargetError
from randlora.layers import AdapterLayer, registry
from randlora.layers.linear import Conv1DAdapter, LinearAdapter
from randlora.readers.read_weight import ReadLinear
from tests.laws import adapter_layer

pytestmark = pytest.mark.usefixtures("_own_entries")


@pytest.fixture
def _own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))


class Swapped(nn.Linear):
    """A linear layer that swaps its inputs' halves: a kind of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input.flip(-1))


class Half(AdapterLayer):
    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        assert isinstance(owner, Swapped)
        return owner.in_features, owner.out_features


class SwappedAdapter(Half):
    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        return delta


class Renamed(nn.Linear):
    """A linear layer in all but name."""


def test_a_subclass_is_served_by_its_parents_entry_as_read_if_it_has_another_forward() -> None:
    layers = [nn.Linear(2, 2), Conv1D(2, 2), nn.LayerNorm(2), Renamed(2, 2), Swapped(2, 2)]
    found = [LinearAdapter, Conv1DAdapter, None, LinearAdapter, ReadLinear]
    assert [registry.find_layer(layer) for layer in layers] == found
    randlora.inject(model := nn.Sequential(*layers), r=1, targets="all-linear")
    assert [registry.find_layer(layer) for layer in model] == found


@pytest.mark.parametrize("entry", [Swapped, f"{__name__}.Swapped"], ids=["type", "name"])
def test_an_entry_of_its_own_comes_before_its_parents(entry: Any) -> None:
    with pytest.raises(TypeError, match="Half cannot be registered without in_storage_layout"):
        randlora.layers.register_layer(entry)(Half)
    assert registry.find_layer(Swapped(2, 2)) is ReadLinear
    randlora.layers.register_layer(entry)(SwappedAdapter)
    model, x = nn.Sequential(Swapped(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = model(x)
    randlora.inject(model, r=2, targets="all-linear")
    assert [type(adapter_layer(layer)) for layer in model] == [SwappedAdapter, LinearAdapter]
    assert torch.equal(model(x), expected)


def test_a_refused_kind_is_refused_by_name_and_skipped_by_all_linear() -> None:
    registry.refuse_layer(Renamed, "it is of no use: exclude it")
    model = nn.ModuleDict({"refused": Renamed(8, 8), "linear": nn.Linear(8, 8)})
    report = randlora.plan(model, r=2, targets="all-linear")
    assert (report.targets, report.skipped) == (("linear",), {"refused": "it is of no use: exclude it"})
    with pytest.raises(TargetError, match=r"refused \(Renamed\) cannot be adapted: it is of no use"):
        randlora.inject(model, r=2, targets=["refused"])
    grouped = nn.Sequential(DeepseekV4GroupedLinear(8, 16, 4))
    with pytest.raises(TargetError, match=r"0 \(DeepseekV4GroupedLinear\) cannot be adapted: its forward multiplies"):
        randlora.inject(grouped, r=2, targets=["0"])


@pytest.mark.parametrize("name", ["Llama4Text", "Phimoe"])
def test_routers_that_choose_experts_are_skipped(name: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 20, "head_dim": 8}
    options = {"interleave_moe_layer_step": 1} if name == "Llama4Text" else {"num_experts_per_tok": 2}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes, **options)).eval()
    for rule in ("all", "all-linear"):
        skipped = randlora.plan(model, r=2, targets=rule).skipped
        assert [why for fqn, why in skipped.items() if fqn.endswith("router") and "returns the experts" in why]
    randlora.inject(model, r=2, targets="all")
    model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(("what", "got"), [("pair", "got tuple"), ("half", r"got a tensor of shape \(3, 2\)")])
def test_a_forward_that_returns_no_product_is_an_error(what: str, got: str) -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Any:  # noqa: A002
            output = super().forward(input)
            return (output, output) if what == "pair" else output[:, :2]

    randlora.layers.register_layer(Odd)(LinearAdapter)
    model = nn.Sequential(Odd(4, 4))
    randlora.inject(model, r=2, targets=["0"])
    message = r"the forward of an adapted Odd must return a tensor of shape \(\.\.\., 4\), .*" + got
    with pytest.raises(TypeError, match=message + ".*randlora.layers.register_layer"):
        model(torch.randn(3, 4))

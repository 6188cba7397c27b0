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


@pytest.fixture
def _own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))


class Swapped(nn.Linear):
    """A linear layer that swaps its inputs' halves: a kind of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input.flip(-1))


class SwappedAdapter(AdapterLayer):
    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        assert isinstance(owner, Swapped)
        return owner.in_features, owner.out_features

    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        return delta


def test_layers_are_found_by_type_and_by_name() -> None:
    assert registry.find_layer(nn.Linear(2, 2)) is LinearAdapter
    assert registry.find_layer(Conv1D(2, 2)) is Conv1DAdapter
    assert registry.find_layer(nn.LayerNorm(2)) is None


class Renamed(nn.Linear):
    """A linear layer in all but name."""


def test_a_subclass_is_served_by_its_parents_entry_as_read_if_it_has_another_forward() -> None:
    assert registry.find_layer(Renamed(2, 2)) is LinearAdapter
    assert registry.find_layer(Swapped(2, 2)) is ReadLinear
    model = nn.Sequential(Renamed(2, 2), Swapped(2, 2))
    randlora.inject(model, r=1, targets="all-linear")
    assert [registry.find_layer(layer) for layer in model] == [LinearAdapter, ReadLinear]


@pytest.mark.usefixtures("_own_entries")
def test_an_entry_of_its_own_comes_before_its_parents() -> None:
    randlora.layers.register_layer(Swapped)(SwappedAdapter)
    assert registry.find_layer(Swapped(2, 2)) is SwappedAdapter
    assert registry.find_layer(nn.Linear(2, 2)) is LinearAdapter


@pytest.mark.usefixtures("_own_entries")
def test_registering_by_name_needs_no_import_of_the_type() -> None:
    randlora.layers.register_layer(f"{Swapped.__module__}.Swapped")(SwappedAdapter)
    model = nn.Sequential(Swapped(4, 4))
    x = torch.randn(2, 4)
    expected = model(x)
    randlora.inject(model, r=2, targets="all-linear")
    assert isinstance(adapter_layer(model[0]), SwappedAdapter)
    assert torch.equal(model(x), expected)


def test_a_kind_without_one_of_its_two_methods_is_refused() -> None:
    class Half(AdapterLayer):
        @staticmethod
        def features(owner: nn.Module) -> tuple[int, int]:
            assert owner is not None
            return 1, 1

    with pytest.raises(TypeError, match="Half cannot be registered without in_storage_layout"):
        randlora.layers.register_layer(Swapped)(Half)
    assert registry.find_layer(Swapped(2, 2)) is ReadLinear


def test_a_refused_kind_is_refused_by_name_and_skipped_by_all_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(nn.Linear):
        pass

    monkeypatch.setattr(registry, "_layers", dict(registry._layers))
    registry.refuse_layer(Refused, "it is of no use: exclude it")
    model = nn.ModuleDict({"refused": Refused(8, 8), "linear": nn.Linear(8, 8)})
    report = randlora.plan(model, r=2, targets="all-linear")
    assert report.targets == ("linear",)
    assert report.skipped == {"refused": "it is of no use: exclude it"}
    with pytest.raises(TargetError, match=r"refused \(Refused\) cannot be adapted: it is of no use"):
        randlora.inject(model, r=2, targets=["refused"])


def routed(name: str) -> nn.Module:
    """Build a tiny model of experts with a router that is a linear layer by its class."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 20, "head_dim": 8}
    if name == "phimoe":
        return transformers.PhimoeModel(transformers.PhimoeConfig(**sizes, num_experts_per_tok=2)).eval()  # type: ignore[no-any-return]
    config = transformers.Llama4TextConfig(**sizes, num_experts_per_tok=1, interleave_moe_layer_step=1)
    return transformers.Llama4TextModel(config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", ["all", "all-linear"])
@pytest.mark.parametrize("name", ["llama4", "phimoe"])
def test_routers_that_choose_experts_are_skipped(name: str, rule: str) -> None:
    model = routed(name)
    report = randlora.inject(model, r=2, targets=rule)
    assert [why for fqn, why in report.skipped.items() if fqn.endswith("router") and "returns the experts" in why]
    model(torch.tensor([[1, 2, 3]]))


def test_a_grouped_linear_layer_is_refused() -> None:
    model = nn.Sequential(DeepseekV4GroupedLinear(8, 16, 4))
    with pytest.raises(TargetError, match=r"0 \(DeepseekV4GroupedLinear\) cannot be adapted: its forward multiplies"):
        randlora.inject(model, r=2, targets=["0"])


@pytest.mark.usefixtures("_own_entries")
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

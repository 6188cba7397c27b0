"""Kinds of layers are found by type or name, the nearest parent first."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora import AdapterLayer
from randlora.errors import TargetError
from randlora.layers import registry
from randlora.layers.conv1d import Conv1DAdapter
from randlora.layers.linear import LinearAdapter
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


def test_a_subclass_is_served_by_its_parents_entry() -> None:
    assert registry.find_layer(Swapped(2, 2)) is LinearAdapter


@pytest.mark.usefixtures("_own_entries")
def test_an_entry_of_its_own_comes_before_its_parents() -> None:
    randlora.register_layer(Swapped)(SwappedAdapter)
    assert registry.find_layer(Swapped(2, 2)) is SwappedAdapter
    assert registry.find_layer(nn.Linear(2, 2)) is LinearAdapter


@pytest.mark.usefixtures("_own_entries")
def test_registering_by_name_needs_no_import_of_the_type() -> None:
    randlora.register_layer(f"{Swapped.__module__}.Swapped")(SwappedAdapter)
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
        randlora.register_layer(Swapped)(Half)
    assert registry.find_layer(Swapped(2, 2)) is LinearAdapter


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

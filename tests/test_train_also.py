"""What trains beside an adapter: modules, single parameters, by name or regex."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Embedding4bit
from torch import nn

import randlora
from randlora.errors import TargetError
from randlora.model.train_also import select_parameters
from randlora.targets.walk import Census
from tests.kit import assert_unchanged, bits, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.quantized import of_4_bits


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["head"], ["head.weight", "head.bias"]),
        (["head.bias"], ["head.bias"]),
        (["bias"], ["q.bias", "down.bias", "norm.bias", "head.bias"]),
        (r"(q|down)\.bias", ["q.bias", "down.bias"]),
        (r"norm", ["norm.weight", "norm.bias"]),
        (["norm", "head.bias"], ["norm.weight", "norm.bias", "head.bias"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("adapted", [False, True])
def test_names_mean_modules_or_parameters(names: list[str] | str, expected: list[str], adapted: bool) -> None:
    model = Mixed()
    if adapted:
        randlora.inject(model, r=4)
    assert select_parameters(Census.of(model), names) == expected


def test_a_tied_parameter_goes_by_its_first_name() -> None:
    model = Mixed()
    model.twin = nn.Embedding(11, 12)
    model.twin.weight = model.embed.weight
    assert select_parameters(Census.of(model), ["twin"]) == ["embed.weight"]


def test_the_bias_of_an_adapted_layer_trains_and_comes_back() -> None:
    model = Mixed()
    before = snapshot(model)
    randlora.inject(model, r=4, train_also=["q.bias"])
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=1.0)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    trained = model.get_parameter("q.bias")
    assert bits(trained) != before["value q.bias"]
    randlora.eject(model)
    assert_unchanged(model, before)


def test_copies_start_from_the_models_own_values_and_not_from_another_adapters() -> None:
    model = Mixed()
    own = model.head.weight.detach().clone()
    randlora.inject(model, r=4, train_also=["head"])
    with torch.no_grad():
        model.head.weight.add_(1)
    randlora.inject(model, r=4, name="b", train_also=["head"], active=True)
    assert same_bits(model.head.weight, own)


@pytest.mark.parametrize("targets", [None, "all", "all-linear"])
@pytest.mark.parametrize("names", [["q"], ["q.weight"], r"q(\..*)?"], ids=str)
def test_what_is_trained_itself_is_not_adapted_by_a_rule(targets: str | None, names: list[str] | str) -> None:
    options: dict[str, Any] = {"targets": targets, "train_also": names}
    with_it = randlora.plan(Mixed(), r=4, targets=targets)
    model = Mixed()
    report = randlora.inject(model, r=4, **options)
    assert "q" in with_it.targets
    assert report.targets == tuple(fqn for fqn in with_it.targets if fqn != "q")
    assert "q.weight" in report.train_also
    assert report == randlora.plan(Mixed(), r=4, **options)


def test_nor_is_a_tied_one_by_its_other_name() -> None:
    model = Mixed()
    model.twin = nn.Embedding(11, 12)
    model.twin.weight = model.embed.weight
    assert "embed" not in randlora.inject(model, r=4, targets="all", train_also=["twin"]).targets


def test_a_layer_that_the_user_names_twice_is_an_error() -> None:
    for targets in (["q", "down"], r"q|down", lambda fqn, _: fqn in ("q", "down")):
        model = Mixed()
        with (
            untouched(model),
            pytest.raises(TargetError, match=r"train_also includes q\.weight, which the targets name"),
        ):
            randlora.inject(model, r=4, targets=targets, train_also=["q"])


def test_a_default_of_which_all_is_trained_itself_says_what_is_left() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), flat=nn.Flatten(), fc=nn.Linear(8, 4)))
    with (
        untouched(model),
        pytest.raises(TargetError, match=r"no layer is left .*fc \(trained by train_also\).*targets="),
    ):
        randlora.inject(model, r=2, train_also=["fc"])
    assert randlora.inject(model, r=2, targets="all", train_also=["fc"]).targets == ("conv",)


def test_integers_cannot_be_trained() -> None:
    model = Mixed()
    model.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TargetError, match=r"train_also includes steps of dtype torch\.int64"):
        randlora.inject(model, r=4, train_also=["steps"])


def test_buffers_that_no_file_holds_may_stand_in_a_module_that_is_trained() -> None:
    """A private name of torch alone tells them apart: see randlora/model/train_also.py."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_buffer("cache", torch.zeros(4), persistent=False)
    report = randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    assert report.train_also == ("1.weight", "1.bias")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_nor_can_those_of_a_quantized_embedding(storage: torch.dtype) -> None:
    embedding = Embedding4bit(16, 64, quant_type="nf4", quant_storage=storage)
    model = nn.Sequential(OrderedDict(embed=embedding, body=nn.Linear(64, 64))).to("cpu")
    with pytest.raises(TargetError, match=r"embed\.weight, which is quantized \(Embedding4bit\)"):
        randlora.inject(model, r=4, targets=["body"], train_also=["embed"])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("names", [["head"], ["head.weight"], r"head\.weight"], ids=str)
def test_the_codes_of_a_quantized_layer_cannot_be_trained_and_its_bias_can(
    storage: torch.dtype, names: list[str] | str
) -> None:
    model = nn.Sequential(OrderedDict(body=nn.Linear(64, 64), head=of_4_bits(64, 8, quant_storage=storage)))
    with (
        untouched(model),
        pytest.raises(TargetError, match=r"head\.weight, which is quantized \(Linear4bit\).*name only its bias"),
    ):
        randlora.inject(model, r=4, targets=["body"], train_also=names)
    assert randlora.inject(model, r=4, targets=["body"], train_also=["head.bias"]).train_also == ("head.bias",)

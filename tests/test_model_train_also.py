"""What trains beside an adapter, what is said of one that nothing has trained, and flags that come back."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Embedding4bit
from torch import nn
from torch.nn.utils import prune

import randlora
from randlora.errors import TargetError
from tests.kit import assert_unchanged, bits, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.quantized import of_4_bits

NAMES: list[tuple[list[str] | str, list[str]]] = [
    (["head"], ["head.weight", "head.bias"]),
    (["bias"], ["q.bias", "down.bias", "norm.bias", "head.bias"]),
    (r"(q|down)\.bias", ["q.bias", "down.bias"]),
    (r"norm", ["norm.weight", "norm.bias"]),
    (["norm", "head.bias"], ["norm.weight", "norm.bias", "head.bias"]),
    (["twin"], ["embed.weight"]),  # a tied parameter goes by its first name
]


@pytest.mark.parametrize("is_adapted", [False, True])
def test_names_mean_modules_or_parameters(is_adapted: bool) -> None:
    model = Mixed()
    model.twin = nn.Embedding(11, 12)
    model.twin.weight = model.embed.weight
    if is_adapted:
        randlora.inject(model, r=4)
    for names, expected in NAMES:
        assert [*randlora.plan(model, r=4, train_also=names, name="b").train_also] == expected
    assert "embed" not in randlora.plan(model, r=4, targets="all", train_also=["twin"], name="b").targets


def test_the_bias_of_an_adapted_layer_trains_and_comes_back() -> None:
    model = Mixed()
    before, own = snapshot(model), model.head.weight.detach().clone()
    randlora.inject(model, r=4, train_also=["q.bias", "head"])
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=1.0)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert bits(model.q.bias) != before["value q.bias"]
    assert not same_bits(model.head.weight, own)
    randlora.inject(model, r=4, name="b", train_also=["head"], active=True)
    assert same_bits(model.head.weight, own), "copies start from the model's own values"
    randlora.eject(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("targets", "names"), [(None, ["q"]), ("all", ["q.weight"]), ("all-linear", r"q(\..*)?")], ids=str
)
def test_what_is_trained_itself_is_not_adapted_by_a_rule(targets: str | None, names: list[str] | str) -> None:
    options: dict[str, Any] = {"targets": targets, "train_also": names}
    with_it = randlora.plan(Mixed(), r=4, targets=targets)
    report = randlora.inject(Mixed(), r=4, **options)
    assert "q" in with_it.targets
    assert report.targets == tuple(fqn for fqn in with_it.targets if fqn != "q")
    assert "q.weight" in report.train_also
    assert report == randlora.plan(Mixed(), r=4, **options)


def with_steps() -> nn.Module:
    model = Mixed()
    model.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    return model


def with_codes(storage: torch.dtype) -> nn.Module:
    return nn.Sequential(OrderedDict(body=nn.Linear(64, 64), head=of_4_bits(64, 8, quant_storage=storage)))


def convolutions() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), flat=nn.Flatten(), fc=nn.Linear(8, 4)))


NAMED_TWICE = r"train_also includes q\.weight, which the targets name"
CODES = r"head\.weight, which is quantized \(Linear4bit\).*name only its bias"
REFUSED: list[tuple[Callable[[], nn.Module], Any, Any, str]] = [
    (Mixed, ["q", "down"], ["q"], NAMED_TWICE),
    (Mixed, r"q|down", ["q"], NAMED_TWICE),
    (Mixed, lambda fqn, _: fqn in ("q", "down"), ["q"], NAMED_TWICE),
    (convolutions, None, ["fc"], r"no layer is left .*fc \(trained by train_also\).*targets="),
    (with_steps, None, ["steps"], r"train_also includes steps of dtype torch\.int64"),
    (partial(with_codes, torch.uint8), ["body"], ["head"], CODES),
    (partial(with_codes, torch.bfloat16), ["body"], r"head\.weight", CODES),
]


def test_what_cannot_be_trained_is_refused_and_what_stands_beside_it_is_not() -> None:
    for build, targets, names, message in REFUSED:
        model = build()
        with untouched(model), pytest.raises(TargetError, match=message):
            randlora.inject(model, r=2, targets=targets, train_also=names)
    assert randlora.inject(convolutions(), r=2, targets="all", train_also=["fc"]).targets == ("conv",)
    model = with_codes(torch.bfloat16)
    assert randlora.inject(model, r=4, targets=["body"], train_also=["head.bias"]).train_also == ("head.bias",)
    model = nn.Sequential(Embedding4bit(16, 64, quant_storage=torch.bfloat16), nn.Linear(64, 64)).to("cpu")
    with pytest.raises(TargetError, match=r"0\.weight, which is quantized \(Embedding4bit\)"):
        randlora.inject(model, r=4, targets=["1"], train_also=["0"])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_buffer("cache", torch.zeros(4), persistent=False)
    assert randlora.inject(model, r=2, targets=["0"], train_also=["1"]).train_also == ("1.weight", "1.bias")


NOTE = "is exactly zero in all layers"


def notes(model: nn.Module, directory: Path) -> tuple[bool, bool]:
    """Return whether `save` and `merge` have the note."""
    saved, merged = randlora.save(model, directory).notes, randlora.merge(model, reversible=True).notes
    randlora.unmerge(model)
    return any(NOTE in note for note in saved), any(NOTE in note for note in merged)


@pytest.mark.parametrize(("init", "also"), [("lambda", None), ("gamma", ["head"])])
def test_an_adapter_that_nothing_has_trained_is_told_of(init: Any, also: list[str] | None, tmp_path: Path) -> None:
    model = Mixed()
    too_early = list(model.parameters())
    randlora.inject(model, r=4, init=init, train_also=also)
    for _ in range(2):
        model(TOKENS).square().mean().backward()
        torch.optim.SGD(too_early, lr=1e-2).step()  # which was made before inject, for all that it trains
    assert notes(model, tmp_path) == (True, True)
    (note,) = (note for note in randlora.save(model, tmp_path).notes if NOTE in note)
    assert "made before inject" in note
    assert ("train_also" in note) == (also is not None)
    moved = model.head.bias if also else randlora.trainable_parameters(model)[0]
    moved.data.view(-1)[-1] += 1e-6  # one number is enough
    assert notes(model, tmp_path) == (False, False)
    randlora.inject(model, r=4, name="b", targets=["q"])
    randlora.activate(model, ["default", "b"])
    (note,) = (note for note in randlora.merge(model, reversible=True).notes if NOTE in note)
    assert "'b'" in note
    saved = [any(NOTE in each for each in report.notes) for report in randlora.save_all(model, tmp_path)]
    assert saved == [False, True]


def moved(model: nn.Module) -> nn.Module:
    model.add_module("elsewhere", model._modules.pop("1"))
    return model


def pruned(model: nn.Module) -> nn.Module:
    prune.random_unstructured(model.get_submodule("5"), "weight", amount=0.5)
    return model


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def thawed(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def swapped(model: nn.Module) -> nn.Module:
    """Convert as torch does tensors of other classes, such as those of a sharded or a quantized model."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "changes",
    [
        (thawed, moved),
        (pruned, thawed),
        (moved, pickled, thawed),
        (assigned, copy.deepcopy, thawed, assigned),
        (pickled, assigned, pickled, swapped, copy.deepcopy),
    ],
)
def test_flags_come_back_to_the_parameters_they_were_of(changes: tuple[Callable[[nn.Module], nn.Module], ...]) -> None:
    """Not if a parameter is replaced or copied and renamed, as it then has nothing that tells which it was."""
    model: nn.Module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7)))
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 3 > 0
    of_value = {bits(parameter): parameter.requires_grad for parameter in model.parameters()}
    randlora.inject(model, r=2, targets=["0", "2"], train_also=["1.bias"])
    for change in changes:
        model = change(model)
    randlora.eject(model)
    assert {bits(parameter): parameter.requires_grad for parameter in model.parameters()} == of_value
    assert not any(vars(parameter) for parameter in model.parameters()), "no mark is left"

"""`inject`, `plan` and `eject`: what they change, and what they must not; where a model keeps its adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

import randlora
from randlora import RandLoRAConfig
from randlora.errors import AdapterError, ConfigError, RandLoRAError, TargetError
from randlora.state import adapted_root, is_adapted
from tests.kit import assert_unchanged, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.models import llama
from tests.strategies import KINDS_AND_STREAMS, seeds

ADAPTED = ("q", "up", "down")


@given(kind=st.sampled_from(KINDS_AND_STREAMS), r=st.integers(3, 12), seed=seeds)
def test_a_fresh_adapter_leaves_every_bit_of_a_models_output(kind: tuple[str, str], r: int, seed: int) -> None:
    model, options = Mixed(), {"r": r, "seed": seed, "basis": kind[0], "stream": kind[1]}
    before = model(TOKENS)
    try:
        with untouched(model):
            planned = randlora.plan(model, **options)  # type: ignore[arg-type]
        assert randlora.inject(model, **options) == planned  # type: ignore[arg-type]
    except ConfigError:  # a ternary draw of so few numbers may be all zeros
        assert kind[0] == "very_sparse"
        reject()
    assert same_bits(model(TOKENS), before)


def test_inject_adapts_every_linear_layer_but_the_head_and_freezes_the_rest() -> None:
    model, twin = Mixed().eval(), Mixed()
    modules, tensors = {name for name, _ in model.named_modules()}, {*model.state_dict()}
    report = randlora.inject(model, r=4)
    added = {f"{fqn}.randlora_{part}" for fqn in ADAPTED for part in ("lambda", "gamma")}
    assert report.targets == ADAPTED
    assert {name for name, _ in model.named_modules()} - modules == added
    assert {*model.state_dict()} - tensors == {f"{name}.default" for name in added}
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {model.get_parameter(f"{name}.default") for name in added}
    assert trainable == {*randlora.trainable_parameters(model)}
    assert not any(module.training for module in model.modules())
    randlora.inject(twin, r=4)
    twin.load_state_dict(fill(model).state_dict())
    assert same_bits(twin(TOKENS), model(TOKENS))


def test_a_layer_used_in_two_places_is_adapted_once() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(torch.tensor(4), torch.tensor(4))  # type: ignore[arg-type]  # as in Inkling
    report = randlora.inject(model, r=2)
    assert (report.targets, report.rows[0].in_features) == (("first",), 4)
    randlora.eject(model)
    assert type(model.first) is nn.Linear
    assert model.first is model.second


def test_a_target_inside_a_target_is_adapted_too_and_ejected_too() -> None:
    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            output: Tensor = super().forward(self.inner(input))
            return output

    model, x = nn.Sequential(Outer()), torch.randn(2, 4)
    outer, expected = model[0], model(x)
    assert randlora.inject(model, r=2, targets="all-linear").targets == ("0", "0.inner")
    assert same_bits(model(x), expected)
    assert not torch.allclose(fill(model)(x), expected)
    randlora.eject(model)
    assert (model[0], type(outer.inner)) == (outer, nn.Linear)
    assert same_bits(model(x), expected)


def test_eject_gives_back_the_original_objects_and_every_bit_also_of_what_inference_mode_made() -> None:
    model = Mixed()
    model.norm.requires_grad_(False)
    before, expected = snapshot(model), model(TOKENS)
    with torch.inference_mode():
        randlora.inject(model, r=4, train_also=["norm", "q.bias"])
        model(TOKENS)
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model(TOKENS), expected)
    model.later = nn.Linear(12, 2)
    assert randlora.eject(model) == ADAPTED
    assert model.later.weight.requires_grad
    del model.later
    assert_unchanged(model, before)


REFUSED: list[tuple[dict[str, Any], type[RandLoRAError], str]] = [
    ({"r": 0}, ConfigError, "r must be a positive integer"),
    ({"r": 1, "basis": "very_sparse", "seed": 7, "targets": ["q"]}, ConfigError, "standard deviation of 0"),
    ({"targets": "nothing"}, TargetError, "'nothing' matches no layer or weight that can be adapted; the nearest "),
    ({"exclude": "q|up|down"}, TargetError, "no layer is left to adapt"),
    ({"train_also": ["hed"]}, TargetError, r"train_also='hed' matches no module .* are .*head"),
    ({"targets": ["q"], "train_also": ["q"]}, TargetError, "train_also includes q.weight, which the targets name too"),
    ({"targets": ["q"], "train_also": ["q", "hed"]}, TargetError, "2 problems"),
    ({"config": RandLoRAConfig(), "r": 4}, ConfigError, "either config= or single options"),
    ({"config": RandLoRAConfig(), "seed": 4, "r": None}, ConfigError, "either config= or single"),
    *(({"name": name}, AdapterError, "expected a printable name without dots") for name in ("", "a.b", "a\nb")),
    *(
        ({"name": name}, AdapterError, "not an attribute of ParameterDict or a keyword of Python")
        for name in ("class", "keys", "training")
    ),
    ({"name": "taken"}, AdapterError, "has an adapter of that name; remove it"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_cannot_work_is_refused_before_anything_changes(
    options: dict[str, Any], error: type[RandLoRAError], message: str
) -> None:
    model = Mixed()
    randlora.inject(model, r=4, targets=["down"], name="taken")
    with untouched(model), pytest.raises(error, match=message):
        randlora.inject(model, **{"r": 4, **options})


def test_adapters_of_a_part_and_of_the_whole_are_kept_apart() -> None:
    for inner_first in (True, False):
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
        first, second = (model[0], model) if inner_first else (model, model[0])
        randlora.inject(first, r=2, targets="all-linear")
        with untouched(first), pytest.raises(AdapterError, match="has adapters that were added to a different module"):
            randlora.inject(second, r=2, targets="all-linear", name="other")


def test_uninitialized_layers_that_are_no_targets_do_not_matter(tmp_path: Path) -> None:
    unused = nn.LazyConv1d(2, 1)
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3), nn.Sequential(unused))
    with untouched(model):
        planned = randlora.plan(model, r=2, targets="0")
    assert randlora.inject(model, r=2, targets="0").targets == planned.targets == ("0",)
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    randlora.save(fill(model), tmp_path / "adapter")
    with randlora.merged(model):
        pass
    adapted = model[:2](torch.ones(2, 4))  # the first forward initializes the second layer
    assert (adapted.shape, isinstance(unused.weight, UninitializedParameter)) == ((2, 3), True)
    randlora.eject(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with untouched(model), pytest.raises(TargetError, match=r"2\.0 is of type LazyConv1d|2\.0 .*no shape yet"):
        randlora.inject(model, r=2, targets=r"2\.0")


def test_buffers_without_values_that_no_state_dict_has_are_spoken_of_when_the_model_changes() -> None:
    with torch.device("meta"):
        model, unused = llama(), Mixed()
    before = dict(unused.named_modules())
    assert randlora.plan(unused, r=4).targets == ADAPTED
    assert (dict(unused.named_modules()), randlora.adapters(unused)) == (before, [])
    (note,) = randlora.inject(model, r=2).notes
    assert note.startswith(
        "no values: model.rotary_emb.inv_freq, model.rotary_emb.original_inv_freq on the meta device"
    )
    assert randlora.plan(llama(), r=2).notes == randlora.inject(llama(), r=2).notes == ()


def test_a_wrapper_shows_the_adapters_inside_it_and_those_of_two_parts_cannot_be_told_apart() -> None:
    first, second = Mixed(), Mixed()
    model = nn.Sequential(nn.Sequential(first, second))
    assert not is_adapted(model)
    randlora.inject(first, r=4)
    assert is_adapted(model)
    assert adapted_root(model)[0] is first
    randlora.inject(second, r=4)
    with pytest.raises(AdapterError, match=r"several submodules have adapters \(0\.0, 0\.1\): call this"):
        randlora.merge(model)

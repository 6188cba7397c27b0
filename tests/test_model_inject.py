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
from randlora.layers import AdapterLayer
from randlora.state import adapted_root, attached_state, is_adapted
from tests.kit import assert_unchanged, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed, adapted_names
from tests.models import llama
from tests.strategies import KINDS_AND_STREAMS, ranks, seeds

ADAPTED = ("q", "up", "down")


def trained_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


# What inject does


@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
@given(r=st.integers(3, 12), seed=seeds)
def test_a_fresh_adapter_leaves_every_bit_of_a_models_output(basis: str, stream: str, r: int, seed: int) -> None:
    model = Mixed()
    before = model(TOKENS)
    options: dict[str, Any] = {"basis": basis, "stream": stream}
    try:
        randlora.inject(model, r=r, seed=seed, **options)
    except ConfigError:  # a ternary draw of so few numbers may be all zeros
        assert basis == "very_sparse"
        reject()
    assert same_bits(model(TOKENS), before)


def test_inject_wraps_every_linear_layer_but_the_head_and_freezes_the_rest() -> None:
    model = Mixed()
    report = randlora.inject(model, r=4)
    assert report.targets == ADAPTED
    assert adapted_names(model) == set(ADAPTED)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{fqn}.randlora_{part}.default" for fqn in ADAPTED for part in ("lambda", "gamma")}
    assert {id(parameter) for parameter in randlora.trainable_parameters(model)} == {
        id(model.get_parameter(name)) for name in trainable
    }


def test_what_is_added_keeps_the_mode_of_its_layer() -> None:
    model = Mixed().eval()
    randlora.inject(model, r=4)
    assert not any(module.training for module in model.modules())


def test_adapters_made_in_inference_mode_can_be_trained_later() -> None:
    model = Mixed()
    with torch.inference_mode():
        randlora.inject(model, r=4, train_also=["head"])
        model(TOKENS)
    trained_step(model)


def test_a_layer_used_in_two_places_is_adapted_once() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.second = model.first
    report = randlora.inject(model, r=2)
    assert report.targets == ("first",)
    assert model.first is model.second
    assert adapted_names(model) == {"first"}
    randlora.eject(model)
    assert model.first is model.second
    assert type(model.first) is nn.Linear


def test_a_target_inside_a_target_is_adapted_too_and_ejected_too() -> None:
    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            output: Tensor = super().forward(self.inner(input))
            return output

    model = nn.Sequential(Outer())
    outer, x = model[0], torch.randn(2, 4)
    expected = model(x)
    report = randlora.inject(model, r=2, targets="all-linear")
    assert report.targets == ("0", "0.inner")
    assert same_bits(model(x), expected)
    fill(model)
    assert not torch.allclose(model(x), expected)
    randlora.eject(model)
    assert model[0] is outer
    assert type(outer.inner) is nn.Linear
    assert same_bits(model(x), expected)


# plan


@given(r=ranks)
def test_plan_reports_what_inject_does_and_touches_nothing(r: int) -> None:
    model = Mixed()
    with untouched(model):
        planned = randlora.plan(model, r=r, stream="portable", train_also=["head"])
    assert randlora.inject(model, r=r, stream="portable", train_also=["head"]) == planned


@pytest.mark.parametrize("flag", ["active", "trainable"])
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("count", [0, 1], ids=["first", "second"])
def test_plan_reports_the_state_that_inject_is_asked_for(flag: str, value: bool, count: int) -> None:
    model = Mixed()
    for number in range(count):
        randlora.inject(model, r=4, name=f"before{number}")
    planned = randlora.plan(model, r=4, **{flag: value})  # type: ignore[arg-type]
    assert vars(planned)[f"is_{flag}"] == value
    assert randlora.inject(model, r=4, **{flag: value}) == planned  # type: ignore[arg-type]


def test_plan_works_on_a_model_without_values() -> None:
    with torch.device("meta"):
        model = Mixed()
    before = dict(model.named_modules())
    assert randlora.plan(model, r=4).targets == ADAPTED
    assert dict(model.named_modules()) == before
    assert randlora.adapters(model) == []


# Law 4: eject


@given(
    basis=st.sampled_from(["dense", "block"]), also=st.sampled_from([None, ["head"], r".*\.bias", ["norm", "q.bias"]])
)
def test_eject_gives_back_the_original_objects_and_every_bit(basis: str, also: list[str] | str | None) -> None:
    model = Mixed()
    model.norm.requires_grad_(False)
    before, expected = snapshot(model), model(TOKENS)
    randlora.inject(model, r=4, basis=basis, train_also=also)  # type: ignore[arg-type]
    trained_step(model)
    assert not torch.allclose(model(TOKENS), expected)
    assert randlora.eject(model) == ADAPTED
    assert_unchanged(model, before)
    assert same_bits(model(TOKENS), expected)


# Law 10: a call that raises leaves the model as it was


REFUSED: list[tuple[dict[str, Any], type[RandLoRAError], str]] = [
    ({"r": 0}, ConfigError, "r must be a positive integer"),
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
        for name in ("class", "keys", "reset_parameters", "training", "_parameters")
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


def test_bases_that_cannot_be_drawn_are_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with untouched(model), pytest.raises(ConfigError, match="standard deviation of 0"):
        randlora.inject(model, r=1, basis="very_sparse", seed=7, targets="all-linear")


def test_running_out_of_memory_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixed()
    calls = []
    original = AdapterLayer.fresh_diagonals.__func__  # type: ignore[attr-defined]

    def fail_at_the_last(kind: type[AdapterLayer], owner: nn.Module, *args: Any) -> tuple[Tensor, Tensor]:
        calls.append(owner)
        if len(calls) == len(ADAPTED):
            raise MemoryError
        values: tuple[Tensor, Tensor] = original(kind, owner, *args)
        return values

    monkeypatch.setattr(AdapterLayer, "fresh_diagonals", classmethod(fail_at_the_last))
    with untouched(model), pytest.raises(MemoryError):
        randlora.inject(model, r=4, train_also=["head"])


@pytest.mark.parametrize("inner_first", [True, False])
def test_adapters_of_a_part_and_of_the_whole_are_kept_apart(inner_first: bool) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    first, second = (model[0], model) if inner_first else (model, model[0])
    randlora.inject(first, r=2, targets="all-linear")
    with untouched(first), pytest.raises(AdapterError, match="has adapters that were added to a different module"):
        randlora.inject(second, r=2, targets="all-linear", name="other")


def test_what_was_added_after_inject_stays_trainable() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    model.new_head = nn.Linear(12, 2)
    randlora.eject(model)
    assert model.new_head.weight.requires_grad


def test_a_report_of_a_further_adapter_says_that_it_rests() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    report = randlora.inject(model, r=4, name="b")
    assert report.notes == (
        "inactive: call randlora.activate(model, 'b') to add its update",
        "frozen: call randlora.set_trainable(model, 'b') to train it",
    )


def test_uninitialized_layers_that_are_no_targets_do_not_matter(tmp_path: Path) -> None:
    unused = nn.LazyConv1d(2, 1)
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(3), nn.Sequential(unused))
    with untouched(model):
        planned = randlora.plan(model, r=2, targets="0")
    assert randlora.inject(model, r=2, targets="0").targets == planned.targets == ("0",)
    assert not any(parameter.requires_grad for parameter in model[1].parameters())
    fill(model)
    randlora.save(model, tmp_path / "adapter")
    with randlora.merged(model):
        pass
    adapted = model[:2](torch.ones(2, 4))  # the first forward initializes the second layer
    assert (adapted.shape, isinstance(unused.weight, UninitializedParameter)) == ((2, 3), True)
    randlora.eject(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with untouched(model), pytest.raises(TargetError, match=r"2\.0 is of type LazyConv1d|2\.0 .*no shape yet"):
        randlora.inject(model, r=2, targets=r"2\.0")


def test_sizes_of_layers_that_are_tensors_are_numbers() -> None:
    model = nn.Sequential(nn.Linear(torch.tensor(6), torch.tensor(8)))  # type: ignore[arg-type]  # as in Inkling
    assert randlora.inject(model, r=2).rows[0].in_features == 6


def test_buffers_without_values_that_no_state_dict_has_are_spoken_of_when_the_model_changes() -> None:
    with torch.device("meta"):
        model = llama()
    (note,) = randlora.inject(model, r=2).notes
    assert note.startswith(
        "no values: model.rotary_emb.inv_freq, model.rotary_emb.original_inv_freq on the meta device"
    )
    assert randlora.plan(llama(), r=2).notes == randlora.inject(llama(), r=2).notes == ()


def test_the_state_stays_out_of_the_models_own_books() -> None:
    model = Mixed()
    modules, tensors = set(dict(model.named_modules())), set(model.state_dict())
    randlora.inject(model, r=4, targets=["q"])
    assert set(dict(model.named_modules())) - modules == {"q.randlora_lambda", "q.randlora_gamma"}
    assert {name for name in model.state_dict() if not name.startswith("q.")} == {n for n in tensors if n[:2] != "q."}
    assert attached_state(model) is not None


def test_a_wrapper_shows_the_adapters_inside_it() -> None:
    model = Mixed()
    wrapper = nn.Sequential(nn.Sequential(model))
    assert not is_adapted(wrapper)
    randlora.inject(model, r=4)
    assert is_adapted(wrapper)
    assert adapted_root(wrapper)[0] is model


def test_two_parts_with_adapters_of_their_own_cannot_be_told_apart() -> None:
    model = nn.Sequential(Mixed(), Mixed())
    for part in model:
        randlora.inject(part, r=4)
    with pytest.raises(AdapterError, match=r"several submodules have adapters \(0, 1\): call this on one of them"):
        randlora.merge(model)


def test_an_adapted_models_state_dict_loads_into_its_twin() -> None:
    model, twin = Mixed(), Mixed()
    for each in (model, twin):
        randlora.inject(each, r=4, train_also=["head"])
    twin.load_state_dict(model.state_dict())
    assert same_bits(twin(TOKENS), model(TOKENS))

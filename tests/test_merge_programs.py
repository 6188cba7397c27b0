"""Programs made of a merged model compute the merged weights, also after the model is unmerged."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import randlora
from tests.kit import fill
from tests.laws import assert_close, needs_compiler, needs_export

X = torch.linspace(-1, 1, 24).reshape(3, 8)
Program = Callable[[Tensor], Tensor]


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    randlora.inject(model, r=2, targets="all")
    return fill(model)


def exported(model: nn.Module) -> Program:
    module: Program = torch.export.export(model, (X,)).module()
    return module


def traced(model: nn.Module) -> Program:
    program: Program = torch.jit.trace(model, (X,))
    return program


def compiled(model: nn.Module) -> Program:
    return torch.compile(model, backend="eager")


PROGRAMS = [
    pytest.param(exported, marks=[needs_export, pytest.mark.medium]),
    pytest.param(traced, marks=pytest.mark.filterwarnings("ignore:`torch.jit.trace")),
    pytest.param(compiled, marks=[needs_compiler, pytest.mark.medium]),
]


@pytest.mark.parametrize("make", PROGRAMS)
def test_a_program_of_a_merged_model_stays_what_it_was_after_unmerging(make: Callable[[nn.Module], Program]) -> None:
    model = adapted()
    expected = model(X)
    with randlora.merged(model):
        program = make(model)
        assert_close(program(X), expected, torch.float32)
    assert_close(program(X), expected, torch.float32)
    assert_close(model(X), expected, torch.float32)


@pytest.mark.parametrize("make", PROGRAMS)
def test_a_program_of_a_model_merged_for_good_has_no_adapter(make: Callable[[nn.Module], Program]) -> None:
    model = adapted()
    expected = model(X)
    randlora.merge(model)
    program = make(model)
    assert_close(program(X), expected, torch.float32)
    assert not [name for name in getattr(program, "state_dict", dict)() if "randlora" in name]


def test_merging_for_good_changes_the_parameters_that_an_optimizer_holds() -> None:
    model = adapted()
    held = {name: parameter for name, parameter in model.named_parameters() if "randlora" not in name}
    randlora.merge(model)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


def test_unmerging_puts_the_parameters_themselves_back() -> None:
    model = adapted()
    held = dict(model.named_parameters())
    held["1.weight"].sharded = True  # type: ignore[attr-defined]  # as libraries mark parameters
    with randlora.merged(model):
        assert model.get_parameter("1.weight") is not held["1.weight"]
        assert model.get_parameter("1.weight").sharded  # type: ignore[attr-defined]
    assert all(parameter is held[name] for name, parameter in model.named_parameters())

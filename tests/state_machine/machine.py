"""The state machine: all rules together, what users do to any model, and calls that must be refused."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from torch import Tensor, nn

import randlora
from randlora.errors import MergeError
from tests.kit import all_bits, untouched
from tests.state_machine.base import assert_near, is_adapted, is_plain
from tests.state_machine.file_rules import FileRules
from tests.state_machine.models import KINDS
from tests.state_machine.recipes import DTYPES, Factors, Recipe, factors, recipes
from tests.state_machine.refusals import REFUSALS, WHEN
from tests.state_machine.truth import Truth

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


class RandLoRAMachine(FileRules):
    """A model under all that can be done to it."""

    @initialize(
        kind=st.sampled_from([*KINDS]), dtype=st.sampled_from(DTYPES), first=recipes, second=recipes, chosen=factors
    )
    def build(self, kind: str, dtype: torch.dtype, first: Recipe, second: Recipe, chosen: Factors) -> None:
        """Start with two adapters of which some are active, where Hypothesis would seldom get by itself."""
        self.is_half = dtype == torch.bfloat16  # it trains nothing beside, whose copies would be float32
        self.truth = Truth(KINDS[kind], dtype)
        self.model = KINDS[kind].build(dtype)
        self.begin(first, second)
        if self.truth.adapters:
            self.activate(chosen, "mapping")

    @is_adapted
    @rule(steps=st.integers(1, 2))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            if not self.truth.is_random:
                self.step()

    def step(self) -> None:
        """Compare gradients and follow them; only what got one may move."""
        parameters = {name: held for name, held in self.model.named_parameters() if held.requires_grad}
        if parameters:
            with warnings.catch_warnings(action="ignore"):  # where they are in half precision
                trained = [id(held) for held in randlora.trainable_parameters(self.model)]
            assert len(set(trained)) == len(trained)
            assert set(trained) >= {id(held) for held in parameters.values()}
        expected = self.truth.gradients()
        output: Tensor = self.model(*self.truth.arguments())
        assert output.requires_grad == bool(expected)
        if not expected:
            return
        loss = output.double().square().sum()
        active = [info for info in randlora.adapters(self.model) if info.is_active]
        trained_merged = {
            info.is_merged for info in active if any(f"_lambda.{info.name}" in name for name in parameters)
        }
        if trained_merged == {True}:
            with pytest.raises(MergeError, match="would get no gradients"):
                loss.backward()
            self.model.zero_grad(set_to_none=True)
            return
        loss.backward()
        size = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
        for name, held in parameters.items():
            wanted = expected.get(name, torch.zeros(()))
            grad = torch.zeros(()) if held.grad is None else held.grad
            rounded = held.dtype if held.dtype.itemsize < self.truth.dtype.itemsize else self.truth.dtype
            assert_near(grad, wanted.expand(held.shape), rounded, least=size, loss=10)
        if size:
            torch.optim.SGD(parameters.values(), lr=0.2 / size).step()
        self.model.zero_grad(set_to_none=True)
        moved = {name: value for name, value in self.model.state_dict().items() if name in expected}
        self.truth.take(moved)

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16 and not self.is_half:
            return
        self.model.to(dtype)
        self.truth.cast(dtype)

    @is_adapted
    @rule(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        self.model.train(training)
        self.truth.training = training

    @is_plain
    @rule(place=st.integers(0, 9), flag=st.booleans())
    def freeze(self, place: int, flag: bool) -> None:
        name = list(self.truth.own)[place % len(self.truth.own)]
        self.model.get_parameter(name).requires_grad_(flag)
        self.truth.own_grad[name] = flag

    @is_adapted
    @rule()
    def remember_state(self) -> None:
        self.remembered = {name: value.clone() for name, value in self.model.state_dict().items()}

    @precondition(lambda self: self.remembered)
    @rule(assign=st.booleans())
    def restore_state(self, assign: bool) -> None:
        now = self.truth.state()
        state = {
            name: value.clone()
            for name, value in self.remembered.items()
            if name in now and value.shape == now[name].shape and not (assign and value.dtype != now[name].dtype)
        }
        if assign and self.truth.kind.name == "text":  # where it would untie what is tied
            return
        if self.truth.merged is not None:
            with pytest.raises(MergeError, match="cannot load a state dict while"):
                self.model.load_state_dict(state, strict=False, assign=assign)
            return
        self.model.load_state_dict(state, strict=False, assign=assign)
        self.truth.take(state)
        self.held = {} if assign else self.held

    @is_adapted
    @precondition(lambda self: not self.blocks)
    @rule(by=st.sampled_from([*COPIES]))
    def go_on_with_a_copy(self, by: str) -> None:
        self.bystanders = [(self.model, all_bits(self.model.state_dict()))]
        self.model, self.held = COPIES[by](self.model), {}

    @rule(place=st.integers(0, len(REFUSALS) - 1))
    def refuse(self, place: int) -> None:
        when, error, call = REFUSALS[place]
        if all(WHEN[word](self) for word in when.split()):
            with untouched(self.model), pytest.raises(error):
                call(self)

    def teardown(self) -> None:
        with self.cleanup:
            while self.blocks:
                self.leave(None)
                self.holds()
            if hasattr(self, "truth") and self.truth.adapters:
                self.eject()
                self.holds()

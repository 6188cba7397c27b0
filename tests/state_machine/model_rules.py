"""The rules of what users do to any model: train, cast, copy it, load a state dict."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor, nn

import randlora
from randlora.errors import MergeError
from tests.kit import all_bits
from tests.state_machine.base import ModelMachine, is_adapted, is_plain
from tests.state_machine.invariants import assert_near
from tests.state_machine.recipes import DTYPES

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


class ModelRules(ModelMachine):
    """One rule for each thing that torch does to a model."""

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

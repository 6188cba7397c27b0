"""What all rules need: the model, the truth about it, how to call a verb, and what must hold after every step."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition
from torch import Tensor, nn

import randlora
from randlora.errors import RandLoRAError
from randlora.state import ATTRIBUTE
from tests.kit import all_bits, bits, untouched
from tests.state_machine.truth import Adapter, Truth
from tests.torture.faults import fast_disk

Refused = type[RandLoRAError] | None
"""The error that a verb must raise, or ``None`` if it must not."""

OUTPUT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Of outputs, relative to the largest: what some layers one after the other make of the roundings of a dtype."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of a merged weight, relative to each value, which is rounded once; and to the update, summed in float32."""

is_plain = precondition(lambda self: not self.truth.adapters)
is_adapted = precondition(lambda self: self.truth.adapters)
is_free = precondition(lambda self: self.truth.adapters and self.truth.merged is None)
is_unmerged = precondition(lambda self: self.truth.merged is None)
is_merged = precondition(lambda self: self.truth.merged is not None)


def assert_is(model: nn.Module, truth: Truth, held: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Hold a model against the truth; return the Λ and Γ that must be the same objects the next time."""
    found = {
        info.name: (info.weight, info.is_trainable, info.is_merged, set(info.train_also), set(info.targets))
        for info in randlora.adapters(model)
    }
    expected = {
        name: (each.factor, each.trains, name in truth.merged_names, set(each.copies), set(each.values))
        for name, each in truth.adapters.items()
    }
    assert [*found.items()] == [*expected.items()], f"{found}, expected {expected}"
    assert all(module.training == truth.training for module in model.modules())
    assert_classes_are(model, truth)
    parameters = dict(model.named_parameters())
    assert_values_are(model.state_dict(), truth.state())
    assert_values_are({name: parameters[name] for name in truth.own}, truth.live())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    assert flags == truth.requires_grad(), "requires_grad"
    replaced = [name for name, parameter in held.items() if parameters.get(name, parameter) is not parameter]
    assert not replaced, f"other objects, which an optimizer does not know: {replaced}"
    if not truth.is_random:
        with torch.no_grad():
            output: Tensor = model(*truth.arguments())
            assert output.dtype == truth.dtype
            assert_near(output, truth.output(), truth.dtype)
    return {name: parameter for name, parameter in parameters.items() if name not in truth.own}


def assert_classes_are(model: nn.Module, truth: Truth) -> None:
    """Check that the owners of adapted weights, and no other modules, are of another class than without adapters."""
    adapted = {weight.name.rpartition(".")[0] for each in truth.adapters.values() for weight in truth.weights_of(each)}
    for fqn, plain in truth.twin.named_modules():
        module = model.get_submodule(fqn)
        assert (type(module) is not type(plain)) == (fqn in adapted), f"{fqn} is a {type(module).__name__}"
        assert isinstance(module, type(plain))
        if fqn not in adapted:
            more = vars(module).keys() ^ vars(plain).keys()
            assert more == ({ATTRIBUTE} if truth.adapters and not fqn else set()), f"{fqn} has {more}"


def assert_values_are(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names and bits."""
    assert found.keys() == expected.keys(), f"names: {sorted(found.keys() ^ expected.keys())}"
    changed = [name for name, value in found.items() if bits(value) != bits(expected[name])]
    assert not changed, f"other bits: {changed}"


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, *, least: float = 1.0, loss: float = 1.0) -> None:
    """Compare relative to the largest value, or to ``least`` if that is larger."""
    scale = max(least, expected.abs().max().item())
    error = (found.double() - expected).abs().max().item()
    assert error <= OUTPUT[dtype] * loss * scale, f"off by {error:.3g} of {scale:.3g}"


def assert_weights_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Compare merged weights, each value within a rounding."""
    for name, value in expected.items():
        error = (found[name].double() - value).abs()
        allowed = ROUNDING[dtype] * value.abs() + min(ROUNDING[dtype], 1e-5) * max(1.0, value.abs().max().item())
        assert found[name].dtype == dtype, name
        assert bool((error <= allowed).all()), f"{name} is off by {error.max().item():.3g} after merging"


class ModelMachine(RuleBasedStateMachine):
    """A model, the truth about it, and what the rules have put aside."""

    model: nn.Module
    truth: Truth
    is_half: bool

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.root = self.cleanup.enter_context(fast_disk())
        self.saved: dict[int, Adapter] = {}
        self.remembered: dict[str, Tensor] = {}
        self.blocks: list[tuple[AbstractContextManager[Any], set[str] | None, int]] = []
        self.bystanders: list[tuple[nn.Module, dict[str, Any]]] = []
        self.held: dict[str, nn.Parameter] = {}

    def ask(self, refused: Refused, verb: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a verb. If it is to be refused, check that it is, without a trace, and return ``None``."""
        if refused is None:
            return verb(self.model, *args, **options)
        with untouched(self.model), pytest.raises(refused):
            verb(self.model, *args, **options)
        return None

    def path(self, slot: int) -> Path:
        return self.root / f"adapter_{slot}"

    def name(self, which: int) -> str:
        """Return the name of an adapter, counted round and round."""
        return list(self.truth.adapters)[which % len(self.truth.adapters)]

    def chosen(self, factors: Iterable[float | None]) -> dict[str, float]:
        """Return the factors of those adapters that are to be active."""
        return {name: by for name, by in zip(self.truth.adapters, factors, strict=False) if by is not None}

    def share(self, names: Iterable[str]) -> bool:
        """Whether two of some adapters have a copy of the same parameter, so that both cannot be active."""
        copies = [copy for name in names for copy in self.truth.adapters[name].copies]
        return len({*copies}) < len(copies)

    @invariant()
    def holds(self) -> None:
        self.truth.settle()
        self.held = assert_is(self.model, self.truth, self.held)
        for bystander, before in self.bystanders:
            assert all_bits(bystander.state_dict()) == before, "a copy changed the model that it was made of"

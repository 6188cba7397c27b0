"""What all rules need: the model, the truth about it, how to call a verb, and what must hold after every step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition
from torch import Tensor, nn

from randlora.errors import RandLoRAError
from tests.kit import all_bits, untouched
from tests.state_machine.invariants import assert_is
from tests.state_machine.models import Kind
from tests.state_machine.truth import Adapter, Truth
from tests.torture.faults import fast_disk

Refused = type[RandLoRAError] | None
"""The error that a verb must raise, or ``None`` if it must not."""

is_plain = precondition(lambda self: not self.truth.adapters)
is_adapted = precondition(lambda self: self.truth.adapters)
is_free = precondition(lambda self: self.truth.adapters and self.truth.merged is None)
is_unmerged = precondition(lambda self: self.truth.merged is None)


class ModelMachine(RuleBasedStateMachine):
    """A model, the truth about it, and what the rules have put aside."""

    model: nn.Module
    truth: Truth

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.root = self.cleanup.enter_context(fast_disk())
        self.saved: dict[int, Adapter] = {}
        self.remembered: dict[str, Tensor] = {}
        self.blocks: list[tuple[AbstractContextManager[Any], set[str] | None, int]] = []
        self.bystanders: list[tuple[nn.Module, dict[str, Any]]] = []
        self.held: dict[str, nn.Parameter] = {}

    def start(self, kind: Kind, dtype: torch.dtype) -> None:
        """Make the model and its truth; a model of 16 bits trains nothing beside, whose copies would be float32."""
        self.is_half = dtype == torch.bfloat16
        self.truth = Truth(kind, dtype)
        self.model = kind.build(dtype)

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

    @invariant()
    def holds(self) -> None:
        self.truth.settle()
        self.held = assert_is(self.model, self.truth, self.held)
        for bystander, bits in self.bystanders:
            assert all_bits(bystander.state_dict()) == bits, "a copy changed the model that it was made of"

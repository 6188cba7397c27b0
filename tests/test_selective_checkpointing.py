"""Selective activation checkpointing, which saves some results of operators, and other dispatch modes."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import randlora
from randlora.functional import Compute
from randlora.modes import Observer, may_be_kept
from tests.kit import fill
from tests.layer_kinds import LAYER_KINDS, LayerKind
from tests.read_kinds import ReadKind, every_family, weighted

aten = torch.ops.aten
PRODUCTS = aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default
Run = Callable[[], Tensor]


def policy_of(operators: tuple[Any, ...] | None, nth: int) -> Callable[..., CheckpointPolicy]:
    """Save every nth result of some operators, or of all, as torchtitan's saves every second product."""
    met = [0, 0]

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operators is not None and operator not in operators:
            return CheckpointPolicy.PREFER_RECOMPUTE
        met[context.is_recompute] += 1
        return CheckpointPolicy.PREFER_RECOMPUTE if met[context.is_recompute] % nth else CheckpointPolicy.MUST_SAVE

    return policy


POLICIES = {"everything": (None, 1), "products": (PRODUCTS, 1), "second products": (PRODUCTS, 2), "nothing": ((), 1)}


def selectively(run: Run, name: str) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, policy_of(*POLICIES[name]))
    output: Tensor = checkpoint(run, use_reentrant=False, context_fn=contexts)
    return output


def can_be_run_without_adapters(run: Run, policy: str) -> bool:
    """Whether the frozen module itself overwrites nothing that is saved, as some of torch and transformers do."""
    with set_checkpoint_early_stop(enable=False):
        try:
            weighted(selectively(run, policy)).backward()
        except RuntimeError as error:
            if "has been mutated" not in str(error):
                raise
            return False
    return True


def assert_same_gradients(run: Run, plain: Run, leaves: list[Tensor]) -> None:
    """Compare gradients under every policy, the first time on a model that was never called, with those without any."""
    found = {
        policy: torch.autograd.grad(weighted(selectively(run, policy)), leaves)
        for policy in POLICIES
        if can_be_run_without_adapters(plain, policy)
    }
    assert "nothing" in found
    expected = torch.autograd.grad(weighted(run()), leaves)
    for gradients in found.values():
        for ours, own in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("kind", [kind for kind in LAYER_KINDS if kind.backpropagates], ids=lambda kind: kind.name)
@pytest.mark.parametrize("compute", get_args(Compute))
def test_it_changes_no_gradient(kind: LayerKind, compute: Compute) -> None:
    for shape, basis in (((24, 40), "dense"), ((40, 24), "block")):
        model = nn.Sequential(kind.build(*shape, True, kind.exact), nn.Tanh())
        x = torch.randn(5, shape[0], dtype=kind.exact, requires_grad=True)
        plain = nn.Sequential(kind.build(*shape, True, kind.exact), nn.Tanh()).requires_grad_(False)
        randlora.inject(model, r=4, targets="all", basis=basis)  # type: ignore[arg-type]
        randlora.set_compute(model, compute)
        leaves = [x, *randlora.trainable_parameters(fill(model))]
        assert_same_gradients(partial(model, x), partial(plain, x), leaves)


@every_family
def test_it_changes_no_gradient_of_a_weight_that_is_read(kind: ReadKind) -> None:
    model, plain = kind.adapted(), kind.model()
    assert_same_gradients(lambda: kind.run(model), lambda: kind.run(plain), [*randlora.trainable_parameters(model)])


def test_it_changes_no_gradient_under_autocast_and_beside_rows_of_several_adapters() -> None:
    """The first layer needs no gradient, and without modes the updates of its rows are computed together."""
    model, x = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)), torch.randn(6, 24, requires_grad=True)
    for name in ("a", "b"):
        randlora.inject(model, r=4, name=name, targets=["0"], basis="block")
        fill(model, name)

    def autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output: Tensor = model(x)
        return output.float()

    assert_same_gradients(autocast, x.cos, [x, *randlora.trainable_parameters(model)])
    randlora.set_trainable(model, ["a", "b"], trainable=False)
    head = model[2].requires_grad_()

    def routed() -> Tensor:
        with randlora.serving.routed(model, ["a", "b"] * 3):
            output: Tensor = model(x.detach())
        return output

    assert_same_gradients(routed, head.get_parameter("weight").cos, [*head.parameters()])


class Keeping(TorchDispatchMode):
    """Keeps every result, with what it was."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and keep what it made."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.kept.append((result, result.clone()))
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_result_is_overwritten_under_a_mode_of_the_user(mode: Callable[[], Any]) -> None:
    """A mode is known by private names: see randlora/modes.py."""
    randlora.inject(model := nn.Sequential(nn.Linear(24, 40)), r=4, targets="all")
    fill(model)
    with mode(), Keeping() as keeping:
        model(torch.randn(5, 24))
    assert len(keeping.kept) > 5
    assert all(torch.equal(result, then) for result, then in keeping.kept)
    assert not may_be_kept()
    with Observer():  # type: ignore[no-untyped-call]
        assert not may_be_kept()
        with Keeping():
            assert may_be_kept()

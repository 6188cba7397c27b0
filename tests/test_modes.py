"""Under torch's modes: checkpointing that saves some results, other dispatch modes, and fake tensors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import randlora
from randlora.errors import AdapterError
from randlora.functional import Compute
from tests.kit import fill
from tests.laws import Mixed
from tests.layer_kinds import LAYER_KINDS, LayerKind
from tests.read_kinds import FAMILIES, READ_KINDS, ReadKind, output_of, weighted

aten = torch.ops.aten
PRODUCTS = aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default
POLICIES = {"everything": (None, 1), "products": (PRODUCTS, 1), "second products": (PRODUCTS, 2), "nothing": ((), 1)}
Run = Callable[[], Tensor]
Kind = LayerKind | ReadKind

FAMILY: list[Kind] = [kind for kind in READ_KINDS if kind.name in FAMILIES]
TRAINED: list[Kind] = [*(kind for kind in LAYER_KINDS if kind.backpropagates), *FAMILY]


def subjects(kind: Kind) -> Iterator[tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]]:
    if isinstance(kind, ReadKind):
        yield lambda: nn.Sequential(kind.build()), kind.arguments(), kind.adapter_options
        return
    for shape, basis in (((24, 40), "dense"), ((40, 24), "block")):
        x = torch.randn(5, shape[0], dtype=kind.exact, requires_grad=True)
        build = partial(kind.build, *shape, True, kind.exact)
        options = {"r": 4, "targets": "all", "basis": basis}
        yield lambda build=build: nn.Sequential(nn.Sequential(build(), nn.Tanh())), (x,), options  # type: ignore[misc]


def output(model: nn.Module, given: tuple[Any, ...]) -> Tensor:
    return output_of(model.get_submodule("0")(*given))


# Selective activation checkpointing


def policy_of(operators: tuple[Any, ...] | None, nth: int) -> Callable[..., CheckpointPolicy]:
    """Save every nth result of some operators, or of all, as torchtitan's saves every second product."""
    met = [0, 0]

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operators is not None and operator not in operators:
            return CheckpointPolicy.PREFER_RECOMPUTE
        met[context.is_recompute] += 1
        return CheckpointPolicy.PREFER_RECOMPUTE if met[context.is_recompute] % nth else CheckpointPolicy.MUST_SAVE

    return policy


def selectively(run: Run, name: str) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, policy_of(*POLICIES[name]))
    return weighted(checkpoint(run, use_reentrant=False, context_fn=contexts))


def can_be_run_without_adapters(run: Run, policy: str) -> bool:
    with set_checkpoint_early_stop(enable=False):
        try:
            selectively(run, policy).backward()
        except RuntimeError as error:
            if "has been mutated" not in str(error):
                raise
            return False
    return True


def assert_same_gradients(run: Run, plain: Run, leaves: list[Tensor]) -> None:
    """Compare gradients under every policy, the first time on a model that was never called, with those without any."""
    policies = [policy for policy in POLICIES if can_be_run_without_adapters(plain, policy)]
    found = [torch.autograd.grad(selectively(run, policy), leaves) for policy in policies]
    assert "nothing" in policies
    expected = torch.autograd.grad(weighted(run()), leaves)
    for gradients in found:
        torch.testing.assert_close(gradients, expected)


@pytest.mark.product
@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("compute", get_args(Compute))
def test_selective_checkpointing_changes_no_gradient(kind: Kind, compute: Compute) -> None:
    for build, given, options in subjects(kind):
        model, plain = build(), build().requires_grad_(isinstance(kind, ReadKind))
        randlora.inject(model, **options)
        randlora.set_compute(model, compute)
        leaves = [*(x for x in given if x.requires_grad), *randlora.trainable_parameters(fill(model))]
        assert_same_gradients(partial(output, model, given), partial(output, plain, given), leaves)


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
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.kept.append((result, result.clone()))
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_result_is_overwritten_under_a_mode_of_the_user(mode: Callable[[], Any]) -> None:
    """A mode is known by private names: see randlora/functional/scratch.py."""
    randlora.inject(model := nn.Sequential(nn.Linear(24, 40)), r=4, targets="all")
    fill(model)
    with mode(), Keeping() as keeping:
        model(torch.randn(5, 24))
    assert len(keeping.kept) > 5
    assert all(torch.equal(result, then) for result, then in keeping.kept)


def test_fake_tensors_are_refused_and_the_model_stays_as_it_was() -> None:
    real = Mixed()
    with FakeTensorMode():
        fake = Mixed()
        for model in (real, fake):
            with pytest.raises(AdapterError, match="FakeTensorMode makes tensors without values"):
                randlora.inject(model, r=4)
    for model in (real, fake):
        assert "randlora" not in str(model)
    with pytest.raises(AdapterError, match=r"build the model on torch\.device\('meta'\)"):
        randlora.inject(fake, r=4)

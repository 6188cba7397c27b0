"""Under torch's modes: checkpointing that saves some results, other dispatch modes, and tensors without values."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

import randlora
from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
from randlora.errors import AdapterError, CheckpointError, MergeError
from randlora.functional import Compute
from randlora.modes import Observer, may_be_kept
from tests.kit import fill, same_bits, untouched
from tests.laws import TOKENS, Mixed
from tests.layer_kinds import LAYER_KINDS, LayerKind
from tests.read_kinds import FAMILIES, READ_KINDS, ReadKind, output_of, weighted

aten = torch.ops.aten
PRODUCTS = aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default
POLICIES = {"everything": (None, 1), "products": (PRODUCTS, 1), "second products": (PRODUCTS, 2), "nothing": ((), 1)}
Run = Callable[[], Tensor]
Kind = LayerKind | ReadKind

FAMILY: list[Kind] = [kind for kind in READ_KINDS if kind.name in FAMILIES]
TRAINED: list[Kind] = [*(kind for kind in LAYER_KINDS if kind.backpropagates), *FAMILY]
FAKED: list[Kind] = [kind for kind in LAYER_KINDS if not kind.is_quantized]
FAKED += [
    kind for kind in READ_KINDS if kind.name in FAMILIES and kind.is_one_graph
]  # shapes in others are up to values


def subjects(kind: Kind) -> Iterator[tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]]:
    """Return how to make models of a kind, each of one module, what to give it, and how to adapt it."""
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
    """Whether the frozen module itself overwrites nothing that is saved, as some of torch and transformers do."""
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


# Models without values, under `FakeTensorMode`: shapes, dtypes, devices and work as of the real model


def step(model: nn.Module, given: tuple[Any, ...]) -> tuple[int, list[Tensor], list[tuple[Any, ...]]]:
    """Run forward and backward; return the work, the output and the gradients, and what is said of these."""
    with FlopCounterMode(display=False) as counter:
        found = output(model, given)
        tensors = [found, *torch.autograd.grad(found.sum(), list(randlora.trainable_parameters(model)))]
    traits = [(tuple(each.shape), each.dtype, each.device, each.requires_grad) for each in tensors]
    return counter.get_total_flops(), tensors, traits


def assert_pretends(
    make: Callable[[], nn.Module], given: tuple[Any, ...], adapt: Callable[[nn.Module], Any], *, draws: bool = False
) -> tuple[int, int]:
    """Compare a step of a fake model, and what adapting it reported, with the real one; return the work of both."""
    real = make()
    report, (flops, _, traits) = str(adapt(real)), step(real, given)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode() as mode:
        if not draws:
            patch.delattr(Basis, "matrices")
        fake = make()
        assert str(adapt(fake)) == report
        fake_flops, tensors, fake_traits = step(fake, tuple(map(mode.from_tensor, given)))
    assert fake_traits == traits
    assert all(isinstance(each, FakeTensor) for each in tensors)
    return fake_flops, flops


@pytest.mark.parametrize("kind", FAKED, ids=lambda kind: kind.name)
def test_a_fake_module_is_adapted_and_trained_without_drawing_bases(kind: Kind) -> None:
    for build, inputs, options in subjects(kind):
        given = tuple(x.detach() for x in inputs)
        flops = assert_pretends(build, given, partial(randlora.inject, **options))
        assert isinstance(kind, ReadKind) or flops[0] == flops[1] > 0


def test_an_adapter_is_loaded_into_a_fake_model_with_real_bases(tmp_path: Path) -> None:
    trained = nn.Sequential(Mixed())
    randlora.inject(trained, r=4, targets=["q", "up"], train_also=["norm"])
    randlora.save(fill(trained), tmp_path)
    load = partial(randlora.load, source=tmp_path, trainable=True)
    assert_pretends(lambda: nn.Sequential(Mixed()), (TOKENS,), load, draws=True)
    spec = BasisSpec("dense", "torch", seed=0, r=4, max_dim=20, min_dim=12)
    expected, made = Basis(spec), Basis(spec)
    with FakeTensorMode():
        digest, bases = made.digest(20, 12), made.slices(20, 12, device="cpu", dtype=torch.float32)
    assert digest == expected.digest(20, 12)
    assert all(map(same_bits, bases, expected.slices(20, 12, device="cpu", dtype=torch.float32)))


def test_what_needs_values_or_mixes_both_kinds_of_tensors_is_refused(tmp_path: Path) -> None:
    real = Mixed()
    with untouched(real), FakeTensorMode(), pytest.raises(AdapterError, match=r"embed\.weight has values, but"):
        randlora.inject(real, r=4)
    with FakeTensorMode():
        model, fake = Mixed(), Mixed()
        randlora.inject(model, r=4)
        assert randlora.delta_weight(model, "up").shape == (20, 12)
        assert randlora.update_norms(model)["up"].shape == ()
        for verb in (
            lambda: randlora.save(model, tmp_path / "adapter"),
            lambda: randlora.adapter_state(model),
            lambda: randlora.merge(model),
            lambda: randlora.serving.combine(model, {"default": 1.0}, name="sum"),
        ):
            with pytest.raises((AdapterError, CheckpointError, MergeError), match="fake"):
                verb()
        assert randlora.eject(model) == ("q", "up", "down")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(AdapterError, match=r"embed\.weight is fake: call this, and the model, under"):
        randlora.inject(fake, r=4)

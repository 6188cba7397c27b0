"""Models without values, under torch's `FakeTensorMode`: shapes, dtypes and devices as of the real model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec
from randlora.errors import AdapterError, CheckpointError, MergeError
from tests.kit import fill, same_bits, untouched
from tests.laws import TOKENS, Mixed
from tests.read_kinds import ReadKind, every_family, output_of


def step(model: nn.Module, given: tuple[Any, ...]) -> list[Tensor]:
    """Run forward and backward of a model of one module; return the output and the gradients."""
    output = output_of(model.get_submodule("0")(*given))
    return [output, *torch.autograd.grad(output.sum(), list(randlora.trainable_parameters(model)))]


def traits(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(tuple(each.shape), each.dtype, each.device, each.requires_grad) for each in tensors]


def assert_pretends(
    make: Callable[[], nn.Module], given: tuple[Any, ...], adapt: Callable[[nn.Module], Any], *, draws: bool = False
) -> tuple[int, int]:
    """Compare a step of a fake model, and what adapting it reported, with the real one; return the work of both."""
    real = make()
    expected = str(adapt(real)), traits(step(real, given))
    with FlopCounterMode(display=False) as counter:
        step(real, given)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode() as mode:
        if not draws:
            patch.delattr(Basis, "matrices")
        fake = make()
        pretended = tuple(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in given)
        report, tensors = str(adapt(fake)), step(fake, pretended)
        with FlopCounterMode(display=False) as fake_counter:
            step(fake, pretended)
    assert (report, traits(tensors)) == expected
    assert all(isinstance(each, FakeTensor) for each in tensors)
    return fake_counter.get_total_flops(), counter.get_total_flops()


@pytest.mark.parametrize("basis", ["dense", "block"])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(24, 40), lambda: Conv1D(40, 24)], ids=["Linear", "Conv1D"])
def test_a_fake_layer_is_adapted_and_trained_without_drawing_bases(layer: Callable[[], nn.Module], basis: Any) -> None:
    adapt = partial(randlora.inject, r=4, targets="all", basis=basis)
    flops = assert_pretends(lambda: nn.Sequential(layer()), (torch.randn(5, 24),), adapt)
    assert flops[0] == flops[1] > 0


@every_family
def test_a_fake_weight_that_is_read_is_adapted_and_trained(kind: ReadKind) -> None:
    given = kind.arguments()
    with FakeTensorMode() as mode:
        try:
            kind.build()(*map(mode.from_tensor, given))
        except (DynamicOutputShapeException, DataDependentOutputException, AttributeError, RuntimeError):
            pytest.skip("torch cannot pretend to make or run the module itself")
    adapt = partial(randlora.inject, **kind.adapter_options)
    assert_pretends(lambda: nn.Sequential(kind.build()), given, adapt)


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

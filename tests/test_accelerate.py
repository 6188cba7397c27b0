"""accelerate's hooks replace a layer's ``forward`` and bring its weights in from elsewhere: adapters go round that."""

from collections.abc import Callable
from pathlib import Path

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import nn

import randlora
from tests.models import LLAMA, outputs
from tests.peer import ALPHA, R, fill, our_model

INPUTS = LLAMA.inputs()


def with_a_hook_on_every_layer(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def dispatched(model: nn.Module) -> nn.Module:
    placed: nn.Module = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return placed


def offloaded(model: nn.Module) -> nn.Module:
    placed: nn.Module = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return placed


every_placement = pytest.mark.parametrize("place", [with_a_hook_on_every_layer, dispatched])
every_placement_and_offloading = pytest.mark.parametrize("place", [with_a_hook_on_every_layer, dispatched, offloaded])


@every_placement_and_offloading
def test_an_adapter_acts_on_a_model_with_hooks(place: Callable[[nn.Module], nn.Module]) -> None:
    model = place(LLAMA.build())
    base = outputs(LLAMA.build(), INPUTS)
    assert torch.equal(outputs(model, INPUTS), base)
    randlora.inject(model, R, alpha=ALPHA, targets=LLAMA.targets)
    assert torch.equal(outputs(model, INPUTS), base)
    fill(model)
    assert torch.equal(outputs(model, INPUTS), outputs(our_model(LLAMA), INPUTS))


@every_placement_and_offloading
def test_a_file_loads_into_a_model_with_hooks(place: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    trained = our_model(LLAMA)
    randlora.save(trained, tmp_path)
    model = place(LLAMA.build())
    randlora.load(model, tmp_path)
    assert torch.equal(outputs(model, INPUTS), outputs(trained, INPUTS))


@every_placement
def test_a_model_with_hooks_merges_and_ejects(place: Callable[[nn.Module], nn.Module]) -> None:
    model = place(LLAMA.build())
    randlora.inject(model, R, alpha=ALPHA, targets=LLAMA.targets)
    fill(model)
    adapted = outputs(model, INPUTS)
    with randlora.merged(model):
        torch.testing.assert_close(outputs(model, INPUTS), adapted, rtol=1e-4, atol=1e-5)
    randlora.eject(model)
    assert torch.equal(outputs(model, INPUTS), outputs(LLAMA.build(), INPUTS))


def test_offloaded_weights_are_not_merged_unseen() -> None:
    model = offloaded(LLAMA.build())
    randlora.inject(model, R, targets=LLAMA.targets)
    with pytest.raises(randlora.MergeError, match="is not all here"):
        randlora.merge(model)

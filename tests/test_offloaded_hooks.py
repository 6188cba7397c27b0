"""accelerate's hooks replace a layer's ``forward`` and bring its weights in from elsewhere: adapters go round that."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]
from accelerate.hooks import (  # type: ignore[import-untyped]
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import nn

import randlora
from tests.kit import fill
from tests.models import LLAMA, outputs
from tests.peer import ALPHA, R, our_model, peft_draw

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


@pytest.mark.parametrize("place", [with_a_hook_on_every_layer, dispatched, offloaded])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_with_hooks_is_adapted_loaded_merged_and_ejected(
    when: str, place: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    plain, trained = outputs(LLAMA.build(), INPUTS), our_model(LLAMA)
    model = place(LLAMA.build()) if when == "before" else LLAMA.build()
    assert torch.equal(outputs(model, INPUTS), plain)
    randlora.inject(model, R, alpha=ALPHA, targets=LLAMA.targets, stream=peft_draw("dense"))
    assert torch.equal(outputs(model, INPUTS), plain)
    fill(model)
    model = place(model) if when == "after" else model
    expected = outputs(trained, INPUTS)
    assert torch.equal(outputs(model, INPUTS), expected)
    with randlora.disabled(model):
        assert torch.equal(outputs(model, INPUTS), plain)
    with randlora.merged(model):
        torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)
    randlora.eject(model)
    assert torch.equal(outputs(model, INPUTS), plain)
    randlora.save(trained, tmp_path)
    randlora.load(model, tmp_path)
    assert torch.equal(outputs(model, INPUTS), expected)
    remove_hook_from_submodules(model)
    assert not any("_hf_hook" in vars(module) for module in model.modules())
    assert torch.equal(outputs(model, INPUTS), expected)
    randlora.eject(model)
    assert torch.equal(outputs(model, INPUTS), plain)
    assert not any("Adapted" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("unhook_first", [True, False])
def test_a_forward_of_the_layers_own_outlives_hooks_and_adapters(hook_first: bool, unhook_first: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    layer: Any = model[0]
    plain = layer.forward
    own = layer.forward = lambda x: 2 * plain(x)
    x = torch.randn(3, 4)
    expected = layer(x)
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    if hook_first:
        add_hook_to_module(layer, hook)
    randlora.inject(model, r=2, targets="all-linear")
    if not hook_first:
        add_hook_to_module(layer, hook)
    assert torch.equal(layer(x), expected)
    fill(model)
    adapted = expected + x @ randlora.delta_weight(model, "0").T
    torch.testing.assert_close(layer(x), adapted)
    if unhook_first:
        remove_hook_from_submodules(model)
        torch.testing.assert_close(layer(x), adapted)
    randlora.eject(model)
    assert ("_hf_hook" in vars(layer)) is not unhook_first
    assert torch.equal(layer(x), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(layer(x), expected)
    assert layer.forward is own


ACCELERATE = Path(__file__).parent.parent / "docs" / "accelerate.md"


def test_accelerate_reads_the_configs_of_the_docs(tmp_path: Path) -> None:
    found = re.findall(r"^```yaml\n(.*?)^```$", ACCELERATE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    kinds = {}
    for text in found:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        config = load_config_from_file(str(tmp_path / "config.yaml"))
        kinds[config.distributed_type] = config
    assert kinds.keys() >= {DistributedType.FSDP, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED}
    assert kinds[DistributedType.FSDP].fsdp_config["fsdp_version"] == 2
    assert kinds[DistributedType.MULTI_GPU].parallelism_config["parallelism_config_tp_size"] == 8
    assert kinds[DistributedType.DEEPSPEED].deepspeed_config["zero_stage"] == 3

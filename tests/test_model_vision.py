"""Models of images and of diffusion, with random weights: adapters of their convolutions merge and load."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from randlora.targets.census import Census
from tests.diffusion_models import flux, noise, patches, unet
from tests.kit import all_bits, fill, same_bits
from tests.models import library, reproducible
from tests.peer import THEIR_WARNINGS

pytestmark = [*THEIR_WARNINGS, pytest.mark.medium]


@dataclass(frozen=True)
class Vision:
    """A model, its inputs, and how many of its weights of each kind there are."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    kinds: dict[str, int]

    def output(self, model: nn.Module) -> Tensor:
        """Run the model on inputs that are always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            output = model(**self.inputs())
        found = output if isinstance(output, Tensor) else output.sample
        assert isinstance(found, Tensor)
        return found


def _squeezenet() -> nn.Module:
    return reproducible(lambda: library("torchvision").models.squeezenet1_1(num_classes=5))


def _image() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 32, 32)}


def _has_weight(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


@pytest.mark.parametrize(
    "kind",
    [
        Vision("squeezenet", _squeezenet, _image, {"convolution": 26}),
        Vision("unet", unet, noise, {"convolution": 33, "linear": 50}),
        Vision("flux", flux, patches, {"linear": 28}),
    ],
    ids=lambda kind: kind.name,
)
def test_merging_in_memory_and_in_files_gives_the_adapted_output(kind: Vision, tmp_path: Path) -> None:
    model, base = kind.build(), kind.build()
    expected = kind.output(model)
    randlora.inject(model, r=8, targets=_has_weight)
    kinds = [site.layer_class.kind for site in Census.of(model).adapted]
    assert {name: kinds.count(name) for name in set(kinds)} == kind.kinds
    assert same_bits(kind.output(model), expected)
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (kind.output(model) - 1).square().mean().backward()
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))
    randlora.save(fill(model, spread=0.01), tmp_path / "adapter")
    loaded = kind.build()
    randlora.load(loaded, tmp_path / "adapter")
    with torch.no_grad():
        expected, scale = kind.output(model), expected.abs().max().item()
        assert same_bits(kind.output(loaded), expected)
        randlora.files.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
        randlora.merge(model)
        torch.testing.assert_close(kind.output(model), expected, rtol=1e-3, atol=1e-3 * scale)
    assert all_bits(load_file(tmp_path / "merged" / "model.safetensors")) == all_bits(model.state_dict())

"""Models of images and of diffusion, with random weights: adapters of their convolutions train, merge and load."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.targets.census import Census
from tests.diffusion_models import flux, noise, patches, unet
from tests.kit import all_bits, fill, same_bits
from tests.models import reproducible
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


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return reproducible(lambda: getattr(torchvision.models, name)(num_classes=5))

    return build


def _image() -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 32, 32)}


MODELS = (
    Vision("squeezenet", _torchvision("squeezenet1_1"), _image, {"convolution": 26}),
    Vision("resnet18", _torchvision("resnet18"), _image, {"convolution": 20, "linear": 1}),
    Vision("convnext_tiny", _torchvision("convnext_tiny"), _image, {"convolution": 22, "linear": 37}),
    Vision("unet", unet, noise, {"convolution": 33, "linear": 50}),
    Vision("flux", flux, patches, {"linear": 28}),
)
every_model = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] if kind.name in ("resnet18", "convnext_tiny") else [])
        for kind in MODELS
    ],
    ids=lambda kind: kind.name,
)


def has_weight(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


def adapted(kind: Vision) -> nn.Module:
    model = kind.build()
    report = randlora.inject(model, r=8, targets=has_weight)
    assert len(report.targets) == sum(kind.kinds.values())
    return model


@every_model
def test_only_the_adapter_trains_and_the_loss_falls(kind: Vision) -> None:
    model = kind.build()
    base, expected = all_bits(model.state_dict()), kind.output(model)
    randlora.inject(model, r=8, targets=has_weight)
    assert same_bits(kind.output(model), expected)
    trained = list(randlora.trainable_parameters(model))
    before = [parameter.detach().clone() for parameter in trained]
    wanted = expected.detach() + 0.1
    optimizer, losses = torch.optim.Adam(trained, lr=1e-4), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (kind.output(model) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = sum(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    assert moved == len(trained)
    after = all_bits({name: tensor for name, tensor in model.state_dict().items() if "randlora" not in name})
    assert after == base
    kinds = [site.layer_class.kind for site in Census.of(model).adapted]
    assert {name: kinds.count(name) for name in set(kinds)} == kind.kinds
    randlora.eject(model)
    assert all_bits(model.state_dict()) == base
    assert same_bits(kind.output(model), expected)


@every_model
def test_merging_in_memory_and_in_files_gives_the_adapted_output(kind: Vision, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = fill(adapted(kind), spread=0.01)
    base = kind.build()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    randlora.save(model, tmp_path / "adapter")
    with torch.no_grad():
        expected, plain = kind.output(model), kind.output(base)
    scale = expected.abs().max().item()
    assert (expected - plain).abs().max() > 1e-2 * scale
    loaded = kind.build()
    randlora.load(loaded, tmp_path / "adapter")
    with torch.no_grad():
        assert same_bits(kind.output(loaded), expected)
    assert randlora.files.verify(tmp_path / "adapter", tmp_path / "base").passed
    randlora.files.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    randlora.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(kind.output(model), expected, rtol=1e-3, atol=1e-3 * scale)
    assert all_bits(load_file(tmp_path / "merged" / "model.safetensors")) == all_bits(model.state_dict())

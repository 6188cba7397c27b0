"""The models that the benchmarks train: who trains what, and that a step trains it."""

import pytest
import torch
from torch import nn

from benchmarks import model, models

NAMES = [*model.CONTESTANTS, "very_sparse"]


def small(contestant: str) -> nn.Module:
    return models.adapt(models.llama(layers=1, side=64), contestant, models.LLAMA_TARGETS)


def trained(adapted: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("contestant", NAMES)
def test_every_contestant_adapts_without_a_warning_and_trains_what_its_name_says(contestant: str) -> None:
    names = trained(small(contestant))
    assert bool(names) == (contestant != "frozen")
    assert contestant in ("frozen", "full") or len(names) == 2 * len(models.LLAMA_TARGETS)
    assert contestant in ("frozen", "full") or all("lora" in name for name in names)


@pytest.mark.parametrize("contestant", NAMES)
def test_a_step_changes_what_is_trained_and_nothing_else(contestant: str) -> None:
    adapted = small(contestant)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    step = models.training_step(adapted, torch.randint(models.VOCABULARY, (2, 8)))
    for _ in range(2):  # at first one of the two factors of an update is zero, and the other has no gradient
        step()
    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(trained(adapted))


@pytest.mark.parametrize("contestant", ["full", "PEFT", "block"])
def test_a_step_takes_pictures_too(contestant: str) -> None:
    adapted = models.adapt(models.vit(layers=1, side=64), contestant, models.VIT_TARGETS)
    before = {name: parameter.detach().clone() for name, parameter in trained(adapted).items()}
    models.training_step(adapted, torch.randn(1, 3, 224, 224))()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in trained(adapted).items())

"""Several adapters trained in one batch: each tenant gets what it would have got alone, whoever comes and goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError
from tests import models
from tests.further import further

STEPS = 6


class Tenant(NamedTuple):
    seed: int
    lr: float
    steps: range = range(STEPS)
    r: int = 4


TENANTS = {
    "a": Tenant(0, 1e-2),
    "joins": Tenant(0, 2e-2, range(3, STEPS), r=2),
    "leaves": Tenant(1, 5e-3, range(4)),
}


def trained(names: Iterable[str], *, checkpoints: bool, accumulated: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train some tenants in one model, and return the losses of each and the values that it ended with."""
    torch.manual_seed(0)
    model: Any = models.llama().train()
    if checkpoints:
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    optimizers: dict[str, torch.optim.Optimizer] = {}
    losses, values = defaultdict[str, list[float]](list), dict[str, list[nn.Parameter]]()
    for step in range(STEPS):
        for name in names:
            tenant = TENANTS[name]
            if step == tenant.steps.start:
                randlora.inject(model, name=name, r=tenant.r, seed=tenant.seed, trainable=True)
                values[name] = randlora.trainable_parameters(model, name)
                optimizers[name] = torch.optim.AdamW(values[name], lr=tenant.lr, eps=1e-4)
            elif step == tenant.steps.stop:
                randlora.remove(model, name)
        present = [name for name in names if step in TENANTS[name].steps]
        for part in range(accumulated if present else 0):
            ids = torch.cat([batch(name, step, part) for name in present])
            with randlora.serving.routed(model, [name for name in present for _ in range(2)]):
                each = row_losses(model, ids).view(len(present), 2).mean(1) / accumulated
                each.sum().backward()
            for name, loss in zip(present, each.tolist(), strict=True):
                losses[name].append(loss)
        for name in present:
            optimizers[name].step()
            optimizers[name].zero_grad()
    return losses, values


def batch(name: str, step: int, part: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((sorted(TENANTS).index(name), step, part)))
    return torch.randint(0, models.VOCABULARY, (2, 9), generator=generator)


def row_losses(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.medium
@pytest.mark.parametrize(("checkpoints", "accumulated"), [(False, 1), (True, 2), further(False, 2), further(True, 1)])
def test_each_tenant_of_a_batch_is_trained_as_if_it_were_alone(checkpoints: bool, accumulated: int) -> None:
    options = {"checkpoints": checkpoints, "accumulated": accumulated}
    losses, values = trained(TENANTS, **options)  # type: ignore[arg-type]
    for name, tenant in TENANTS.items():
        own_losses, own_values = trained([name], **options)  # type: ignore[arg-type]
        torch.testing.assert_close(losses[name], own_losses[name], rtol=1e-5, atol=1e-6)
        assert len(losses[name]) == accumulated * len(tenant.steps)
        for found, expected in zip(values[name], own_values[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def test_the_parameters_of_one_adapter_are_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    randlora.inject(model, r=2, name="a", train_also=["1"])
    randlora.inject(model, r=4, name="b", trainable=True)
    randlora.inject(model, r=4, name="frozen", trainable=False)
    of_a, of_b = (randlora.trainable_parameters(model, name) for name in "ab")
    assert [len(of_a), len(of_b)] == [4, 2]
    assert {*map(id, of_a + of_b)} == {*map(id, randlora.trainable_parameters(model))}
    said = r"would have nothing to do \(frozen\): call .*set_trainable\(model, 'frozen'"
    for name, message in {"frozen": said, "missing": "missing"}.items():
        with pytest.raises(AdapterError, match=message):
            randlora.trainable_parameters(model, name)

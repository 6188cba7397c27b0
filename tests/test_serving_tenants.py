"""Several adapters trained in one batch: each tenant gets what it would have got alone, whoever comes and goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError
from tests import models
from tests.further import further

STEPS = 8


class Tenant(NamedTuple):
    seed: int
    lr: float
    steps: range = range(STEPS)
    resumed: int = -1
    r: int = 4


TENANTS = {
    "a": Tenant(0, 1e-2),
    "b": Tenant(1, 3e-3, resumed=5),
    "joins": Tenant(0, 2e-2, range(3, STEPS), r=2),
    "leaves": Tenant(2, 5e-3, range(4)),
}
"""Of which two share their bases, and one has other ones."""


class Training:
    """A model, and for each of its tenants an optimizer, the losses, and the values that it ended with."""

    def __init__(self, checkpoints: bool, accumulated: int, place: Path) -> None:
        torch.manual_seed(0)
        self.model: Any = models.llama().train()
        if checkpoints:
            enable: Any = getattr(
                self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        self.accumulated, self.place = accumulated, place
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.losses: dict[str, list[float]] = defaultdict(list)
        self.values: dict[str, list[nn.Parameter]] = {}

    def run(self, names: Iterable[str]) -> None:
        for step in range(STEPS):
            for name in names:
                self.arrange(name, TENANTS[name], step)
            if present := [name for name in names if step in TENANTS[name].steps]:
                self.step(present, step)

    def arrange(self, name: str, tenant: Tenant, step: int) -> None:
        """Let a tenant join, leave, or be saved and go on, before a step."""
        if step not in (tenant.steps.start, tenant.resumed, tenant.steps.stop):
            return
        state = {}
        if step == tenant.steps.start:
            randlora.inject(self.model, name=name, r=tenant.r, seed=tenant.seed, trainable=True)
        else:
            state = self.optimizers.pop(name).state_dict()
            randlora.save(self.model, self.place / name, name=name)
            randlora.remove(self.model, name)
        if step == tenant.resumed:
            randlora.load(self.model, self.place / name, name=name, trainable=True)
        if step != tenant.steps.stop:
            self.values[name] = randlora.trainable_parameters(self.model, name)
            self.optimizers[name] = torch.optim.AdamW(self.values[name], lr=tenant.lr, eps=1e-4)
            self.optimizers[name].load_state_dict(state or self.optimizers[name].state_dict())

    def step(self, names: list[str], step: int) -> None:
        for part in range(self.accumulated):
            ids = torch.cat([batch(name, step, part) for name in names])
            with randlora.serving.routed(self.model, [name for name in names for _ in range(2)]):
                losses = row_losses(self.model, ids).view(len(names), 2).mean(1) / self.accumulated
                losses.sum().backward()
            for name, loss in zip(names, losses.tolist(), strict=True):
                self.losses[name].append(loss)
        for name in names:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()


def batch(name: str, step: int, part: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((sorted(TENANTS).index(name), step, part)))
    return torch.randint(0, models.VOCABULARY, (2, 9), generator=generator)


def row_losses(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@pytest.mark.medium
@pytest.mark.parametrize(("checkpoints", "accumulated"), [(False, 1), (True, 2), further(False, 2), further(True, 1)])
def test_each_tenant_of_a_batch_is_trained_as_if_it_were_alone(
    checkpoints: bool, accumulated: int, tmp_path: Path
) -> None:
    together = Training(checkpoints, accumulated, tmp_path / "together")
    together.run(TENANTS)
    for name, tenant in TENANTS.items():
        alone = Training(checkpoints, accumulated, tmp_path / "alone")
        alone.run([name])
        torch.testing.assert_close(together.losses[name], alone.losses[name], rtol=1e-5, atol=1e-6)
        assert len(together.losses[name]) == accumulated * len(tenant.steps)
        for found, expected in zip(together.values[name], alone.values[name], strict=True):
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

"""A module for Lightning with an adapter, dropout, a norm with statistics and a head that no adapter trains."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import randlora
from randlora.integrations.lightning import AdapterCallback
from tests.kit import bits


class Module(pl.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = options.pop("norm", True)
        layers = [nn.Linear(16, 32), *([nn.BatchNorm1d(32)] if norm else []), nn.Dropout(0.1), nn.Linear(32, 8)]
        self.model = nn.Sequential(*layers)
        self.options = {"r": 4, "targets": "all-linear", **({"train_also": ["1.weight"]} if norm else {}), **options}
        randlora.inject(self.model, **self.options)
        self.head = nn.Linear(8, 4)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.head(self.model(batch[0])).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=1e-2)


def trained(module: pl.LightningModule) -> dict[str, Any]:
    state = module.state_dict()
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: bits(state[name]) for name in {*names, *dict(module.named_buffers())}}


def fit(
    module: pl.LightningModule, out: Path, *, epochs: int, resume: Path | None = None, batch: int = 8, **options: Any
) -> pl.Trainer:
    callback = options.pop("callback", None) or AdapterCallback()
    checkpoints = ModelCheckpoint(out, filename="{epoch}", **{"save_top_k": -1, **options.pop("checkpoints", {})})
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[checkpoints, callback], accelerator="cpu", **quiet, **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        data = TensorDataset(torch.randn(32, 16))
    trainer.fit(module, DataLoader(data, batch_size=batch, shuffle=True), ckpt_path=resume)
    return trainer

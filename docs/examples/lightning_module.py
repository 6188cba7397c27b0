"""Train an adapter with Lightning, whose checkpoints then hold the adapter and not the model.

`python docs/examples/lightning_module.py` runs it, and `--resume` goes on from the last checkpoint. The model is a tiny
BERT with random weights, in the place of one that you would load. It learns, with an adapter and a head of its own, to
tell the Grimms' tales from the same text with its bytes turned round.
"""

import os
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here is on the Hub

import pytorch_lightning as pl  # `import lightning as L` is the same
import torch
import typer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import randlora
from randlora.integrations.lightning import AdapterCallback

TALES = Path(__file__).parent / "data" / "grimm.txt"
WINDOW = 32  # bytes


class AdapterModule(pl.LightningModule):
    """An adapted classifier."""

    def __init__(self, model: torch.nn.Module, *, lr: float = 1e-2) -> None:
        """Take a model that carries one adapter; its base is in no checkpoint and must be made anew for every run."""
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        ids, labels = batch
        loss: Tensor = self.model(input_ids=ids, labels=labels).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train the adapter and what was named beside it."""
        return torch.optim.AdamW(randlora.trainable_parameters(self.model), lr=self.lr)


def adapted(**options: Any) -> AdapterModule:
    """Make the model, always with the same weights, and put an adapter on it; ``options`` go to `randlora.inject`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertForSequenceClassification(config)
    print(randlora.inject(model, **{"r": 8, "train_also": ["classifier"], **options}))
    return AdapterModule(model)


def windows(count: int) -> TensorDataset:
    """Cut the tales into windows, and turn every other one round: label 1."""
    ids = torch.tensor(list(TALES.read_bytes()[: count * WINDOW])).reshape(-1, WINDOW)
    labels = torch.arange(count) % 2
    return TensorDataset(torch.where(labels[:, None] == 1, ids.flip(1), ids), labels)


def make_trainer(out: Path, *, epochs: int) -> pl.Trainer:
    """Make a trainer that writes a checkpoint after every epoch."""
    checkpoints = ModelCheckpoint(out, filename="{epoch}", save_top_k=-1, save_last=True)
    return pl.Trainer(max_epochs=epochs, callbacks=[checkpoints, AdapterCallback()], logger=False, log_every_n_steps=1)


def main(
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Directory for the checkpoints.")] = Path("build/lightning"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,  # noqa: FBT002
) -> None:
    """Train an adapter with Lightning."""
    module = adapted()
    batches = DataLoader(windows(400), batch_size=16, shuffle=True)
    make_trainer(out, epochs=epochs).fit(module, batches, ckpt_path=out / "last.ckpt" if resume else None)
    print(randlora.save(module.model, out / "adapter"))


if __name__ == "__main__":
    typer.run(main)

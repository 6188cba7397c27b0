"""`AdapterCallback`: Lightning's checkpoints hold what is trained, and a resumed run is the run it goes on with."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import randlora
from randlora.errors import AdapterError, CheckpointError
from tests.kit import all_bits, untouched
from tests.peer import TRAINERS_WARNINGS

pytestmark = [*TRAINERS_WARNINGS, pytest.mark.medium]


def test_a_checkpoint_has_what_is_trained_and_statistics(tmp_path: Path) -> None:
    from tests.lightning_modules import Module, fit, trained

    module = Module()
    trainer = fit(module, tmp_path, epochs=1)
    values = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert all_bits(values) == trained(module)
    assert {"model.1.weight", "model.1.running_mean", "head.weight"} < values.keys()
    assert not {"model.0.weight", "model.1.bias"} & values.keys()
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"].keys() == values.keys()


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    from tests.lightning_modules import Module, fit, trained

    class Own(Module):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.found = checkpoint["epoch"]

    whole, rest = Module(), Own()
    fit(whole, tmp_path / "whole", epochs=3)
    fit(Module(), tmp_path / "part", epochs=2)
    torch.manual_seed(99)
    fit(rest, tmp_path / "part", epochs=3, resume=tmp_path / "part/epoch=1.ckpt")
    assert rest.losses == whole.losses[8:]
    assert len(set(rest.losses)) == 4
    assert trained(rest) == trained(whole)
    assert rest.found == 1  # its own hook was called, and given back
    assert "on_load_checkpoint" not in vars(rest)


def test_the_rate_and_the_optimizer_are_looked_at_as_training_begins(tmp_path: Path) -> None:
    from tests.lightning_modules import Module, fit

    class Own(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    module = Own()
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], 2e-5)
    with pytest.warns(UserWarning, match=r"^learning rate 2e-05 is far below 0\.01, which the report"):
        fit(module, tmp_path, epochs=1)
    randlora.eject(module.model)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    randlora.inject(module.model, **module.options)
    with pytest.raises(AdapterError, match="the optimizer has frozen parameters"):
        fit(module, tmp_path, epochs=1)


DIFFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, r"differs from the model's in bases: inject .* it was trained with, on dense bases .*seed=0"),
    ({"r": 2}, "differs from the model's in layers and bases"),
    ({"alpha": 3}, "differs from the model's in layers"),
    ({"train_also": None}, "differs from the model's in train_also"),
    ({"name": "other"}, "differs from the model's in name"),
    ({}, r"head\.bias is trained in only one of the two"),
]


def test_checkpoints_of_another_adapter_and_of_weights_only_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    from randlora.integrations.lightning import AdapterCallback
    from tests.lightning_modules import Module, fit

    fit(Module(), tmp_path, epochs=1)
    for options, message in DIFFERENCES:
        module = Module(**options)
        module.head.bias.requires_grad = bool(options)
        with untouched(module.model), pytest.raises(CheckpointError, match=message):
            fit(module, tmp_path, epochs=2, resume=tmp_path / "epoch=0.ckpt")
    plain, module = Module(), Module()
    randlora.eject(plain.model)
    with pytest.raises(AdapterError, match=r"Module has no adapter: call randlora\.inject before trainer\.fit"):
        fit(plain, tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="writes the whole model"):
        fit(module, tmp_path, epochs=1, checkpoints={"save_weights_only": True})
    assert module.losses == []
    values = {"state_dict": module.state_dict()}
    refused = pytest.raises(CheckpointError, match=r"is sharded, and .* give the strategy save_distributed_checkpoint=")
    with patch("randlora.integrations.lightning.is_whole", return_value=False), refused:  # as under fully_shard
        AdapterCallback().on_save_checkpoint(None, module, values)

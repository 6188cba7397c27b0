"""The examples of training: each runs, its checkpoints hold the adapter only, and a resumed run is the same run."""

import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import randlora
from randlora.errors import CheckpointError
from tests.checkpoint_files import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from tests.examples import EXAMPLES, imported
from tests.kit import Bits, all_bits, bits
from tests.peer import TRAINERS_WARNINGS
from tests.torture.training import killed_training, plain_loop

ADAPTER_FILES = {CARD_FILE, CONFIG_FILE, TENSORS_FILE}
NAMES = ("plain_pytorch", "transformers_trainer", "trl_sft", "lightning_module")

pytestmark = [*TRAINERS_WARNINGS, pytest.mark.medium]


def trained_bits(model: nn.Module) -> list[Bits]:
    """Return all that an adapter's training changes, to be compared with ``==``."""
    return [bits(parameter) for parameter in randlora.trainable_parameters(model)]


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Plain PyTorch


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    return imported("plain_pytorch")


def test_a_plain_run_learns_its_curve(plain: ModuleType) -> None:
    run = plain.begin(steps=60)
    losses = list(run.train(60))
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.parametrize("stop", [1, 25])
def test_a_resumed_plain_run_has_the_same_losses(stop: int, plain: ModuleType) -> None:
    whole = plain.begin(steps=40)
    expected = list(whole.train(40))
    part = plain.begin(steps=40)
    before = list(part.train(stop))
    part.save(Path("run"))
    list(part.train(stop + 3))  # and is killed before the next checkpoint
    torch.manual_seed(99)
    rest = plain.resume(Path("run"), steps=40)
    assert before + list(rest.train(40)) == expected
    assert trained_bits(rest.model) == trained_bits(whole.model)


def test_a_checkpoint_of_a_plain_run_that_was_not_finished_is_passed_over(plain: ModuleType) -> None:
    run = plain.begin(steps=8)
    for last in (2, 4):
        list(run.train(last))
        run.save(Path("run"))
    assert files(Path("run/step-000004")) == {*ADAPTER_FILES, "training.pt"}
    Path("run/step-000004/training.pt").unlink()
    assert plain.resume(Path("run"), steps=8).done == 2
    Path("run/step-000002/training.pt").unlink()
    with pytest.raises(typer.BadParameter, match="there is no checkpoint in run"):
        plain.resume(Path("run"), steps=8)


def test_training_that_is_killed_has_the_losses_of_training_that_is_not() -> None:
    done, again, failures = killed_training(plain_loop(), 6, steps=60, life=0.4)
    assert failures == []
    assert (done, again > 0) == (6, True)


# transformers


def noted_losses(model: nn.Module) -> list[float]:
    """Note every loss that a model computes from now on."""
    losses: list[float] = []
    model.register_forward_hook(lambda _module, _inputs, output: losses.append(output.loss.item()))
    return losses


@pytest.fixture
def transformers_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    return imported("transformers_trainer")


def test_a_trainers_checkpoint_holds_the_adapter_and_not_the_model(transformers_trainer: ModuleType) -> None:
    trainer = transformers_trainer.make_trainer(Path("run"), steps=2, every=2)
    trainer.train()
    found = files(Path("run/checkpoint-2"))
    assert found >= ADAPTER_FILES | {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert not any(name.startswith(("model", "pytorch_model")) for name in found)
    fresh = transformers_trainer.pretrained()
    randlora.load(fresh, "run/checkpoint-2", trainable=True)
    assert trained_bits(fresh) == trained_bits(trainer.model)


@pytest.mark.parametrize("is_new", [True, False], ids=["new-trainer", "same-trainer"])
def test_a_resumed_trainer_has_the_same_losses(is_new: bool, transformers_trainer: ModuleType) -> None:
    make = transformers_trainer.make_trainer
    whole = make(Path("whole"), steps=6, every=3)
    expected = noted_losses(whole.model)
    whole.train()
    part = make(Path("part"), steps=6, every=3)
    part.train()
    rest = make(Path("part"), steps=6, every=3) if is_new else part
    nn.init.normal_(randlora.trainable_parameters(rest.model)[0])
    losses = noted_losses(rest.model)
    rest.train(resume_from_checkpoint="part/checkpoint-3")
    assert losses == expected[3:]
    assert len(set(losses)) == 3
    assert trained_bits(rest.model) == trained_bits(whole.model)


def test_a_trainer_gives_the_best_adapter_back(transformers_trainer: ModuleType) -> None:
    model = transformers_trainer.pretrained()
    randlora.inject(model, r=8)
    arguments = TrainingArguments(
        "run",
        max_steps=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first is the best
        report_to=[],
    )
    data = transformers_trainer.windows(16)
    trainer = transformers_trainer.AdapterTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = transformers_trainer.pretrained(), transformers_trainer.pretrained()
    randlora.load(best, "run/checkpoint-2", trainable=True)
    randlora.load(last, "run/checkpoint-4", trainable=True)
    assert trained_bits(model) == trained_bits(best) != trained_bits(last)


# Lightning


@pytest.fixture
def lightning_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    return imported("lightning_module")


def fit(example: ModuleType, out: str, *, epochs: int, checkpoint: str | None = None, **options: Any) -> Any:
    """Run the example for some epochs, and return its module with the losses of every step."""
    module = example.adapted(**options)
    losses = noted_losses(module.model)
    batches = DataLoader(example.windows(48), batch_size=16, shuffle=True)
    trainer = example.make_trainer(Path(out), epochs=epochs)
    trainer.fit(module, batches, ckpt_path=checkpoint)
    return module, losses


def test_a_lightning_checkpoint_holds_what_is_trained_and_nothing_else(lightning_module: ModuleType) -> None:
    module, _ = fit(lightning_module, "run", epochs=1)
    checkpoint = torch.load("run/last.ckpt", weights_only=True)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all_bits(checkpoint["state_dict"]) == all_bits(trained)
    assert {"model.classifier.weight", "model.classifier.bias"} < set(trained)
    assert len(trained) == 2 + 2 * 2 * 2, "the head, and Λ and Γ of two layers in two blocks"


def test_a_resumed_lightning_run_has_the_same_losses(lightning_module: ModuleType) -> None:
    whole, expected = fit(lightning_module, "whole", epochs=3)
    fit(lightning_module, "part", epochs=2)
    rest, losses = fit(lightning_module, "part", epochs=3, checkpoint="part/last.ckpt")
    assert losses == expected[6:]
    assert len(set(losses)) == 3
    assert trained_bits(rest.model) == trained_bits(whole.model)


@pytest.mark.parametrize("options", [{"seed": 1}, {"r": 4}, {"train_also": None}], ids=["seed", "r", "no-head"])
def test_a_lightning_checkpoint_of_another_adapter_is_refused(
    options: dict[str, Any], lightning_module: ModuleType
) -> None:
    fit(lightning_module, "run", epochs=1)
    with pytest.raises(CheckpointError, match="inject with the options"):
        fit(lightning_module, "run", epochs=2, checkpoint="run/last.ckpt", **options)


# As programs


@pytest.mark.parametrize("name", NAMES)
def test_an_example_of_training_runs_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lengths = {"lightning_module": ["--epochs"]}.get(name, ["--every", "2", "--steps"])
    for arguments in (["2"], ["4", "--resume"]):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", "run", *lengths, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert exit_.value.code == 0
    assert "RandLoRA adapter 'default'" in capsys.readouterr().out
    assert sorted(path.name for path in Path("run").iterdir()) == LEFT[name]


LEFT = {
    "plain_pytorch": ["step-000002", "step-000004"],
    "transformers_trainer": ["adapter", "checkpoint-2", "checkpoint-4"],
    "trl_sft": ["README.md", "adapter", "checkpoint-2", "checkpoint-4"],
    "lightning_module": ["adapter", "epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"],
}

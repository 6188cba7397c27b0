"""The examples of training: each runs, its checkpoints hold the adapter only, and it goes on where it was stopped."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from torch import nn

import randlora
from tests.checkpoint_files import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from tests.examples import EXAMPLES, imported
from tests.kit import Bits, bits
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
    done, again, failures = killed_training(plain_loop(), 3, steps=60, life=0.4)
    assert failures == []
    assert (done, again > 0) == (3, True)


# As programs


@pytest.mark.parametrize("name", NAMES)
def test_an_example_of_training_runs_and_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    is_by_epochs = name == "lightning_module"
    lengths = ["--epochs"] if is_by_epochs else ["--every", "2", "--steps"]
    for arguments in (["1"], ["2", "--resume"]) if is_by_epochs else (["2"], ["4", "--resume"]):
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
    "lightning_module": ["adapter", "epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"],
}

"""ms-swift's command line with the tuner: it trains, resumes with the same bits, merges, and refuses what it must."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("swift.tuner_plugin", reason="ms-swift is not installed: make test-trainers")

import torch

import randlora
from randlora.errors import AdapterError
from tests.other_trainers.models import logits, write_base, write_texts

QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
PLUGIN = "from randlora.integrations.swift import register\n\nregister({})\n"
PROGRAMS = Path(sys.executable).parent
OPTIONS = (
    "--model base --model_type llama --template llama3 --use_hf true --external_plugins plugin.py "
    "--tuner_type randlora --dataset texts.jsonl --add_version false --max_steps 6 --save_steps 3 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --learning_rate 0.01 --lr_scheduler_type constant "
    "--torch_dtype float32 --attn_impl sdpa --seed 0"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("swift")
    write_base(directory / "base")
    write_texts(directory / "texts.jsonl", "messages")
    (directory / "plugin.py").write_text(PLUGIN.format("r=4, alpha=8"), encoding="utf-8")
    return directory


def swift(command: str, base: Path) -> str:
    """Run a command of ms-swift, and return what it prints."""
    line = [str(PROGRAMS / "swift"), *command.split()]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=base, env=os.environ | QUIET)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def run(base: Path) -> str:
    return swift(f"sft {OPTIONS} --output_dir run", base)


def test_a_run_saves_the_adapter_and_not_the_model(base: Path, run: str) -> None:
    assert run.startswith("0\n"), run
    assert "RandLoRA adapter 'default'" in run
    assert (base / "run/checkpoint-6/adapter_model.safetensors").exists()
    assert not (base / "run/checkpoint-6/model.safetensors").exists()
    assert not torch.equal(logits(base / "base", base / "run/checkpoint-6"), logits(base / "base"))


def test_a_run_that_is_resumed_ends_with_the_same_bits(base: Path, run: str) -> None:
    said = swift(f"sft {OPTIONS} --output_dir resumed --resume_from_checkpoint run/checkpoint-3", base)
    assert said.startswith("0\n"), said
    saved = (base / name / "checkpoint-6/adapter_model.safetensors" for name in ("run", "resumed"))
    first, second = (file.read_bytes() for file in saved)
    assert first == second


def test_the_adapter_is_merged_by_the_command_of_randlora(base: Path, run: str) -> None:
    command = [str(PROGRAMS / "randlora"), "merge", "run/checkpoint-6", "merged", "--base", "base"]
    subprocess.run(command, check=True, capture_output=True, cwd=base)
    expected = logits(base / "base", base / "run/checkpoint-6")
    torch.testing.assert_close(logits(base / "merged"), expected, rtol=1e-4, atol=1e-5)


def test_an_option_that_does_not_exist_is_refused(base: Path) -> None:
    (base / "wrong.py").write_text(PLUGIN.format("rank=4"), encoding="utf-8")
    said = swift(f"sft {OPTIONS} --output_dir wrong".replace("plugin.py", "wrong.py"), base)
    assert not said.startswith("0\n")
    assert "unknown option rank=: use r=" in said


def test_a_task_whose_trainer_would_not_resume_is_refused() -> None:
    from randlora.integrations.swift import register

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AdapterError, match="cannot train embedding with tuner_type randlora"):
        register(r=2).prepare_model(SimpleNamespace(task_type="embedding"), model)
    assert randlora.adapters(model) == []

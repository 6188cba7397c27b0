"""ms-swift's command line with the tuner: it trains, resumes with the same bits, merges, and refuses what it must."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("swift.tuner_plugin", reason="ms-swift is not installed: make test-trainers")

import torch

import randlora
from randlora.errors import AdapterError
from tests.other_trainers import command, logits, write_inputs

PLUGIN = "from randlora.integrations.swift import register\n\nregister({})\n"
OPTIONS = (
    "--model base --model_type llama --template llama3 --use_hf true --tuner_type randlora --dataset texts.jsonl "
    "--add_version false --max_steps 6 --save_steps 3 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 "
    "--learning_rate 0.01 --lr_scheduler_type constant --torch_dtype float32 --attn_impl sdpa --seed 0"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_inputs(tmp_path_factory.mktemp("swift"), "messages")
    (directory / "plugin.py").write_text(PLUGIN.format("r=4, alpha=8"), encoding="utf-8")
    (directory / "wrong.py").write_text(PLUGIN.format("rank=4"), encoding="utf-8")
    return directory


def swift(base: Path, output: str, plugin: str = "plugin.py", more: str = "") -> str:
    words = f"sft {OPTIONS} --external_plugins {plugin} --output_dir {output} {more}"
    return command(base, "swift", *words.split())


@pytest.fixture(scope="module")
def run(base: Path) -> str:
    return swift(base, "run")


def test_a_run_saves_the_adapter_and_not_the_model_and_a_command_merges_it(base: Path, run: str) -> None:
    saved = base / "run/checkpoint-6"
    assert run.startswith("0\n"), run
    assert "RandLoRA adapter 'default'" in run
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()
    assert not torch.equal(logits(base / "base", saved), logits(base / "base"))
    merged = command(base, "randlora", "merge", str(saved), "merged", "--base", "base")
    assert merged.startswith("0\n"), merged
    torch.testing.assert_close(logits(base / "merged"), logits(base / "base", saved), rtol=1e-4, atol=1e-5)


def test_a_run_that_is_resumed_ends_with_the_same_bits(base: Path, run: str) -> None:
    said = swift(base, "resumed", more="--resume_from_checkpoint run/checkpoint-3")
    assert said.startswith("0\n"), said
    saved = (base / name / "checkpoint-6/adapter_model.safetensors" for name in ("run", "resumed"))
    first, second = (file.read_bytes() for file in saved)
    assert first == second


def test_an_option_that_does_not_exist_is_refused(base: Path) -> None:
    said = swift(base, "wrong", "wrong.py")
    assert not said.startswith("0\n")
    assert "unknown option rank=: use r=" in said


def test_a_task_whose_trainer_would_not_resume_is_refused() -> None:
    from randlora.integrations.swift import register

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AdapterError, match="cannot train embedding with tuner_type randlora"):
        register(r=2).prepare_model(SimpleNamespace(task_type="embedding"), model)
    assert randlora.adapters(model) == []

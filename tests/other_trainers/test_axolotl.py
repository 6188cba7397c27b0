"""axolotl's command line with the plugin: it trains, resumes with the same bits, merges, and refuses what it must."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed: make test-trainers")

import torch
import yaml

from tests.other_trainers import command, logits, write_inputs

SETTINGS: dict[str, Any] = {"sequence_len": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 6}
SETTINGS |= {"save_steps": 3, "seed": 0, "bf16": False, "tf32": False, "learning_rate": 0.01}
SETTINGS |= {"optimizer": "adamw_torch", "lr_scheduler": "constant", "attn_implementation": "sdpa"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("axolotl"), "text")


def axolotl(verb: str, base: Path, output: str, **options: Any) -> str:
    config = {
        "base_model": str(base / "base"),
        "plugins": ["randlora.integrations.axolotl.RandLoRAPlugin"],
        "adapter": "randlora",
        "randlora": {"r": 4, "alpha": 8},
        "datasets": [{"path": str(base / "texts.jsonl"), "ds_type": "json", "type": "completion", "field": "text"}],
        "dataset_prepared_path": str(base / "prepared"),
        "output_dir": str(base / output),
        **SETTINGS,
        **options,
    }
    file = base / f"{output}.yml"
    given = {name: value for name, value in config.items() if value is not None}
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    return command(base, "axolotl", verb, str(file), *(["--launcher", "python"] if verb == "train" else []))


@pytest.fixture(scope="module")
def run(base: Path) -> str:
    return axolotl("train", base, "run")


def test_a_run_saves_the_adapter_and_not_the_model_and_its_command_merges_it(base: Path, run: str) -> None:
    assert run.startswith("0\n"), run
    for directory in (base / "run", base / "run/checkpoint-3"):
        assert (directory / "adapter_model.safetensors").exists()
        assert not (directory / "model.safetensors").exists()
    trained = logits(base / "base", base / "run")
    assert not torch.equal(trained, logits(base / "base"))
    said = next(line for line in run.splitlines() if "merge the adapter by: " in line).split("by: ")[1].split()
    merged = command(base, "randlora", *(str(base / "merged") if word == "MERGED_DIR" else word for word in said[1:]))
    assert merged.startswith("0\n"), merged
    torch.testing.assert_close(logits(base / "merged"), trained, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_resumed_ends_with_the_same_bits(base: Path, run: str) -> None:
    said = axolotl("train", base, "resumed", resume_from_checkpoint=str(base / "run/checkpoint-3"))
    assert said.startswith("0\n"), said
    first, second = ((base / name / "adapter_model.safetensors").read_bytes() for name in ("run", "resumed"))
    assert first == second


def test_an_adapter_that_was_saved_is_trained_on(base: Path, run: str) -> None:
    said = axolotl("train", base, "further", lora_model_dir=str(base / "run"), randlora=None)
    assert said.startswith("0\n"), said
    assert not torch.equal(logits(base / "base", base / "further"), logits(base / "base", base / "run"))


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("train", {"randlora": {"rank": 4}}, "unknown option rank=: use r="),
        ("train", {"load_in_4bit": True}, "give as base_model a checkpoint that is already quantized"),
        ("train", {"lora_r": 8}, "lora_r are options of LoRA"),
        ("train", {"rl": "dpo"}, "axolotl takes no trainer from a plugin for rl"),
        ("merge-lora", {}, "randlora merge"),
    ],
)
def test_what_axolotl_would_ignore_is_refused(base: Path, verb: str, options: dict[str, Any], words: str) -> None:
    said = axolotl(verb, base, "refused", **options)
    assert not said.startswith("0\n")
    assert words in said
    assert not (base / "refused/adapter_model.safetensors").exists()

"""The experiments for PEFT's method comparison: files that PEFT takes, with the numbers that the arithmetic gives."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, RandLoraConfig, get_peft_model

import randlora
from tests.checkpoint_files import CONFIG_FILE, read_fields
from tests.kit import fill
from tests.models import RealModel, llama, tokens
from tests.peer import THEIR_WARNINGS, assert_same_effect, copy_values, in_ours, peft_draw
from tests.test_paper_counts import llama_3_2_3b

pytestmark = THEIR_WARNINGS

FOLDER = Path(__file__).parent.parent / "docs" / "examples" / "peft_method_comparison"
EXPERIMENTS = sorted((FOLDER / "experiments" / "randlora").iterdir())
KIND = RealModel("llama", lambda: llama(hidden_size=96), tokens, ("q_proj", "v_proj"))  # q has three bases of rank 32
EQUIVALENT = randlora.equivalent_alpha(lora_r=32, lora_alpha=64, r=32)
PEFT_LR = 1e-4

every_experiment = pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)


def config_of(experiment: Path) -> Any:
    return PeftConfig.from_pretrained(str(experiment))


def rate_of(experiment: Path) -> float:
    path = experiment / "training_params.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return float(given.get("optimizer_kwargs", {"lr": PEFT_LR})["lr"])


@every_experiment
def test_peft_reads_an_experiment_and_writes_it_back_unchanged(experiment: Path, tmp_path: Path) -> None:
    config = config_of(experiment)
    assert type(config) is RandLoraConfig
    config.save_pretrained(str(tmp_path))
    assert (tmp_path / CONFIG_FILE).read_bytes() == (experiment / CONFIG_FILE).read_bytes()


def test_one_experiment_changes_only_the_alpha_one_only_the_rate_and_one_only_the_layers() -> None:
    of_alpha, of_rate, of_layers = EXPERIMENTS
    assert config_of(of_alpha) == RandLoraConfig(randlora_alpha=round(EQUIVALENT))
    assert config_of(of_rate) == RandLoraConfig()
    assert [path.name for path in of_alpha.iterdir()] == [CONFIG_FILE]
    layers = config_of(of_layers).target_modules
    assert config_of(of_layers) == RandLoraConfig(
        r=88, randlora_alpha=20 * 88, target_modules=layers, save_projection=False
    )
    sizes = [randlora.plan(llama_3_2_3b(), r, targets=on) for r, on in ((88, layers), (32, ["q_proj", "v_proj"]))]
    assert sizes[0].trainable_parameters == pytest.approx(sizes[1].trainable_parameters, rel=0.001)
    params = json.loads((of_rate / "training_params.json").read_text(encoding="utf-8"))
    assert params == {"optimizer_kwargs": {"lr": 5e-5, "weight_decay": 0.1}}  # PEFT replaces the mapping as a whole


def test_the_rate_is_between_those_of_the_same_first_step_and_of_the_same_growth() -> None:
    share = EQUIVALENT / RandLoraConfig().randlora_alpha
    assert share * PEFT_LR < rate_of(EXPERIMENTS[1]) < share**0.5 * PEFT_LR


@every_experiment
def test_the_page_has_the_numbers_of_an_experiment(experiment: Path) -> None:
    config, lr = config_of(experiment), rate_of(experiment)
    step, growth = (config.randlora_alpha / config.r / (EQUIVALENT / 32) * (lr / PEFT_LR) ** power for power in (1, 2))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `randlora/{experiment.name}`"))
    alpha, scale, rate, *sizes = (float(cell) for cell in row.split("|")[2:7])
    assert (alpha, rate) == (config.randlora_alpha, lr)
    assert [scale, *sizes] == pytest.approx([config.randlora_alpha / config.r, step, growth], abs=0.006)


@every_experiment
def test_ours_computes_with_an_experiment_as_peft_does(experiment: Path, tmp_path: Path) -> None:
    config = config_of(experiment)
    theirs = fill(get_peft_model(KIND.build(), config).eval())
    ours = KIND.build()
    options = {"r": config.r, "alpha": config.randlora_alpha, "seed": config.projection_prng_key}
    randlora.inject(ours, targets=config.target_modules or KIND.targets, stream=peft_draw("dense"), **options)
    copy_values(theirs, ours)
    assert_same_effect(ours, theirs, KIND)
    theirs.save_pretrained(tmp_path)
    assert read_fields(tmp_path)["randlora_alpha"] == config.randlora_alpha
    assert_same_effect(in_ours(KIND, tmp_path), theirs, KIND)

"""The page on long runs, searches and privacy, with the launchers and libraries that it names (`make test-runs`)."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opacus", reason="Opacus is not installed: make test-runs")
pytest.importorskip("optuna", reason="Optuna is not installed: make test-runs")
pytest.importorskip("ray", reason="Ray is not installed: make test-runs")

import optuna
import ray
import ray.tune
import torch
from accelerate.state import GradientState  # type: ignore[import-untyped]
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import randlora
from randlora.integrations.transformers import AdapterTrainer
from tests.loops import EVERY, STEPS, build, loss_of, run_page
from tests.pages import DOCS, FENCE, ROOT, snippets

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1800)]  # as other libraries warn, and wait
TENSORS = "adapter_model.safetensors"
PATHS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_versions_are_those_of_the_page() -> None:
    text = (DOCS / "long_runs.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for library in (optuna, ray):
        assert f"{library.__name__.capitalize()} {library.__version__}" in text
    assert re.findall(r"(?:transformers|opacus)==([\d.]+)", makefile[makefile.index(".venv-runs/.dev: ") :])[:2] == [
        re.search(rf"{name} ([\d.]+\d)", text).group(1)  # type: ignore[union-attr]
        for name in ("transformers", "Opacus")
    ]


# Runs that are started again


@pytest.fixture(autouse=True)
def _without_loaders() -> Iterator[None]:
    """Forget what accelerate keeps of a run that stops within an epoch: Ray could not pickle a later trainer."""
    yield
    GradientState._reset_state()


@pytest.fixture
def alive(tmp_path: Path) -> Path:
    """A file that says that no process has been killed."""
    (tmp_path / "alive").touch()
    return tmp_path / "alive"


def require_resumed(alive: Path, *checkpoints: int) -> None:
    """Require that a process was killed, and that the run went on once, from one of some checkpoints."""
    assert not alive.exists()
    steps = [int(step) for step in alive.with_name("steps").read_text(encoding="utf-8").split()]
    (again,) = (step for before, step in pairwise(steps) if step <= before)
    assert (steps[0], steps[-1], again - 1 in checkpoints) == (1, STEPS, True)


def torchrun(kind: str, run: Path, alive: Path) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "tests.loops", kind, str(run), str(alive)]
    environment = os.environ | PATHS | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    ended = run / f"{STEPS:08}" if kind == "page" else run.with_name(f"{run.name}.adapter")
    assert (ended / TENSORS).exists(), done.stderr[-3000:]  # gloo may abort a process at its end: tests/distributed
    return ended


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Return the file of a run that nothing stops."""
    place = tmp_path_factory.mktemp("whole")
    files: dict[str, bytes] = {}

    def found(kind: str) -> bytes:
        if kind not in files:
            files[kind] = (torchrun(kind, place / kind, place / "none") / TENSORS).read_bytes()
        return files[kind]

    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": PATHS})
    yield
    ray.shutdown()


@pytest.mark.parametrize("kind", ["page", "sharded"])
def test_torchrun_starts_a_run_again_that_ends_with_the_same_bits(
    kind: str, tmp_path: Path, alive: Path, whole: Callable[[str], bytes]
) -> None:
    ended = torchrun(kind, tmp_path / "run", alive)
    require_resumed(alive, 2 * EVERY)
    assert (ended / TENSORS).read_bytes() == whole(kind)


@pytest.mark.usefixtures("cluster")
def test_ray_starts_a_run_again_from_its_own_checkpoint(
    tmp_path: Path, alive: Path, whole: Callable[[str], bytes]
) -> None:
    names = run_page("def train", build=build, loss_of=loss_of(alive), path=str(tmp_path / "ray"))
    found = run_page("def in_ray", **names)["result"]
    require_resumed(alive, EVERY, 2 * EVERY)  # the controller may not have heard of the last one
    assert found.metrics == {"done": STEPS}
    assert len(found.best_checkpoints) == STEPS // EVERY
    assert Path(found.checkpoint.path, TENSORS).read_bytes() == whole("page")


def test_the_script_for_slurm_is_one_for_bash() -> None:
    text = (DOCS / "long_runs.md").read_text(encoding="utf-8")
    (script,) = (block["code"] for block in FENCE.finditer(text) if "#SBATCH" in block["code"])
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


# transformers' Trainer


def language_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 129}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    return model


def arguments(place: Path, **options: Any) -> TrainingArguments:
    given = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2, "max_steps": 6}
    return TrainingArguments(str(place), **given | options)


def data() -> dict[str, Any]:
    rows = torch.randint(0, 100, (16, 12), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return {"train_dataset": examples, "eval_dataset": examples}


class Stop(TrainerCallback):  # type: ignore[misc]
    """Sends a SIGTERM in the fourth step, to a trainer that does not wait, and sees that it is noticed."""

    def __init__(self, when: str) -> None:
        self.when = when

    def watch(self, handler: Any) -> None:
        (self.noticing,) = (each for each in handler.callbacks if isinstance(each, JITCheckpointCallback))
        self.noticing.jit_manager.kill_wait = 0
        handler.callbacks.insert(0, self)

    def stop(self, when: str, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if (when, state.global_step) == (self.when, 3):
            self.when = ""
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.noticing.jit_manager.is_checkpoint_requested:
                time.sleep(0.01)

    on_step_begin = partialmethod(stop, "before")
    on_pre_optimizer_step = partialmethod(stop, "during")
    on_optimizer_step = partialmethod(stop, "after")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_run_stopped_by_sigterm_is_resumed_with_the_same_bits_unless_dropout_is_drawn_again(
    when: str, dropout: float, tmp_path: Path
) -> None:
    def trainer(place: str) -> AdapterTrainer:
        model = language_model()
        randlora.inject(model, r=8, dropout=dropout)
        options = arguments(tmp_path / place, save_strategy="no", enable_jit_checkpoint=True)
        return AdapterTrainer(model, options, **data())

    def train(run: AdapterTrainer, **options: Any) -> list[bytes]:
        run.train(**options)
        return [each.detach().numpy().tobytes() for each in randlora.trainable_parameters(run.model)]

    expected, stopped = train(trainer("whole")), trainer("run")
    Stop(when).watch(stopped.callback_handler)
    train(stopped)
    step = 4 if when == "after" else 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"checkpoint-{step}"]
    assert (tmp_path / f"run/checkpoint-{step}" / TENSORS).exists()
    assert not list((tmp_path / "run").glob("*/model*"))
    resumed = train(trainer("run"), resume_from_checkpoint=True)
    assert (resumed == expected) == (dropout == 0.0 or when != "during")


def searched(place: Path, **names: Any) -> dict[str, Any]:
    options = arguments(place, eval_strategy="steps", eval_steps=3, save_steps=3)
    names = {"randlora": randlora, "AdapterTrainer": AdapterTrainer, "language_model": language_model} | names
    return run_page("def space", arguments=options, data=data(), **names)


def alone(place: Path, found: Any) -> float:
    """Return the loss of a run by itself with what a search has found."""

    def model_init() -> nn.Module:
        model = language_model()
        randlora.inject(model, r=found.hyperparameters["r"])
        return model

    rate = found.hyperparameters["learning_rate"]
    trainer = AdapterTrainer(model_init=model_init, args=arguments(place, learning_rate=rate), **data())
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


def test_a_search_with_optuna_tries_both_and_its_checkpoints_are_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seeded = partial(optuna.create_study, sampler=optuna.samplers.RandomSampler(seed=0))
    monkeypatch.setattr(optuna, "create_study", seeded)
    page = searched(tmp_path / "run")
    best = page["best"]
    checkpoints = {str(trial): tmp_path / f"run/run-{trial}/checkpoint-6" for trial in range(4)}
    sizes = {trial: randlora.load(language_model(), path).config.r for trial, path in checkpoints.items()}
    assert set(sizes.values()) == {4, 8}
    assert sizes[best.run_id] == best.hyperparameters["r"]
    assert alone(tmp_path / "alone", best) == best.objective


@pytest.mark.usefixtures("cluster")
def test_a_search_with_ray_tune(tmp_path: Path) -> None:
    def model_init(trial: Any = None) -> nn.Module:
        model = language_model()
        randlora.inject(model, r=trial["r"] if trial else 8)
        return model

    def space(_: Any) -> dict[str, Any]:
        return {"r": ray.tune.grid_search([4, 8]), "learning_rate": ray.tune.loguniform(1e-4, 1e-2)}

    options = arguments(tmp_path / "run", eval_strategy="steps", eval_steps=3)
    trainer = AdapterTrainer(model_init=model_init, args=options, **data())
    given = {"storage_path": str(tmp_path / "ray"), "name": "search", "verbose": 0}
    best = trainer.hyperparameter_search(space, n_trials=1, backend="ray", **given)
    assert alone(tmp_path / "alone", best) == pytest.approx(best.objective, abs=1e-6)
    assert {path.name.split("r=")[1][0] for path in (tmp_path / "ray/search").glob("_objective*")} == {"4", "8"}


# Private training


def page_of_privacy() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    (code,) = (each.code for each in snippets(DOCS / "long_runs.md"))
    exec(code, names)
    return names


def test_epsilon_is_the_accountants_for_the_loop_of_the_page() -> None:
    page = page_of_privacy()
    found = run_page("RDPAccountant", **page)
    assert found["accountant"].history == [(page["noise"], page["rate"], page["steps"])]
    assert 0 < found["epsilon"] < math.inf


def test_opacus_has_no_gradients_of_an_adapter_and_says_so_at_its_step() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    randlora.inject(model, r=4)
    assert ModuleValidator.validate(model) == []
    optimizer: Any = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.0)
    examples = DataLoader(TensorDataset(torch.randn(12, 16), torch.randn(12, 1)), batch_size=12)
    given: dict[str, Any] = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "poisson_sampling": False}
    given |= {"module": model.train(), "data_loader": examples}
    model, optimizer, _ = PrivacyEngine().make_private(optimizer=optimizer, **given)
    for x, y in examples:
        nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        optimizer.step()

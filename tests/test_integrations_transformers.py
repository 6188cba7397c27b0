"""`AdapterTrainer`: checkpoints of the adapter only, and runs that go on as if they had not been stopped."""

import ast
import inspect
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.integrations.transformers import PRIVATE, AdapterCheckpoints, AdapterTrainer, LoadsAdapters
from tests.further import further
from tests.hub_server import point_client_at, running_hub
from tests.kit import fill
from tests.trainers import (
    ADAPTER_FILES,
    QUIET,
    adapted_model,
    arguments,
    files,
    plain_model,
    rows,
    tokenizer,
    trained_bits,
)

pytestmark = [*QUIET, pytest.mark.medium]


def trainer(model: nn.Module, directory: Path | str, **options: Any) -> AdapterTrainer:
    own = {name: options.pop(name) for name in ("optimizers", "processing_class", "eval_dataset") if name in options}
    return AdapterTrainer(model, arguments(TrainingArguments, directory, **options), train_dataset=rows(), **own)


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "train-also-and-dropout": {"train_also": ["norm"], "dropout": 0.2},
    "block": {"basis": "block"},
}


USUAL = ["plain", "train-also-and-dropout"]


@pytest.mark.parametrize("resumed_from", ["run/checkpoint-2", True])
@pytest.mark.parametrize("options", [*map(OPTIONS.get, USUAL), further(OPTIONS["block"])], ids=[*USUAL, "block"])
def test_a_resumed_run_ends_with_the_same_bits(options: dict[str, Any], resumed_from: str | bool) -> None:
    through = trainer(adapted_model(**options), "run")
    through.train()
    assert files("run/checkpoint-2") >= ADAPTER_FILES | {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert not [name for name in files("run/checkpoint-2") if name.startswith(("model", "pytorch_model"))]
    shutil.rmtree("run/checkpoint-4")
    rest = trainer(fill(adapted_model(**options)), "run")
    rest.train(resume_from_checkpoint=resumed_from)
    assert trained_bits(rest.model) == trained_bits(through.model)


def test_a_run_goes_on_in_the_parameters_that_it_has_and_with_an_optimizer_that_was_given() -> None:
    def given(model: nn.Module) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model = adapted_model()
    through = trainer(model, "run", optimizers=given(model))
    through.train()
    other = fill(adapted_model())
    before = list(randlora.trainable_parameters(other))
    rest = trainer(other, "run", optimizers=given(other))
    rest.train(resume_from_checkpoint="run/checkpoint-2")
    assert all(map(lambda one, two: one is two, before, randlora.trainable_parameters(other)))
    assert trained_bits(other) == trained_bits(model)


@pytest.mark.parametrize(("steps", "after"), [(4, 5), further(8, 8)], ids=["within-an-epoch", "an-epoch"])
def test_a_finished_run_that_is_resumed_takes_the_step_that_transformers_own_takes(steps: int, after: int) -> None:
    def own(directory: str) -> Trainer:
        return Trainer(plain_model(), arguments(TrainingArguments, directory, max_steps=steps), train_dataset=rows())

    own("plain").train()
    stock = own("plain")
    stock.train(resume_from_checkpoint=True)
    trainer(adapted_model(), "run", max_steps=steps).train()
    rest = trainer(adapted_model(), "run", max_steps=steps)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == stock.state.global_step == after


def test_the_best_adapter_is_given_back_and_old_checkpoints_are_deleted() -> None:
    model = adapted_model()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(model, "run", eval_dataset=rows(), **options)
    run.train()
    best = Path(run.state.best_model_checkpoint)  # greater is better, so not the last
    assert files("run") == {best.name, "checkpoint-4"}
    first, last = plain_model(), plain_model()
    randlora.load(first, best, trainable=True)
    randlora.load(last, "run/checkpoint-4", trainable=True)
    assert trained_bits(model) == trained_bits(first) != trained_bits(last)


def test_deepspeed_gives_the_best_back_from_its_own_files(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(adapted_model(), "run")
    loaded: list[str] = []
    monkeypatch.setattr(transformers.trainer, "deepspeed_load_checkpoint", lambda _, path, **__: loaded.append(path))
    run.is_deepspeed_enabled, run.state.best_model_checkpoint = True, "run/checkpoint-1"
    run._load_best_model()
    assert loaded == ["run/checkpoint-1"]


def test_the_adapter_that_is_trained_is_saved_beside_one_that_is_not() -> None:
    model = fill(adapted_model())
    randlora.inject(model, r=4, name="task")
    randlora.activate(model, "default")
    randlora.set_trainable(model, "default", trainable=False)
    randlora.activate(model, "task")
    randlora.set_trainable(model, "task")
    randlora.activate(model, ["default", "task"])
    trainer(model, "run").train()
    other = plain_model()
    randlora.load(other, "run/checkpoint-4", trainable=True)
    assert trained_bits(other) == trained_bits(model)


def test_several_adapters_that_are_trained_are_saved_each_in_a_directory() -> None:
    def two() -> nn.Module:
        model: nn.Module = adapted_model()
        randlora.inject(model, r=4, name="task", trainable=True, targets=["up_proj"])
        randlora.activate(model, ["default", "task"])
        randlora.set_trainable(model, ["default", "task"])
        return model

    through = trainer(two(), "run")
    through.train()
    assert files("run/checkpoint-2/task") == files("run/checkpoint-2/default") == ADAPTER_FILES
    rest = trainer(two(), "run")
    rest.train(resume_from_checkpoint="run/checkpoint-2")
    assert trained_bits(rest.model) == trained_bits(through.model)


def several(*names: str) -> nn.Module:
    model: nn.Module = plain_model()
    for name in names:
        randlora.inject(model, r=4, name=name, trainable=True)
    randlora.activate(model, [*names])
    randlora.set_trainable(model, [*names])
    return model


def _damage() -> None:
    path = Path("run/checkpoint-2/b/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (("a", "b"), lambda: None, "it has c, which the model lacks"),
        (("a", "b", "c"), _damage, "b/adapter_model.safetensors is truncated"),
        (("a", "b", "d"), lambda: shutil.rmtree("run/checkpoint-2/c"), r"cannot load 'run/checkpoint-2/d'"),
        (("a",), lambda: None, "there are some inside it: a, b, c"),
    ],
    ids=["fewer", "damaged", "another", "one"],
)
def test_of_several_adapters_all_are_restored_or_none(names: tuple[str, ...], change: Any, message: str) -> None:
    trainer(several("a", "b", "c"), "run", max_steps=2).train()
    change()
    model = several(*names)
    for name in names:
        fill(model, name)
    before = trained_bits(model)
    with pytest.raises(CheckpointError, match=message):
        trainer(model, "run").train(resume_from_checkpoint="run/checkpoint-2")
    assert trained_bits(model) == before


@pytest.mark.parametrize("block", [randlora.merged, randlora.disabled])
def test_training_that_would_not_change_the_adapter_is_refused(block: Any) -> None:
    run = trainer(adapted_model(train_also=["norm"]), "run")
    with (
        block(run.model),
        pytest.raises(AdapterError, match=r"are (merged|disabled), so training"),
    ):
        run.train()


def test_training_an_adapter_that_is_not_active_is_refused() -> None:
    model: nn.Module = plain_model()
    randlora.inject(model, r=4, name="base")
    randlora.inject(model, r=4, name="other", trainable=True)
    randlora.activate(model, "base")
    randlora.set_trainable(model, "base", trainable=False)
    with pytest.raises(AdapterError, match=r"other is not active and .* call randlora\.activate"):
        trainer(model, "run").train()


def test_save_model_saves_the_tokenizer_and_the_arguments_too() -> None:
    trainer(adapted_model(), "run", processing_class=tokenizer()).save_model("saved")
    assert files("saved") == ADAPTER_FILES | {"tokenizer.json", "tokenizer_config.json", "training_args.bin"}


@pytest.mark.parametrize("damage", [further("no-state"), "half-a-state", "no-adapter"])
def test_true_passes_over_a_checkpoint_that_was_not_written_to_its_end(damage: str) -> None:
    through = trainer(adapted_model(), "run")
    through.train()
    last = Path("run/checkpoint-4")
    if damage == "no-adapter":
        (last / "adapter_model.safetensors").unlink()
    else:
        (last / "trainer_state.json").write_text("" if damage == "no-state" else '{"epoch": 1')
    rest = trainer(adapted_model(), "run")
    rest.train(resume_from_checkpoint=True)
    assert trained_bits(rest.model) == trained_bits(through.model)
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 4


def test_true_without_a_checkpoint_is_an_error() -> None:
    with pytest.raises(ValueError, match="no complete checkpoint in 'run'"):
        trainer(adapted_model(), "run").train(resume_from_checkpoint=True)


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"r": 4}, "has r=4 and alpha=80, but in the files r=8 and alpha=160"),
    "alpha": ({"alpha": 1}, "has r=8 and alpha=1, but in the files r=8 and alpha=160"),
    "seed": ({"seed": 1}, r"the bases are .*, and in the files"),
    "targets": ({"targets": ["up_proj"]}, "the files have no layer model.layers.0.mlp.up_proj"),
    "train_also": ({"train_also": ["norm"]}, "the files have no trained parameter model.norm.weight"),
}


@pytest.mark.parametrize("case", [case if case in ("r", "targets") else further(case) for case in DIFFERENCES])
def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(case: str) -> None:
    options, message = DIFFERENCES[case]
    trainer(adapted_model(), "run", max_steps=2).train()
    other = trainer(fill(adapted_model(**options)), "run")
    before = trained_bits(other.model)
    with pytest.raises(CheckpointError, match=message):
        other.train(resume_from_checkpoint=True)
    assert trained_bits(other.model) == before


def test_what_checkpoints_would_not_have_is_refused() -> None:
    with pytest.raises(AdapterError, match="no trainable adapter"):
        trainer(plain_model(), "run")
    model = adapted_model()
    model.lm_head.weight.requires_grad = True
    with pytest.raises(AdapterError, match=r"lm_head.weight requires grad .* train_also="):
        trainer(model, "run")


class Own(Trainer):  # type: ignore[misc]
    """A user's trainer."""


@pytest.mark.parametrize(
    ("bases", "right"),
    [
        ((Trainer, AdapterCheckpoints), "AdapterCheckpoints, Trainer"),
        ((Own, AdapterCheckpoints), "AdapterCheckpoints, Own"),
        ((Own, AdapterTrainer), "AdapterTrainer, Own"),
    ],
)
def test_the_mixin_after_a_trainer_is_refused_when_the_class_is_made(bases: tuple[type, ...], right: str) -> None:
    with pytest.raises(AdapterError, match=rf"put the mixin first, class Wrong\({right}\)"):
        type("Wrong", bases, {})
    first, *rest = reversed(bases)
    type("Right", (type("Own", (first, *rest), {}),), {})


def test_seq2seq_trainers_and_a_model_made_by_a_function() -> None:
    class Seq2Seq(AdapterCheckpoints, Seq2SeqTrainer):  # type: ignore[misc]
        pass

    def without_options() -> Any:
        return adapted_model()

    def make(directory: str) -> Any:
        options = arguments(Seq2SeqTrainingArguments, directory)
        return Seq2Seq(args=options, model_init=without_options, train_dataset=rows())

    through, rest = make("run"), make("run")
    through.train()
    rest.train(resume_from_checkpoint="run/checkpoint-2")
    assert files("run/checkpoint-2") >= ADAPTER_FILES
    assert trained_bits(rest.model) == trained_bits(through.model)


def test_a_push_has_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        point_client_at(hub.url, monkeypatch)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # a client that an earlier test may have made
        options = {"push_to_hub": True, "hub_model_id": "me/adapter", "hub_token": "hf_none", "max_steps": 2}
        run = trainer(adapted_model(), "run", **options)
        run.train()
        run.push_to_hub()
        with pytest.warns(UserWarning, match="wrote adapter 'default'"):
            run.model.push_to_hub("me/by-method", token="hf_none")
        assert set(hub.repositories["me/by-method"].files()) >= ADAPTER_FILES
        found = set(hub.repositories["me/adapter"].files())
        assert found >= ADAPTER_FILES
        assert not [name for name in found if name.startswith(("model", "pytorch_model"))]


# What is overridden and is not public


def test_the_private_methods_that_are_overridden_are_those_that_are_named() -> None:
    written = vars(AdapterCheckpoints) | vars(LoadsAdapters)
    own = {name for name in written if name in dir(Trainer) and not name.startswith("__")}
    assert {name for name in own if name.startswith("_")} == set(PRIVATE)
    assert own - set(PRIVATE) == {"save_model", "train", "args", "model", "state"} & own


def test_the_signatures_of_what_is_overridden_are_as_they_were() -> None:
    def names(method: Any) -> list[str]:
        return list(inspect.signature(method).parameters)[1:]

    assert names(Trainer._load_from_checkpoint) == ["resume_from_checkpoint", "model"]
    assert names(Trainer._load_best_model) == []
    assert names(Trainer._save_optimizer_and_scheduler) == ["output_dir"]
    assert names(Trainer.save_model) == ["output_dir", "_internal_call"]
    assert names(Trainer.train)[0] == "resume_from_checkpoint"


CALLS = {
    "save_model": {"_save_checkpoint", "push_to_hub", "_tune_save_checkpoint"},
    "_load_from_checkpoint": {"train", "_prepare_for_training"},
    "_load_best_model": {"_finalize_training"},
    "_save_optimizer_and_scheduler": {"_save_checkpoint"},
    "_save": {"save_model"},  # so that overriding save_model is enough
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_overridden_is_called_where_it_was(name: str) -> None:
    (kind,) = ast.parse(textwrap.dedent(inspect.getsource(Trainer))).body
    assert isinstance(kind, ast.ClassDef)
    callers = {
        method.name
        for method in kind.body
        if isinstance(method, ast.FunctionDef)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr == name
    }
    assert callers == CALLS[name]

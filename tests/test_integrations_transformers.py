"""`AdapterTrainer`: checkpoints of the adapter only, and runs that go on as if they had not been stopped."""

import ast
import inspect
import json
import shutil
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import randlora
from randlora.errors import AdapterError, CheckpointError
from randlora.integrations.transformers import PRIVATE, AdapterCheckpoints, AdapterTrainer, LoadsAdapters
from tests.hub_server import point_client_at, running_hub
from tests.kit import fill, untouched
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


def given() -> Any:
    """Make a trainer that is given an optimizer and a schedule."""
    model = fill(adapted_model(basis="block"))
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=0.1, momentum=0.9)
    return trainer(model, "run", optimizers=(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))


class Seq2Seq(AdapterCheckpoints, Seq2SeqTrainer):  # type: ignore[misc]
    """transformers' trainer for encoders with decoders."""


def with_model_init() -> Any:
    args = arguments(Seq2SeqTrainingArguments, "run")
    return Seq2Seq(args=args, model_init=lambda: adapted_model(), train_dataset=rows())  # noqa: PLW0108


def several(*names: str) -> Any:
    model: nn.Module = plain_model()
    for name in names:
        randlora.inject(model, r=4, name=name, trainable=True)
        fill(model, name)
    randlora.activate(model, [*names])
    randlora.set_trainable(model, [*names])
    return model


TRAINERS: dict[str, Callable[[], Any]] = {
    "usual": lambda: trainer(adapted_model(train_also=["norm"], dropout=0.2), "run"),
    "given": given,
    "made by a function": with_model_init,
    "of several adapters": lambda: trainer(several("a", "b", "c"), "run"),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_goes_on_in_the_same_parameters_and_ends_with_the_same_bits(kind: str) -> None:
    through, rest, checkpoint = TRAINERS[kind](), TRAINERS[kind](), Path("run/checkpoint-2")
    through.train()
    assert files(checkpoint) >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for part in [checkpoint / name for name in "abc"] if "several" in kind else [checkpoint]:
        assert files(part) >= ADAPTER_FILES
    assert not [name for name in files(checkpoint) if name.startswith(("model", "pytorch_model"))]
    shutil.rmtree("run/checkpoint-4")
    if kind == "usual":  # another start, of which nothing may be left
        fill(rest.model, seed=3)
    before = [*map(id, randlora.trainable_parameters(rest.model))]
    rest.train(resume_from_checkpoint=True if kind == "given" else str(checkpoint))
    assert kind == "made by a function" or before == [*map(id, randlora.trainable_parameters(rest.model))]
    assert trained_bits(rest.model) == trained_bits(through.model)


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
    run, load = trainer(adapted_model(), "run"), Mock()
    monkeypatch.setattr(transformers.trainer, "deepspeed_load_checkpoint", load)
    run.is_deepspeed_enabled, run.state.best_model_checkpoint = True, "run/checkpoint-1"
    run._load_best_model()
    assert load.call_args.args[1] == "run/checkpoint-1"


def test_several_adapters_are_restored_all_or_none() -> None:
    trainer(several("a", "b", "c"), "run").train()
    checkpoint = Path("run/checkpoint-2")

    def refused(names: str, message: str) -> None:
        model = several(*names)
        with untouched(model), pytest.raises(CheckpointError, match=message):
            trainer(model, "run").train(resume_from_checkpoint=str(checkpoint))

    refused("ab", "it has c, which the model lacks")
    refused("a", "there are some inside it: a, b, c")
    (checkpoint / "c").rename("c")
    refused("abd", r"cannot load 'run/checkpoint-2/d'")
    Path("c").rename(checkpoint / "c")
    tensors = checkpoint / "b" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:50])
    refused("abc", "b/adapter_model.safetensors is truncated")


def inactive() -> Any:
    model = several("base", "other")
    randlora.activate(model, "base")
    randlora.set_trainable(model, "base", trainable=False)
    randlora.set_trainable(model, "other")
    return model


def with_a_head_that_is_trained() -> Any:
    model = adapted_model()
    model.lm_head.weight.requires_grad = True
    return model


def test_training_that_checkpoints_would_not_have_is_refused() -> None:
    refused: list[tuple[Any, Any, str]] = [
        (adapted_model, randlora.merged, "are merged, so training"),
        (adapted_model, randlora.disabled, "are disabled, so training"),
        (inactive, nullcontext, r"other is not active and .* call randlora\.activate"),
        (plain_model, nullcontext, "no trainable adapter"),
        (with_a_head_that_is_trained, nullcontext, r"lm_head.weight requires grad .* train_also="),
    ]
    for build, block, message in refused:
        model = build()
        with block(model), pytest.raises(AdapterError, match=message):
            trainer(model, "run").train()


@pytest.mark.parametrize("damage", ["half-a-state", "no-adapter"])
def test_true_passes_over_a_checkpoint_that_was_not_written_to_its_end(damage: str) -> None:
    through, rest, last = trainer(adapted_model(), "run"), trainer(adapted_model(), "run"), Path("run/checkpoint-4")
    with pytest.raises(ValueError, match="no complete checkpoint in 'run'"):
        rest.train(resume_from_checkpoint=True)
    through.train()
    if damage == "no-adapter":
        (last / "adapter_model.safetensors").unlink()
    else:
        (last / "trainer_state.json").write_text('{"epoch": 1')
    rest.train(resume_from_checkpoint=True)
    assert trained_bits(rest.model) == trained_bits(through.model)
    assert json.loads((last / "trainer_state.json").read_text())["global_step"] == 4


def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing() -> None:
    """The table of differences is that of tests/test_swap.py."""
    trainer(adapted_model(), "run", max_steps=2).train()
    lacks = "the files have no trained parameter model.norm.weight"
    for options, message in (
        ({"r": 4}, "has r=4 and alpha=80, but in the files r=8"),
        ({"train_also": ["norm"]}, lacks),
    ):
        model = fill(adapted_model(**options))
        with untouched(model), pytest.raises(CheckpointError, match=message):
            trainer(model, "run").train(resume_from_checkpoint=True)


class Own(Trainer):  # type: ignore[misc]
    """A user's trainer."""


@pytest.mark.parametrize(("first", "mixin"), [(Trainer, AdapterCheckpoints), (Own, AdapterTrainer)])
def test_the_mixin_after_a_trainer_is_refused_when_the_class_is_made(first: type, mixin: type) -> None:
    with pytest.raises(AdapterError, match=f"put the mixin first, .*{mixin.__name__}, {first.__name__}"):
        type("Wrong", (first, mixin), {})
    type("Right", (type("Own", (mixin, first), {}),), {})


def test_a_push_has_the_adapter_and_save_model_the_tokenizer_and_the_arguments_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        point_client_at(hub.url, monkeypatch)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # a client that an earlier test may have made
        options = {"push_to_hub": True, "hub_model_id": "me/adapter", "hub_token": "hf_none", "max_steps": 2}
        run = trainer(adapted_model(), "run", processing_class=tokenizer(), **options)
        run.train()
        run.save_model("saved")
        assert files("saved") == ADAPTER_FILES | {"tokenizer.json", "tokenizer_config.json", "training_args.bin"}
        run.push_to_hub()
        with pytest.warns(UserWarning, match="wrote adapter 'default'"):
            run.model.push_to_hub("me/by-method", token="hf_none")
        assert set(hub.repositories["me/by-method"].files()) >= ADAPTER_FILES
        found = set(hub.repositories["me/adapter"].files())
        assert found >= ADAPTER_FILES
        assert not [name for name in found if name.startswith(("model", "pytorch_model"))]


CALLS = {
    "save_model": {"_save_checkpoint", "push_to_hub", "_tune_save_checkpoint"},
    "_load_from_checkpoint": {"train", "_prepare_for_training"},
    "_load_best_model": {"_finalize_training"},
    "_save_optimizer_and_scheduler": {"_save_checkpoint"},
    "_save": {"save_model"},  # so that overriding save_model is enough
}


def test_what_is_overridden_and_not_public_is_named_and_called_as_and_where_it_was() -> None:
    written = vars(AdapterCheckpoints) | vars(LoadsAdapters)
    own = {name for name in written if name in dir(Trainer) and not name.startswith("__")}
    assert {name for name in own if name.startswith("_")} == set(PRIVATE)
    assert own - set(PRIVATE) == {"save_model", "train", "args", "model", "state"} & own

    def parameters(method: Any) -> list[str]:
        return list(inspect.signature(method).parameters)[1:]

    assert parameters(Trainer._load_from_checkpoint) == ["resume_from_checkpoint", "model"]
    assert parameters(Trainer._load_best_model) == []
    assert parameters(Trainer._save_optimizer_and_scheduler) == ["output_dir"]
    assert parameters(Trainer.save_model) == ["output_dir", "_internal_call"]
    assert parameters(Trainer.train)[0] == "resume_from_checkpoint"
    (kind,) = ast.parse(textwrap.dedent(inspect.getsource(Trainer))).body
    assert isinstance(kind, ast.ClassDef)
    callers: dict[str, set[str]] = {name: set() for name in CALLS}
    for method in kind.body:
        for node in ast.walk(method):
            if isinstance(method, ast.FunctionDef) and isinstance(node, ast.Attribute) and node.attr in CALLS:
                callers[node.attr].add(method.name)
    assert callers == CALLS

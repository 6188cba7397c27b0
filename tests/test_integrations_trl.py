"""`AdapterCheckpoints` with TRL's and sentence-transformers' trainers, and quantized models."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import randlora
from randlora.errors import AdapterError
from randlora.integrations.transformers import AdapterCheckpoints
from tests.kit import bits, fill, same_bits
from tests.trainers import (
    ADAPTER_FILES,
    QUIET,
    adapted_model,
    arguments,
    files,
    plain_model,
    preferences,
    rows,
    texts,
    tokenizer,
    trained_bits,
)

pytestmark = [*QUIET, pytest.mark.medium]


class SFT(AdapterCheckpoints, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer for texts."""


class DPO(AdapterCheckpoints, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer for preferences."""


def sft(model: nn.Module, **options: Any) -> Any:
    return SFT(model, arguments(SFTConfig, "run", **options), train_dataset=texts(), processing_class=tokenizer())


def dpo(model: nn.Module, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("ref_model",) if name in options}
    given = arguments(DPOConfig, "run", **options)
    return DPO(model, args=given, train_dataset=preferences(), processing_class=tokenizer(), **own)


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reference_of(trainer: Any, model: Any = None) -> list[torch.Tensor]:
    batch = next(iter(trainer.get_train_dataloader()))
    return list(trainer.compute_ref_log_probs(trainer.ref_model if model is None else model, batch))


def test_dpo_trains_as_with_a_copy_of_the_base_which_is_its_reference_to_the_last_bit() -> None:
    beside = ["norm", "lm_head"]
    shared = dpo(adapted_model(train_also=beside))
    copied = dpo(adapted_model(train_also=beside), ref_model=plain_model())
    assert list(shared.ref_model.parameters()) == []
    shared.train()
    copied.train()
    assert trained_bits(shared.model) == trained_bits(copied.model)
    assert [*map(bits, reference_of(shared))] == [*map(bits, reference_of(copied))]
    assert not same_bits(reference_of(shared, shared.model)[0], reference_of(copied)[0])


def test_references_that_are_computed_before_training_are_those_of_the_base() -> None:
    with pytest.warns(UserWarning, match=r"the model without default, which was trained before: .*merge"):
        trainer = dpo(fill(adapted_model()), precompute_ref_log_probs=True)
    plain = dpo(adapted_model(), precompute_ref_log_probs=True)
    assert trainer.train_dataset["ref_chosen_logps"] == plain.train_dataset["ref_chosen_logps"]
    assert trainer._precompute_model_hash == plain._precompute_model_hash


def test_an_adapter_that_moves_gamma_first_was_not_trained_before() -> None:
    model = plain_model()
    randlora.inject(model, r=4, init="gamma")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the reference is the model without")
        dpo(model)


def test_an_adapter_that_is_not_trained_is_part_of_the_reference() -> None:
    model: Any = fill(adapted_model())
    randlora.activate(model, "default")
    randlora.set_trainable(model, "default", trainable=False)
    randlora.inject(model, r=4, name="dpo", trainable=True)
    randlora.activate(model, ["default", "dpo"])
    trainer = dpo(model)
    trainer.train()
    expected = dpo(fill(adapted_model()), ref_model=plain_model())
    assert [*map(bits, reference_of(trainer))] == [*map(bits, reference_of(expected, expected.model))]
    assert [info.name for info in randlora.adapters(model) if info.is_active] == ["default", "dpo"]
    other = plain_model()
    randlora.load(other, "run/checkpoint-4", trainable=True)  # the one that was trained is saved
    assert trained_bits(other) == trained_bits(model)


def test_what_a_reference_in_the_same_model_cannot_do_and_configs_of_peft_are_refused() -> None:
    with pytest.raises(AdapterError, match="sync_ref_model=True"):
        dpo(adapted_model(), sync_ref_model=True)
    for kind in (SFT, DPO):
        with pytest.raises(AdapterError, match=r"peft_config= .* leave it out"):
            kind(adapted_model(), peft_config=LoraConfig(target_modules=["q_proj"]))


def stock(model: nn.Module) -> Any:
    given = arguments(SFTConfig, "run", save_strategy="no")
    return SFTTrainer(model, given, train_dataset=texts(), processing_class=tokenizer())


@pytest.mark.parametrize("make", [dpo, stock])  # which read the weight of the head instead of calling it
def test_an_adapter_of_the_head_is_trained_and_acts_as_if_it_were_merged(make: Any) -> None:
    model = adapted_model(targets=["lm_head"])
    before = trained_bits(model)
    trainer = make(model)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model, dict(batch)).backward()
    assert all(value.grad is not None for value in randlora.trainable_parameters(model))
    trainer.train()
    assert trained_bits(model) != before
    if make is dpo:  # whose reference is the model without adapters, which a merged one is not
        return
    fill(model).eval()
    losses = []
    for context in (nullcontext(), randlora.merged(model), randlora.disabled(model)):
        with context, torch.no_grad():
            losses.append(trainer.compute_loss(model, dict(batch)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) != pytest.approx(losses[2], rel=1e-2)


def test_dropout_cannot_reach_a_head_that_is_read() -> None:
    trainer = sft(adapted_model(targets=["lm_head"], dropout=0.1))
    with pytest.raises(AdapterError, match=r"dropout cannot act \(TRL's trainers do this"):
        trainer.train()


class Sentences(AdapterCheckpoints, sentence_transformers.SentenceTransformerTrainer):  # type: ignore[misc]
    """sentence-transformers' trainer."""


def encoder() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        BertModel(BertConfig(vocab_size=130, **sizes)).save_pretrained("bert")
        tokenizer().save_pretrained("bert")
        parts = [Transformer("bert"), Pooling(32), Dense(32, 8)]
    return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")


def test_a_sentence_transformer_goes_on_with_the_same_bits() -> None:
    data = Dataset.from_dict({"a": [f"{i}" for i in range(16)], "b": ["x"] * 16, "score": [i / 16 for i in range(16)]})

    def trainer() -> Any:
        model = encoder()
        model[2].requires_grad_(False)
        randlora.inject(model, r=4, targets=["query", "value"])
        given = arguments(sentence_transformers.SentenceTransformerTrainingArguments, "run")
        return Sentences(model=model, args=given, train_dataset=data, loss=CosineSimilarityLoss(model))

    through = trainer()
    through.train()
    assert files("run/checkpoint-2") >= ADAPTER_FILES
    assert not [name for name in files("run/checkpoint-2") if name.startswith(("model", "modules"))]
    rest = trainer()
    rest.train(resume_from_checkpoint="run/checkpoint-2")
    assert trained_bits(rest.model) == trained_bits(through.model)


def whole(model: Any) -> Any:
    return model


def inside(model: Any) -> Any:
    return model[0].auto_model


@pytest.mark.parametrize(("part", "method"), [(whole, "save_pretrained"), (inside, "save")])
def test_a_sentence_transformer_saves_the_adapter_and_as_it_was_merged(part: Any, method: str) -> None:
    model = encoder()
    randlora.inject(part(model), r=4, targets=["query", "value"], save_pretrained="adapter")
    fill(part(model))
    getattr(model, method)("saved")
    assert files("saved") >= ADAPTER_FILES
    other = encoder()
    randlora.load(part(other), "saved")
    assert same_bits(other.encode("7", convert_to_tensor=True), model.encode("7", convert_to_tensor=True))
    with randlora.merged(part(model)):
        expected = model.encode("7", convert_to_tensor=True)
        model.save("merged")
    again = sentence_transformers.SentenceTransformer("merged", device="cpu")
    assert same_bits(again.encode("7", convert_to_tensor=True), expected)


def test_a_stock_trainer_saves_the_adapter_and_says_that_it_cannot_resume() -> None:
    model = adapted_model()
    with pytest.warns(UserWarning, match=r"neither resume .* put AdapterCheckpoints first") as told:
        Trainer(model, arguments(TrainingArguments, "run"), train_dataset=rows()).train()
    assert len({str(each.message) for each in told if "wrote" in str(each.message)}) == 1
    assert files("run/checkpoint-4") >= ADAPTER_FILES
    other = plain_model()
    randlora.load(other, "run/checkpoint-4", trainable=True)
    assert trained_bits(other) == trained_bits(model)

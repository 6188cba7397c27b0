"""`AdapterCheckpoints` with TRL's and sentence-transformers' trainers, and an engine in the place of vLLM."""

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration

import randlora
from randlora.errors import AdapterError
from randlora.integrations.transformers import AdapterCheckpoints
from tests.kit import Bits, all_bits, bits, fill, same_bits
from tests.trainers import (
    ADAPTER_FILES,
    QUIET,
    adapted_model,
    arguments,
    files,
    plain_model,
    preferences,
    rows,
    tokenizer,
    trained_bits,
)

pytestmark = [*QUIET, pytest.mark.medium]


class SFT(AdapterCheckpoints, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer for texts."""


class DPO(AdapterCheckpoints, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer for preferences."""


class GRPO(AdapterCheckpoints, GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer for rewards."""


def sft(model: nn.Module, kind: Any = SFT, **options: Any) -> Any:
    texts = Dataset.from_dict({"text": [f"{i} squared is {i * i}" for i in range(16)]})
    return kind(model, arguments(SFTConfig, "run", **options), train_dataset=texts, processing_class=tokenizer())


def dpo(model: nn.Module, ref_model: nn.Module | None = None, **options: Any) -> Any:
    args = arguments(DPOConfig, "run", **options)
    return DPO(model, ref_model, args=args, train_dataset=preferences(), processing_class=tokenizer())


def digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter.isdigit() for letter in text) / 4 for text in completions]


def grpo(model: nn.Module, kind: Any = GRPO, **options: Any) -> Any:
    given = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4, **options}
    prompts = Dataset.from_dict({"prompt": [f"{i} squared is" for i in range(16)]})
    args = arguments(GRPOConfig, "run", **given)
    return kind(model, digits, args=args, train_dataset=prompts, processing_class=tokenizer())


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reference_of(trainer: Any, model: Any = None) -> list[Bits]:
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.compute_ref_log_probs(trainer.ref_model if model is None else model, batch)
    return [*map(bits, found)]


def test_dpo_trains_as_with_a_copy_of_the_base_which_is_its_reference_to_the_last_bit() -> None:
    beside = ["norm", "lm_head"]
    shared = dpo(adapted_model(train_also=beside))
    copied = dpo(adapted_model(train_also=beside), ref_model=plain_model())
    assert list(shared.ref_model.parameters()) == []
    shared.train()
    copied.train()
    assert trained_bits(shared.model) == trained_bits(copied.model)
    assert reference_of(shared) == reference_of(copied) != reference_of(shared, shared.model)


def test_references_that_are_computed_before_training_are_those_of_the_base() -> None:
    with pytest.warns(UserWarning, match=r"the model without default, which was trained before: .*merge"):
        trainer = dpo(fill(adapted_model()), precompute_ref_log_probs=True)
    plain = dpo(adapted_model(), precompute_ref_log_probs=True)
    assert trainer.train_dataset["ref_chosen_logps"] == plain.train_dataset["ref_chosen_logps"]
    assert trainer._precompute_model_hash == plain._precompute_model_hash
    randlora.inject(model := plain_model(), r=4, init="gamma")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the reference is the model without")
        dpo(model)  # which moves Γ first, and was not trained before


def test_an_adapter_that_is_not_trained_is_part_of_the_reference() -> None:
    model: Any = fill(adapted_model())
    randlora.activate(model, "default")
    randlora.set_trainable(model, "default", trainable=False)
    randlora.inject(model, r=4, name="dpo", trainable=True)
    randlora.activate(model, ["default", "dpo"])
    trainer = dpo(model)
    trainer.train()
    expected = dpo(fill(adapted_model()), ref_model=plain_model())
    assert reference_of(trainer) == reference_of(expected, expected.model)
    assert [info.name for info in randlora.adapters(model) if info.is_active] == ["default", "dpo"]
    other = plain_model()
    randlora.load(other, "run/checkpoint-4", trainable=True)  # the one that was trained is saved
    assert trained_bits(other) == trained_bits(model)


def test_what_a_reference_in_the_same_model_cannot_do_and_configs_of_peft_are_refused() -> None:
    for make in (dpo, lambda model, **options: grpo(model, beta=0.5, **options)):
        with pytest.raises(AdapterError, match="sync_ref_model=True"):
            make(adapted_model(), sync_ref_model=True)
    for kind in (SFT, DPO):
        with pytest.raises(AdapterError, match=r"peft_config= .* leave it out"):
            kind(adapted_model(), peft_config=LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("make", [dpo, sft])  # which read the weight of the head instead of calling it
def test_an_adapter_of_the_head_is_trained_and_acts_as_if_it_were_merged(make: Any) -> None:
    model = adapted_model(targets=["lm_head"])
    before = trained_bits(model)
    trainer = dpo(model) if make is dpo else sft(model, SFTTrainer, save_strategy="no")
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
    def trainer() -> Any:
        model = encoder()
        model[2].requires_grad_(False)
        randlora.inject(model, r=4, targets=["query", "value"])
        given = arguments(sentence_transformers.SentenceTransformerTrainingArguments, "run")
        return Sentences(model=model, args=given, train_dataset=data, loss=CosineSimilarityLoss(model))

    data = Dataset.from_dict({"a": [f"{i}" for i in range(16)], "b": ["x"] * 16, "score": [i / 16 for i in range(16)]})
    through, rest = trainer(), trainer()
    through.train()
    assert files("run/checkpoint-2") >= ADAPTER_FILES
    assert not [name for name in files("run/checkpoint-2") if name.startswith(("model", "modules"))]
    rest.train(resume_from_checkpoint="run/checkpoint-2")
    assert trained_bits(rest.model) == trained_bits(through.model)


@pytest.mark.parametrize(("is_whole", "method"), [(True, "save_pretrained"), (False, "save")])
def test_a_sentence_transformer_saves_the_adapter_and_as_it_was_merged(is_whole: bool, method: str) -> None:
    model, other = encoder(), encoder()
    part, inside = (each if is_whole else each[0].auto_model for each in (model, other))
    randlora.inject(part, r=4, targets=["query", "value"], save_pretrained="adapter")
    fill(part)
    getattr(model, method)("saved")
    assert files("saved") >= ADAPTER_FILES
    randlora.load(inside, "saved")
    assert same_bits(other.encode("7", convert_to_tensor=True), model.encode("7", convert_to_tensor=True))
    with randlora.merged(part):
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


# GRPO: transformers samples, or an engine instead of vLLM, which gets the weights


def with_norm(**options: Any) -> Any:
    model = plain_model(**options)
    randlora.inject(model, r=8, targets="all-linear", train_also=["norm"])
    return model


class Engine:
    """What vLLM is to TRL: a plain model of its own that takes weights by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.received: list[str] = []
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights: Any) -> None:
        """Take tensors one by one; a name that the model does not have is an error, as in vLLM."""
        places = dict(self.model.named_parameters())
        for name, tensor in weights:
            self.received.append(name)
            assert tensor.shape == places[name].shape
            places[name].data.copy_(tensor)

    def reset_prefix_cache(self) -> None: ...
    def update_named_params(self, metadata: list[tuple[str, str, list[int]]], weights: Any) -> None:
        """Take tensors as the client of a server does, which is told all names, dtypes and shapes before."""
        held = list(weights)
        assert metadata == [(name, str(value.dtype).removeprefix("torch."), [*value.shape]) for name, value in held]
        self.load_weights(held)


def test_the_reference_is_the_plain_base_and_no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("a second model")
    )
    run = grpo(with_norm(), beta=0.5, max_steps=1, bf16=False)
    assert (run.beta, run.args.beta, list(run.ref_model.parameters())) == (0.5, 0.5, [])
    run.train()
    assert "kl" in run.state.log_history[0]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert same_bits(run.ref_model(ids).logits, plain_model()(ids).logits)
        assert not same_bits(run.model(ids).logits, plain_model()(ids).logits)


@pytest.mark.parametrize(("mode", "is_tied"), [("colocate", False), ("server", True)])
def test_an_engine_samples_with_the_bits_of_the_merged_model(
    mode: str, is_tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is TRL's own code, except for the engine and its answers."""
    seen: list[bool] = []

    def start(self: Any) -> None:
        self.llm = self.vllm_client = Engine(plain_model(tie_word_embeddings=is_tied))

    def generate(self: Any, prompts: list[list[int]], **_: Any) -> tuple[Any, ...]:
        merged = copy.deepcopy(self.model)
        randlora.merge(merged)
        engine = self.llm
        seen.append(all_bits(dict(engine.model.named_parameters())) == all_bits(dict(merged.named_parameters())))
        answers: list[list[int]] = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out: Tensor = engine.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_length=22)
            answers.append(out[0, len(prompt) :].tolist())
        return prompts, answers, [[[0.0] for _ in answer] for answer in answers], None

    monkeypatch.setattr(VLLMGeneration, "_init_vllm", start)
    monkeypatch.setattr(VLLMGeneration, "generate", generate)
    model = with_norm(tie_word_embeddings=is_tied)
    run = grpo(model, max_steps=2, use_vllm=True, vllm_mode=mode, vllm_importance_sampling_correction=False)
    run.train()
    assert seen == [True] * 2
    engine = run.vllm_generation.llm
    places = all_bits(dict(engine.model.named_parameters()))
    assert engine.received == [*places] * 2
    fresh = plain_model(tie_word_embeddings=is_tied)
    base = all_bits(dict(fresh.named_parameters()))
    randlora.load(fresh, "run/checkpoint-2", trainable=True)
    assert trained_bits(fresh) == trained_bits(model)
    changed = {name for name in places if places[name] != base[name]}
    assert changed == {name for name in places if "_proj" in name or name == "model.norm.weight"}


class Other(GRPO):
    """A trainer that sends weights by its own code, as those of TRL's experiments."""

    vllm_generation = property(lambda _: None, lambda *_: None)


def test_a_trainer_or_trl_that_cannot_send_merged_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda _: None)
    with pytest.raises(AdapterError, match="cannot send the merged weights to vLLM"):
        grpo(with_norm(), Other, use_vllm=True, vllm_mode="colocate")
    monkeypatch.delattr(VLLMGeneration, "_iter_named_params")
    with pytest.raises(AdapterError, match="cannot send the merged weights to vLLM"):
        grpo(with_norm(), use_vllm=True, vllm_mode="colocate")

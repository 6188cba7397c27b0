"""`AdapterCheckpoints` with TRL's GRPO: transformers samples, or an engine instead of vLLM, which gets the weights."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

import randlora
from randlora.errors import AdapterError
from randlora.integrations.transformers import AdapterCheckpoints
from tests.kit import all_bits, same_bits
from tests.trainers import ADAPTER_FILES, QUIET, arguments, files, plain_model, tokenizer, trained_bits

pytestmark = [*QUIET, pytest.mark.medium]


class GRPO(AdapterCheckpoints, GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer for rewards."""


class Engine:
    """What vLLM is to TRL: a plain model of its own that takes weights by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.received: list[str] = []
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights: Any) -> None:
        """Take tensors one by one; a name that the model does not have, or has twice, is an error, as in vLLM."""
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


def digits(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter.isdigit() for letter in text) / 4 for text in completions]


def adapted(**options: Any) -> Any:
    model = plain_model(**options)
    randlora.inject(model, r=8, targets="all-linear", train_also=["norm"])
    return model


def grpo(model: nn.Module, kind: Any = GRPO, **options: Any) -> Any:
    given = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4, **options}
    prompts = Dataset.from_dict({"prompt": [f"{i} squared is" for i in range(16)]})
    args = arguments(GRPOConfig, "run", **given)
    return kind(model, digits, args=args, train_dataset=prompts, processing_class=tokenizer())


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_trains_the_adapter_alone_and_its_checkpoints_load() -> None:
    model = adapted()
    before = all_bits(dict(model.named_parameters()))
    run = grpo(model)
    run.train()
    changed = {name for name, bits in all_bits(dict(model.named_parameters())).items() if bits != before[name]}
    trained = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    assert changed == {name for name, parameter in model.named_parameters() if id(parameter) in trained}
    assert files("run/checkpoint-4") >= ADAPTER_FILES
    fresh = plain_model()
    randlora.load(fresh, "run/checkpoint-4", trainable=True)
    assert trained_bits(fresh) == trained_bits(model)


def test_the_reference_is_the_plain_base_and_no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("a second model")
    )
    run = grpo(adapted(), beta=0.5, max_steps=1, bf16=False)
    assert (run.beta, run.args.beta, list(run.ref_model.parameters())) == (0.5, 0.5, [])
    run.train()
    assert "kl" in run.state.log_history[0]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert same_bits(run.ref_model(ids).logits, plain_model()(ids).logits)
        assert not same_bits(run.model(ids).logits, plain_model()(ids).logits)
    with pytest.raises(AdapterError, match="sync_ref_model=True"):
        grpo(adapted(), beta=0.5, sync_ref_model=True)


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
    model = adapted(tie_word_embeddings=is_tied)
    run = grpo(model, max_steps=2, use_vllm=True, vllm_mode=mode, vllm_importance_sampling_correction=False)
    run.train()
    assert seen == [True] * 2
    engine = run.vllm_generation.llm
    places = all_bits(dict(engine.model.named_parameters()))
    assert engine.received == [*places] * 2
    base = all_bits(dict(plain_model(tie_word_embeddings=is_tied).named_parameters()))
    changed = {name for name in places if places[name] != base[name]}
    assert changed == {name for name in places if "_proj" in name or name == "model.norm.weight"}


class Other(GRPO):
    """A trainer that sends weights by its own code, as those of TRL's experiments."""

    vllm_generation = property(lambda _: None, lambda *_: None)


def test_a_trainer_or_trl_that_cannot_send_merged_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda _: None)
    with pytest.raises(AdapterError, match="cannot send the merged weights to vLLM"):
        grpo(adapted(), Other, use_vllm=True, vllm_mode="colocate")
    monkeypatch.delattr(VLLMGeneration, "_iter_named_params")
    with pytest.raises(AdapterError, match="cannot send the merged weights to vLLM"):
        grpo(adapted(), use_vllm=True, vllm_mode="colocate")

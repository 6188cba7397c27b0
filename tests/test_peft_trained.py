"""What PEFT 0.21.2 trains beside an adapter: heads of every task, biases, embeddings; and what cannot be taken over."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import randlora
from tests.checkpoint_files import read_fields
from tests.checkpoint_files import refused as refused_without_trace
from tests.kit import fill
from tests.models import BERT, GPT2, LABELS, LLAMA, SIDES, VIT, VOCABULARY, RealModel, outputs, reproducible, tokens
from tests.peer import (
    THEIR_WARNINGS,
    assert_same_effect,
    in_ours,
    in_peft,
    in_peft_bit_for_bit,
    our_model,
    peft_model,
)

pytestmark = [
    *THEIR_WARNINGS,
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning"),
]


def assert_returns(theirs: peft.PeftModel, kind: RealModel, tmp_path: Path) -> nn.Module:
    """Take PEFT's model through our files and back, and hold it against itself; return ours."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = in_ours(kind, tmp_path / "theirs")
    for bases in ("seed", "stored"):
        randlora.save(ours, tmp_path / bases, bases=bases)
        back = in_peft(kind, tmp_path / bases)
        assert type(back) is type(theirs)
        assert in_peft_bit_for_bit(back) == in_peft_bit_for_bit(theirs)
    return ours


@dataclass(frozen=True)
class Task:
    """A task of PEFT's: its wrapper, a model for it, what is adapted, and what PEFT makes trainable by itself."""

    name: str
    wrapper: type[peft.PeftModel]
    model: str
    config: type
    targets: tuple[str, ...]
    trained: tuple[str, ...]

    @property
    def kind(self) -> RealModel:
        options: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, **SIDES}
        options |= {"num_labels": LABELS} if "CLS" in self.name else {}
        build = getattr(transformers, self.model)
        return RealModel(self.name, lambda: reproducible(lambda: build(self.config(**options))), tokens, self.targets)


LLAMAS, ROBERTAS, BERTS = transformers.LlamaConfig, transformers.RobertaConfig, transformers.BertConfig
QUERIES = ("query", "value")
DENSE = tuple(f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("bias", "weight"))
CLASSIFIER, OUTPUTS = (tuple(f"{name}.{part}" for part in ("bias", "weight")) for name in ("classifier", "qa_outputs"))
OF_TEXTS = peft.PeftModelForSequenceClassification
TASKS = (
    Task("CAUSAL_LM", peft.PeftModelForCausalLM, "LlamaForCausalLM", LLAMAS, ("q_proj",), ()),
    Task("SEQ_CLS", OF_TEXTS, "LlamaForSequenceClassification", LLAMAS, ("q_proj", "down_proj"), ("score.weight",)),
    # and not the dense layer of the head, which is trained as a whole
    Task("SEQ_CLS", OF_TEXTS, "RobertaForSequenceClassification", ROBERTAS, ("query", "dense"), DENSE),
    Task("TOKEN_CLS", peft.PeftModelForTokenClassification, "BertForTokenClassification", BERTS, QUERIES, CLASSIFIER),
    Task("QUESTION_ANS", peft.PeftModelForQuestionAnswering, "BertForQuestionAnswering", BERTS, QUERIES, OUTPUTS),
    Task("FEATURE_EXTRACTION", peft.PeftModelForFeatureExtraction, "BertModel", BERTS, QUERIES, ()),
)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.model)
def test_adapters_in_pefts_wrappers_for_tasks_come_and_go(task: Task, tmp_path: Path) -> None:
    kind = task.kind
    theirs = peft_model(kind, task_type=task.name)
    assert type(theirs) is task.wrapper, "PEFT wrapped it otherwise"
    ours = assert_returns(theirs, kind, tmp_path)
    assert randlora.adapters(ours)[0].train_also == task.trained
    assert read_fields(tmp_path / "seed")["task_type"] == task.name
    torch.testing.assert_close(first_output(ours, kind), first_output(theirs, kind), rtol=1e-4, atol=1e-4)


def first_output(model: nn.Module, kind: RealModel) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**kind.inputs())[0]
    return output


@pytest.mark.parametrize(
    ("kind", "bias"),
    [(LLAMA, "all"), (GPT2, "randlora_only"), (BERT, "all"), (VIT, "randlora_only")],
    ids=lambda value: getattr(value, "name", value),
)
def test_biases_that_peft_trained_come_and_go(kind: RealModel, bias: str, tmp_path: Path) -> None:
    theirs = peft_model(kind, bias=bias)
    ours = assert_returns(theirs, kind, tmp_path)
    found = randlora.adapters(ours)[0].train_also
    assert bool(found) == (kind is not LLAMA), "a Llama has no biases"
    assert all(fqn.endswith(".bias") for fqn in found)
    assert read_fields(tmp_path / "seed")["bias"] == bias
    assert_same_effect(ours, theirs, kind)


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["input_layernorm"]], ids=str)
def test_modules_that_peft_trained_come_and_go(modules: list[str], tmp_path: Path) -> None:
    theirs = peft_model(LLAMA, modules_to_save=modules)
    assert_same_effect(assert_returns(theirs, LLAMA, tmp_path), theirs, LLAMA)


GPT2_NAMES = ("transformer.wte.weight", "lm_head.weight")
"""Two places of one parameter."""

they_warn_of_ties = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def untied() -> nn.Module:
    model: Any = GPT2.build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert isinstance(model, nn.Module)
    return model


@they_warn_of_ties
@pytest.mark.parametrize(("module", "name", "other"), [("wte", *GPT2_NAMES), ("lm_head", *reversed(GPT2_NAMES))])
def test_one_place_of_a_tied_parameter_that_peft_trained_alone_is_refused_unless_untied(
    module: str, name: str, other: str, tmp_path: Path
) -> None:
    theirs = peft_model(GPT2, modules_to_save=[module])
    theirs.save_pretrained(tmp_path)
    refused_without_trace(GPT2.build(), tmp_path, f"{name} is tied to {other} here, but PEFT trained only it: untie")
    ours = untied()
    randlora.load(ours, tmp_path)
    assert_same_effect(ours, theirs, GPT2)


@they_warn_of_ties
def test_two_values_for_a_tied_parameter_are_refused_unless_untied(tmp_path: Path) -> None:
    theirs = peft_model(GPT2, modules_to_save=["wte", "lm_head"])
    with torch.no_grad():
        theirs.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").neg_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = untied()
    randlora.load(ours, tmp_path / "theirs")
    assert_same_effect(ours, theirs, GPT2)
    randlora.save(ours, tmp_path / "ours")
    for whose in ("theirs", "ours"):
        message = f"{' and '.join(GPT2_NAMES)} are one parameter in this model and two in the file: untie them first"
        refused_without_trace(GPT2.build(), tmp_path / whose, message)


def test_embeddings_that_peft_saved_in_both_places_are_one_parameter_here(tmp_path: Path) -> None:
    theirs = peft_model(GPT2)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours: Any = GPT2.build()
    report = randlora.load(ours, tmp_path / "theirs", trainable=True)
    assert report.train_also == ("transformer.wte.weight",)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert sum(parameter is ours.lm_head.weight for parameter in randlora.trainable_parameters(ours)) == 1
    assert_same_effect(ours, theirs, GPT2)


def test_save_says_where_peft_would_untie(tmp_path: Path) -> None:
    ours = our_model(GPT2, train_also=["wte"])
    report = randlora.save(ours, tmp_path, bases="stored")
    assert report.notes == (
        "PEFT would untie transformer.wte.weight and lm_head.weight and change only transformer.wte.weight",
    )
    found, expected = (outputs(model, GPT2.inputs()) for model in (in_peft(GPT2, tmp_path), ours))
    assert not torch.allclose(found, expected, atol=0.1), "PEFT no longer does so"
    assert torch.equal(outputs(in_ours(GPT2, tmp_path), GPT2.inputs()), expected)
    for model, names in ((untied(), ["wte"]), (GPT2.build(), ["ln_f"])):
        randlora.inject(model, 6, targets=GPT2.targets, train_also=names)
        assert randlora.save(fill(model), tmp_path, bases="stored").notes == ()

"""PEFT 0.21.2 and we load each other's files, with what either trains beside an adapter, and they do the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

import randlora
from randlora.config import Stream
from tests.checkpoint_files import read_fields, refused
from tests.kit import adapter_values, all_bits, fill
from tests.models import (
    BERT,
    GPT2,
    LABELS,
    LLAMA,
    SIDES,
    VIT,
    VOCABULARY,
    RealModel,
    every_transformers_model,
    outputs,
    reproducible,
    tokens,
)
from tests.peer import (
    ALPHA,
    PREFIX,
    THEIR_WARNINGS,
    R,
    assert_same_effect,
    in_ours,
    in_peft,
    in_peft_bit_for_bit,
    our_model,
    peft_config,
    peft_model,
    their_values,
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


def test_adapters_of_any_name_in_peft_load_under_any_name_here(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA)
    theirs.add_adapter("french", peft_config(LLAMA))
    theirs.set_adapter("french")
    fill(theirs)
    for name in ("default", "french"):
        for _, lam, _ in their_values(theirs, name):
            lam.mul_(1.0 if name == "default" else -0.5)
    theirs.save_pretrained(tmp_path)

    together = LLAMA.build()
    assert [report.name for report in randlora.load_all(together, tmp_path)] == ["default", "french"]
    ours = LLAMA.build()
    randlora.load(ours, tmp_path, name="english")
    randlora.load(ours, tmp_path / "french", name="français")
    for name, other in (("default", "english"), ("french", "français")):
        assert all_bits(adapter_values(together, name)) == all_bits(adapter_values(ours, other))

    theirs.set_adapter("default")
    assert_same_effect(ours, theirs, LLAMA)
    theirs.set_adapter("french")
    randlora.activate(ours, "français")
    assert_same_effect(ours, theirs, LLAMA)
    theirs.base_model.set_adapter(["default", "french"])
    randlora.activate(ours, ["english", "français"])
    assert_same_effect(ours, theirs, LLAMA)


@pytest.mark.filterwarnings("error:Unexpected keyword arguments")
@every_transformers_model
def test_fields_we_write_are_those_peft_writes_and_knows(kind: RealModel, tmp_path: Path) -> None:
    peft_model(kind, save_projection=False).save_pretrained(tmp_path / "theirs")
    randlora.save(our_model(kind), tmp_path / "ours", bases="stored")
    in_peft(kind, tmp_path / "ours")
    randlora.save(our_model(kind, stream=None), tmp_path / "ours")
    in_peft(kind, tmp_path / "ours")
    ours, theirs = (read_fields(tmp_path / who) for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert set(ours.pop("target_modules")) == set(theirs.pop("target_modules"))
    set_aside = {"auto_mapping", "base_model_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in set_aside} == {
        k: v for k, v in theirs.items() if k not in set_aside
    }


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "a regex and dropout": {"target_modules": r".*layer\.1.*(query|value)", "randlora_dropout": 0.1},
    "all linear layers and a large key": {"target_modules": "all-linear", "projection_prng_key": 2**63 + 5},
    "a head and a negative key": {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS", "projection_prng_key": -1},
    "r above every side": {"r": 64},
}


@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS)
def test_an_adapter_goes_from_peft_to_us_and_back(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft_model(BERT, **options)
    assert_same_effect(assert_returns(theirs, BERT, tmp_path), theirs, BERT)


OUR_OPTIONS: dict[str, dict[str, Any]] = {
    "layers no suffix tells apart": {"targets": r".*layers\.1\.self_attn\.(q|v)_proj", "alpha": 2.5},
    "the default alpha and targets": {"alpha": None, "targets": None, "dropout": 0.1},
    "r above every side and a head": {"r": 64, "train_also": ["lm_head"]},
}


@pytest.mark.parametrize("options", OUR_OPTIONS.values(), ids=OUR_OPTIONS)
def test_peft_loads_an_adapter_with_our_options(options: dict[str, Any], tmp_path: Path) -> None:
    ours = our_model(LLAMA, **options)
    randlora.save(ours, tmp_path)
    theirs = in_peft(LLAMA, tmp_path)
    assert {fqn for fqn, _, _ in their_values(theirs)} == set(randlora.adapters(ours)[0].targets)
    assert_same_effect(ours, theirs, LLAMA)


@pytest.mark.parametrize("stream", ["torch", "torch-2.11"])
def test_peft_loads_an_adapter_whose_bases_were_drawn_for_larger_layers_only_when_they_are_stored(
    stream: Stream, tmp_path: Path
) -> None:
    ours = our_model(LLAMA, name="large", stream=stream)
    randlora.inject(ours, R, alpha=ALPHA, targets=["v_proj"], name="small", active=True, trainable=True, stream=stream)
    fill(ours, "small")
    report = randlora.save(ours, tmp_path / "seed", name="small", bases="seed")
    assert "PEFT would draw different ones: save with bases='stored'" in "\n".join(report.notes)
    with pytest.raises(AssertionError):
        assert_same_effect(ours, in_peft(LLAMA, tmp_path / "seed"), LLAMA)
    assert randlora.save(ours, tmp_path / "stored", name="small", bases="stored").notes == ()
    assert_same_effect(ours, in_peft(LLAMA, tmp_path / "stored"), LLAMA)


def test_an_adapter_of_any_name_lies_in_a_directory_of_that_name_which_the_error_names(tmp_path: Path) -> None:
    for name in ("two words", "a/b", "randlora_A"):  # which stands in the keys of the tensors too
        theirs = peft_model(LLAMA, adapter=name)
        theirs.save_pretrained(tmp_path)
        assert_same_effect(in_ours(LLAMA, tmp_path / name), theirs, LLAMA)
    refused(LLAMA.build(), tmp_path, "there are some inside it: randlora_A, two words")


def test_layers_that_peft_adapted_without_a_model_of_its_own_load(tmp_path: Path) -> None:
    """As transformers and diffusers do with PEFT: each layer has its copy of the bases, and none is at the top."""
    theirs = inject_adapter_in_model(peft_config(LLAMA), LLAMA.build()).eval()
    fill(theirs)
    state = {f"{PREFIX}{key}": value.clone() for key, value in get_peft_model_state_dict(theirs).items()}
    assert "base_model.randlora_A" not in state
    peft_config(LLAMA).save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    found, expected = (outputs(model, LLAMA.inputs()) for model in (in_ours(LLAMA, tmp_path), theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


LAYERS: tuple[tuple[RealModel, dict[str, Any], tuple[str, ...]], ...] = (
    (LLAMA, {"layers_to_transform": [0, 1], "layers_pattern": ["layers"]}, ("model.layers.0.", "model.layers.1.")),
    (GPT2, {"layers_to_transform": [0], "layers_pattern": ["h"]}, ("transformer.h.0.",)),
    (BERT, {"layers_to_transform": [1]}, ("bert.encoder.layer.1.",)),
    (VIT, {"layers_to_transform": 1, "layers_pattern": "layers"}, ("vit.layers.1.",)),
)


@pytest.mark.parametrize(("kind", "options", "prefixes"), LAYERS, ids=[f"{kind.name}-{o}" for kind, o, _ in LAYERS])
def test_layers_that_peft_chose_by_number_come_and_go(
    kind: RealModel, options: dict[str, Any], prefixes: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = peft_model(kind, **options)
    ours = assert_returns(theirs, kind, tmp_path)
    targets = randlora.adapters(ours)[0].targets
    assert {fqn for fqn, _, _ in their_values(theirs)} == set(targets)
    assert {prefix for prefix in prefixes for fqn in targets if fqn.startswith(prefix)} == set(prefixes)
    assert all(fqn.startswith(prefixes) for fqn in targets)
    assert_same_effect(ours, theirs, kind)
    assert {name: read_fields(tmp_path / "seed")[name] for name in options} == options


def test_an_adapter_that_began_at_random_comes_and_goes(tmp_path: Path) -> None:
    """``init_weights=False``: not trained, and yet it changes the model."""
    theirs = get_peft_model(LLAMA.build(), peft_config(LLAMA, "sparse", init_weights=False)).eval()
    assert_same_effect(assert_returns(theirs, LLAMA, tmp_path), theirs, LLAMA)
    assert read_fields(tmp_path / "seed")["init_weights"] is False


def test_peft_warns_of_a_stream_that_it_would_draw_otherwise(tmp_path: Path) -> None:
    ours = our_model(LLAMA, "block", stream="portable")
    report = randlora.save(ours, tmp_path, bases="seed")
    assert report.notes == ("PEFT cannot draw stream='portable': save with bases='stored' to load there",)
    unexpected = r"Unexpected keyword arguments \['randlora_stream'\] for class RandLoraConfig"
    with pytest.warns(UserWarning, match=unexpected):
        theirs = in_peft(LLAMA, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_effect(ours, theirs, LLAMA)


# What PEFT trains beside an adapter


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
    refused(GPT2.build(), tmp_path, f"{name} is tied to {other} here, but PEFT trained only it: untie")
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
        refused(GPT2.build(), tmp_path / whose, message)


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

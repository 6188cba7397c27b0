"""PEFT 0.21.2 and we load each other's files, in any dtype, with what either trains beside an adapter: all returns."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

import randlora
from randlora.config import BasisKind, Stream
from randlora.errors import CheckpointError
from tests.checkpoint_files import Stored, basis_of, edit_tensors, read_fields, read_tensors, refused
from tests.kit import adapter_values, all_bits, fill
from tests.models import BERT, GPT2, LABELS, LLAMA, SIDES, VIT, VOCABULARY, RealModel, outputs, reproducible, tokens
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
    peft_draw,
    peft_model,
    their_values,
    told_stream,
)

pytestmark = [
    *THEIR_WARNINGS,
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def task(model: str, config: type, targets: tuple[str, ...]) -> RealModel:
    """Return a kind of model of a task, of any class of transformers'."""
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, **SIDES}
    build = getattr(transformers, model)
    return RealModel(model, lambda: reproducible(lambda: build(config(num_labels=LABELS, **options))), tokens, targets)


LLAMA_CLASSIFIER = task("LlamaForSequenceClassification", transformers.LlamaConfig, ("q_proj", "down_proj"))
# whose targets are not the dense layer of the head, which is trained as a whole
ROBERTA_CLASSIFIER = task("RobertaForSequenceClassification", transformers.RobertaConfig, ("query", "dense"))
BERT_TAGGER = task("BertForTokenClassification", transformers.BertConfig, ("query", "value"))


HEAD = r"classifier\.(bias|weight)"
FROM_PEFT: dict[str, tuple[RealModel, BasisKind, dict[str, Any], str]] = {
    "a copy of the bases a layer": (LLAMA, "dense", {"projection_prng_key": 11}, ""),
    "one copy": (GPT2, "sparse", {"projection_prng_key": 11}, ""),
    "no bases": (BERT, "very_sparse", {"save_projection": False, "modules_to_save": ["classifier"]}, HEAD),
    "no bases of ViT": (VIT, "dense", {"save_projection": False, "modules_to_save": ["classifier"]}, HEAD),
    "a regex": (BERT, "dense", {"target_modules": r".*layer\.1.*(query|value)", "randlora_dropout": 0.1}, ""),
    "a large key": (BERT, "dense", {"target_modules": "all-linear", "projection_prng_key": 2**63 + 5}, ""),
    "a negative key": (BERT, "dense", {"task_type": "SEQ_CLS", "projection_prng_key": -1}, HEAD),
    "r above every side": (BERT, "dense", {"r": 64}, ""),
    "begun at random": (LLAMA, "sparse", {"init_weights": False}, ""),
    "layers by number": (GPT2, "dense", {"layers_to_transform": [0], "layers_pattern": ["h"]}, ""),
    "a layer by number": (VIT, "dense", {"layers_to_transform": 1, "layers_pattern": "layers"}, ""),
    "CAUSAL_LM": (LLAMA, "dense", {"task_type": "CAUSAL_LM"}, ""),
    "SEQ_CLS": (LLAMA_CLASSIFIER, "dense", {"task_type": "SEQ_CLS"}, r"score\.weight"),
    "SEQ_CLS of RoBERTa": (ROBERTA_CLASSIFIER, "dense", {"task_type": "SEQ_CLS"}, r"classifier\.\w+\.(bias|weight)"),
    "TOKEN_CLS": (BERT_TAGGER, "dense", {"task_type": "TOKEN_CLS"}, HEAD),
    "biases": (BERT, "dense", {"bias": "all"}, r".*\.bias"),
    "biases of what is adapted": (VIT, "dense", {"bias": "randlora_only"}, r".*\.bias"),
    "embeddings": (LLAMA, "dense", {"modules_to_save": ["embed_tokens", "lm_head"]}, r".*\.weight"),
    "norms": (LLAMA, "dense", {"modules_to_save": ["input_layernorm"]}, r".*\.input_layernorm\.weight"),
}
"""Each with a regex of the parameters that come with it."""
KEPT = {"bias", "init_weights", "layers_pattern", "layers_to_transform", "task_type"}
"""Fields that a file has again after it was loaded and saved here."""


@pytest.mark.parametrize("name", FROM_PEFT)
def test_what_went_from_peft_to_us_and_back_is_what_it_was(name: str, tmp_path: Path) -> None:
    kind, basis, options, trained = FROM_PEFT[name]
    theirs = peft_model(kind, basis, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    if name == "one copy":  # as PEFT writes it since its pull request 3714
        copies = [key for key in read_tensors(tmp_path / "theirs")[0] if key.endswith(("_A", "_B")) and "model." in key]
        edit_tensors(tmp_path / "theirs", {}, drop=copies)
        assert copies
    ours = in_ours(kind, tmp_path / "theirs")
    assert_same_effect(ours, theirs, kind)
    (info,) = randlora.adapters(ours)
    assert {fqn for fqn, _, _ in their_values(theirs)} == set(info.targets)
    assert bool(info.train_also) == bool(trained)
    assert all(re.fullmatch(trained, fqn) for fqn in info.train_also)
    for bases in ("seed", "stored"):
        randlora.save(ours, tmp_path / bases, bases=bases)
        back = in_peft(kind, tmp_path / bases)
        assert type(back) is type(theirs)
        assert in_peft_bit_for_bit(back) == in_peft_bit_for_bit(theirs)
        assert torch.equal(outputs(back, kind.inputs()), outputs(theirs, kind.inputs()))
    fields = read_fields(tmp_path / "seed")
    assert all(fields[name] == options[name] for name in KEPT & options.keys())


FROM_US: dict[str, tuple[RealModel, BasisKind, Stream, Any, dict[str, Any]]] = {
    "llama": (LLAMA, "dense", peft_draw("dense") or "torch", "seed", {}),
    "gpt2": (GPT2, "sparse", "torch", "seed", {}),
    "bert": (BERT, "very_sparse", "torch", "stored", {"train_also": ["classifier"]}),
    "vit": (VIT, "block", "portable", "stored", {"train_also": ["classifier"]}),
    "portable": (LLAMA, "dense", "portable", "stored", {}),
    "no suffix": (LLAMA, "sparse", "torch", "seed", {"targets": r".*layers\.1\.self_attn\.(q|v)_proj", "alpha": 2.5}),
    "defaults": (LLAMA, "sparse", "torch", "seed", {"alpha": None, "targets": None, "dropout": 0.1}),
    "r above every side": (LLAMA, "sparse", "torch", "seed", {"r": 64, "train_also": ["lm_head"]}),
}


@pytest.mark.parametrize("name", FROM_US)
def test_what_went_from_us_to_peft_and_back_is_what_it_was(name: str, tmp_path: Path) -> None:
    kind, basis, stream, bases, options = FROM_US[name]
    ours = our_model(kind, basis, stream=stream, seed=5, **options)
    randlora.save(ours, tmp_path / "ours", bases=bases)
    theirs = in_peft(kind, tmp_path / "ours")
    assert_same_effect(ours, theirs, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    back = in_ours(kind, tmp_path / "theirs")
    (left,), (returned,) = randlora.adapters(ours), randlora.adapters(back)
    assert all_bits(adapter_values(back)) == all_bits(adapter_values(ours))
    assert {fqn for fqn, _, _ in their_values(theirs)} == set(left.targets)
    assert (returned.targets, set(returned.train_also)) == (left.targets, set(left.train_also))
    assert basis_of(back).digest(*basis_of(ours).extent) == basis_of(ours).digest(*basis_of(ours).extent)
    expected = outputs(ours, kind.inputs())
    if stream != "portable":
        assert returned.specs == left.specs, "the key brings the bases back"
        assert torch.equal(outputs(back, kind.inputs()), expected)
        return
    # what PEFT cannot draw is kept as it was stored, and not computed with in the same form
    torch.testing.assert_close(outputs(back, kind.inputs()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="no seed reproduces them: save with bases='stored'"):
        randlora.save(back, tmp_path / "again")
    randlora.save(back, tmp_path / "again", bases="stored")
    assert torch.equal(outputs(in_ours(kind, tmp_path / "again"), kind.inputs()), outputs(back, kind.inputs()))


@pytest.mark.filterwarnings("error:Unexpected keyword arguments")
@pytest.mark.parametrize("kind", [LLAMA, GPT2, BERT], ids=lambda kind: kind.name)
def test_fields_we_write_are_those_peft_writes_and_knows(kind: RealModel, tmp_path: Path) -> None:
    """And PEFT reads the same however it makes its layers."""
    peft_model(kind, save_projection=False).save_pretrained(tmp_path / "theirs")
    saves: dict[Stored, Stream | None] = {"stored": peft_draw("dense"), "seed": None}
    for bases, stream in saves.items():
        randlora.save(our_model(kind, stream=stream), tmp_path / "ours", bases=bases)
        loaded = in_peft(kind, tmp_path / "ours", low_cpu_mem_usage=True)
        assert in_peft_bit_for_bit(loaded) == in_peft_bit_for_bit(in_peft(kind, tmp_path / "ours", is_trainable=True))
    ours, theirs = (read_fields(tmp_path / who) for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert set(ours.pop("target_modules")) == set(theirs.pop("target_modules"))
    set_aside = {"auto_mapping", "base_model_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in set_aside} == {
        k: v for k, v in theirs.items() if k not in set_aside
    }


def test_adapters_of_any_name_in_peft_load_under_any_name_here(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA)
    theirs.add_adapter("french", peft_config(LLAMA))
    theirs.set_adapter("french")
    fill(theirs, seed=1, spread=0.2)
    theirs.save_pretrained(tmp_path)
    together, ours = LLAMA.build(), LLAMA.build()
    assert [report.name for report in randlora.load_all(together, tmp_path)] == ["default", "french"]
    randlora.load(ours, tmp_path, name="english")
    randlora.load(ours, tmp_path / "french", name="français")
    for name, other in (("default", "english"), ("french", "français")):
        assert all_bits(adapter_values(together, name)) == all_bits(adapter_values(ours, other))
        theirs.set_adapter(name)
        randlora.activate(ours, other)
        assert_same_effect(ours, theirs, LLAMA)
    theirs.base_model.set_adapter(["default", "french"])
    randlora.activate(ours, ["english", "français"])
    assert_same_effect(ours, theirs, LLAMA)
    for name in ("two words", "a/b", "randlora_A"):  # which stands in the keys of the tensors too
        named = peft_model(LLAMA, adapter=name)
        named.save_pretrained(tmp_path / "others")
        assert_same_effect(in_ours(LLAMA, tmp_path / "others" / name), named, LLAMA)
    refused(LLAMA.build(), tmp_path / "others", "there are some inside it: randlora_A, two words")


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


def test_peft_warns_of_a_stream_that_it_would_draw_otherwise(tmp_path: Path) -> None:
    ours = our_model(LLAMA, "block", stream="portable")
    report = randlora.save(ours, tmp_path, bases="seed")
    assert report.notes == ("PEFT cannot draw stream='portable': save with bases='stored' to load there",)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['randlora_stream'\] for class RandLoraConf"):
        theirs = in_peft(LLAMA, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_effect(ours, theirs, LLAMA)


def test_layers_that_peft_adapted_without_a_model_of_its_own_load(tmp_path: Path) -> None:
    """As transformers and diffusers do with PEFT: each layer has its copy of the bases, and none is at the top."""
    theirs = fill(inject_adapter_in_model(peft_config(LLAMA), LLAMA.build()).eval())
    state = {f"{PREFIX}{key}": value.clone() for key, value in get_peft_model_state_dict(theirs).items()}
    assert "base_model.randlora_A" not in state
    peft_config(LLAMA).save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    found, expected = (outputs(model, LLAMA.inputs()) for model in (in_ours(LLAMA, tmp_path), theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Parameters that a model ties

GPT2_NAMES = ("transformer.wte.weight", "lm_head.weight")
"""Two places of one parameter."""


def untied() -> nn.Module:
    model: Any = GPT2.build()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert isinstance(model, nn.Module)
    return model


TIED: dict[str, tuple[list[str], str]] = {
    "wte": (["wte"], "{0} is tied to {1} here, but PEFT trained only it: untie"),
    "lm_head": (["lm_head"], "{1} is tied to {0} here, but PEFT trained only it: untie"),
    "both": (["wte", "lm_head"], "{0} and {1} are one parameter in this model and two in the file: untie them first"),
}


@pytest.mark.parametrize(("modules", "message"), TIED.values(), ids=TIED)
def test_values_for_one_place_of_a_tied_parameter_or_two_are_refused_unless_untied(
    modules: list[str], message: str, tmp_path: Path
) -> None:
    theirs = peft_model(GPT2, modules_to_save=modules)
    if len(modules) > 1:
        theirs.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").data.neg_()
    theirs.save_pretrained(tmp_path / "theirs")
    refused(GPT2.build(), tmp_path / "theirs", message.format(*GPT2_NAMES))
    ours = untied()
    randlora.load(ours, tmp_path / "theirs")
    assert_same_effect(ours, theirs, GPT2)
    randlora.save(ours, tmp_path / "ours")
    if len(modules) > 1:
        refused(GPT2.build(), tmp_path / "ours", message.format(*GPT2_NAMES))


def test_a_tied_parameter_is_one_here_and_save_says_where_peft_would_untie_it(tmp_path: Path) -> None:
    theirs = peft_model(GPT2)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours: Any = GPT2.build()
    report = randlora.load(ours, tmp_path / "theirs", trainable=True)
    assert report.train_also == ("transformer.wte.weight",)
    assert sum(parameter is ours.lm_head.weight for parameter in randlora.trainable_parameters(ours)) == 1
    assert_same_effect(ours, theirs, GPT2)
    ours = our_model(GPT2, train_also=["wte"])
    assert randlora.save(ours, tmp_path, bases="stored").notes == (
        "PEFT would untie transformer.wte.weight and lm_head.weight and change only transformer.wte.weight",
    )
    found, expected = (outputs(model, GPT2.inputs()) for model in (in_peft(GPT2, tmp_path), ours))
    assert not torch.allclose(found, expected, atol=0.1), "PEFT no longer does so"
    assert torch.equal(outputs(in_ours(GPT2, tmp_path), GPT2.inputs()), expected)
    for model, names in ((untied(), ["wte"]), (GPT2.build(), ["ln_f"])):
        randlora.inject(model, 6, targets=GPT2.targets, train_also=names)
        assert randlora.save(fill(model), tmp_path, bases="stored").notes == ()


# Files of adapters and models in half precision

SCALES_ROUNDED = 2**-7
"""How far two scales rounded to bfloat16, of 8 bits each, can take a product at most."""

IN_DTYPES: tuple[tuple[torch.dtype, bool, BasisKind], ...] = (
    (torch.float32, True, "sparse"),
    (torch.bfloat16, True, "dense"),
    (torch.bfloat16, False, "very_sparse"),
    (torch.float16, False, "dense"),
    (torch.float16, True, "sparse"),
)
"""Of the base, whether the adapter is float32 all the same, and the bases."""


def loaded(kind: RealModel, directory: Path, dtype: torch.dtype) -> nn.Module:
    model = kind.build().to(dtype)
    randlora.load(model, directory, stream=told_stream(directory))
    return model


def assert_same_deltas(ours: nn.Module, theirs: nn.Module, kind: RealModel, tolerance: float = 1e-5) -> None:
    """Compare what the adapter adds to each weight, where no rounding to the base's dtype hides a difference."""
    for fqn in randlora.adapters(ours)[0].targets:
        layer: Any = theirs.get_submodule(PREFIX + fqn)
        delta: Tensor = layer.get_delta_weight("default")
        expected = delta.T if kind is GPT2 else delta  # PEFT gives the layout that Conv1D stores
        assert (randlora.delta_weight(ours, fqn) - expected).norm() <= tolerance * expected.norm(), fqn


@pytest.mark.parametrize(("dtype", "autocast", "basis"), IN_DTYPES, ids=str)
def test_files_add_what_they_added_in_peft_but_for_the_scale_that_peft_rounds(
    dtype: torch.dtype, autocast: bool, basis: BasisKind, tmp_path: Path
) -> None:
    """PEFT casts its bases to the dtype of the base model: dense ones are exact in it, the scale of ternary ones not.

    A file without bases does not say which dtype that was. In one that has them, rounded ones are kept as they are.
    """
    kind = GPT2 if autocast else LLAMA
    theirs = peft_model(kind, basis, dtype=dtype, autocast=autocast)
    theirs.save_pretrained(tmp_path / "theirs")
    dtypes = {tensor.dtype for tensor in read_tensors(tmp_path / "theirs")[0].values()}
    assert dtypes == {torch.float32 if autocast else dtype}, "else this test is of something else"
    ours = loaded(kind, tmp_path / "theirs", dtype)
    assert_same_deltas(ours, theirs, kind)
    randlora.save(ours, tmp_path / "ours", bases="stored")
    back = in_peft(kind, tmp_path / "ours", dtype=dtype, autocast_adapter_dtype=autocast)
    assert_same_deltas(ours, back, kind)
    assert in_peft_bit_for_bit(back) == in_peft_bit_for_bit(theirs)
    other = loaded(kind, tmp_path / "theirs", torch.float16 if dtype == torch.float32 else torch.float32)
    assert_same_deltas(other, theirs, kind)
    is_rounded = basis != "dense" and dtype != torch.float32
    held, stored = basis_of(ours), read_tensors(tmp_path / "theirs")[0]["base_model.randlora_B"].float()
    assert (held.stored is not None) == is_rounded
    assert not is_rounded or torch.equal(held.slices(*held.extent, device="cpu", dtype=torch.float32).B, stored)

    theirs = peft_model(kind, basis, dtype=dtype, autocast=autocast, save_projection=False)
    theirs.save_pretrained(tmp_path / "bare")
    assert_same_deltas(loaded(kind, tmp_path / "bare", dtype), theirs, kind, SCALES_ROUNDED if is_rounded else 1e-5)

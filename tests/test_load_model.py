"""`load_model`: a base model and its adapter in one call, with the class and the labels that were trained."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

import randlora
from randlora.checkpoint.header import ModelClass
from randlora.errors import CheckpointError, ConfigError
from randlora.files import load_model
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE, reseal
from tests.hostile_files import Bomb
from tests.kit import adapt, adapter_values, all_bits, same_bits
from tests.model_directories import adapter_of, assert_same_tensors, edit_json, edit_model, save_model, stored, write
from tests.models import BERT, GPT2, LLAMA, SIDES, VIT, VOCABULARY, RealModel, outputs, vit
from tests.peer import THEIR_WARNINGS
from tests.trainers import plain_model

pytestmark = THEIR_WARNINGS

ADAPTER, BASE, CONFIG, MERGED = Path("adapter"), Path("base"), Path("base/config.json"), Path("merged")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved() -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(save_model(LLAMA, BASE))
    randlora.save(adapt(model, r=4), ADAPTER)
    return model.eval()


def logits(model: nn.Module, kind: RealModel = LLAMA) -> Tensor:
    return outputs(model, kind.inputs())


def test_base_and_adapter_are_loaded_as_they_are_or_as_is_said(saved: nn.Module) -> None:
    for device_map in (None, {"": "cpu"}, "auto"):
        model = load_model("adapter", device_map=device_map)
        assert type(model).__name__.endswith("LlamaForCausalLM")
        assert same_bits(logits(model), logits(saved))
    (adapter,) = randlora.adapters(model)
    assert (adapter.name, adapter.is_active, adapter.is_trainable) == ("default", True, False)
    with pytest.raises(CheckpointError, match=r"holds no values yet \(meta\)"):
        load_model("adapter", device_map="meta", use_kernels=False)  # kernels of transformers 5.25 want a real device
    Path("elsewhere").mkdir()
    base = BASE.rename("elsewhere/base")
    model = load_model("adapter", base=base, name="other", trainable=True, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert all_bits(adapter_values(model, "other")) == all_bits(adapter_values(saved))
    assert randlora.adapters(model)[0].is_trainable


def of_nothing(file: str = "more", **fields: object) -> None:
    """Edit the config of the base, or add a file, beside an adapter of version 0.2, which names no class."""
    reseal(ADAPTER, model_class=None)
    edit_json(CONFIG, **fields)
    (BASE / file).write_text("{}", encoding="utf-8")


def name_base(name: str) -> None:
    edit_json(ADAPTER / CONFIG_FILE, base_model_name_or_path=name)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "gone": (lambda: BASE.rename("gone"), "cannot load the base model 'base', which the adapter names"),
    "unnamed": (lambda: name_base(""), "names no base model"),
    "no directory": (lambda: name_base("/no/where"), "cannot load the base model '/no/where', which the adapter names"),
    "no repository": (lambda: name_base("no/where"), "base model 'no/where"),
    "unheard class": (lambda: of_nothing(architectures=["Unheard"]), "has no class 'Unheard'"),
    "no class": (lambda: of_nothing(architectures=["pipeline"]), "has no class 'pipeline'"),
    "sizes": (lambda: edit_json(CONFIG, hidden_size=16), "base model 'base'"),
    "damaged": (lambda: (ADAPTER / TENSORS_FILE).write_bytes(b"x" * 64), TENSORS_FILE),
    "missing": (lambda: edit_model(BASE, {UP: None}), rf"its files have no {UP}.*values would be random: give base="),
    "shape": (lambda: edit_model(BASE, {UP: torch.ones(3)}), rf"a different shape of {UP}"),
    "another model": (lambda: save_model(GPT2, BASE), "cannot load .*adapter"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_loaded_is_said(change: Callable[[], object], message: str, saved: nn.Module) -> None:
    change()
    with pytest.raises(CheckpointError, match=message):
        load_model("adapter", ignore_mismatched_sizes=True)


def test_values_that_files_need_not_have_are_no_reason_to_refuse() -> None:
    model = plain_model(tie_word_embeddings=True).eval()
    assert "lm_head.weight" not in stored(write(model, BASE))
    edit_model(BASE, {"unused": torch.ones(2)})
    randlora.load(model, adapter_of(model, ADAPTER))
    assert same_bits(logits(load_model("adapter", base="base")), logits(model))


def test_no_code_of_a_base_is_run_and_nothing_unpickled(saved: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"trust_remote_code": True, "use_safetensors": False, "config": None}
    for option, value in options.items():
        with pytest.raises(ConfigError, match="create such a model yourself"):
            load_model("adapter", **{option: value})
    (BASE / "modeling.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    kernels = dict.fromkeys(("attn_implementation", "_attn_implementation", "experts_implementation"), "some/kernel")
    edit_json(CONFIG, auto_map={"AutoModelForCausalLM": "modeling.Any"}, **kernels)
    model: Any = load_model("adapter")
    assert same_bits(logits(model), logits(saved))
    assert "some/kernel" not in (model.config._attn_implementation, model.config._experts_implementation)
    tensors = stored(BASE)
    (BASE / "model.safetensors").unlink()
    for pickled in (tensors, Bomb()):
        torch.save(pickled, "base/pytorch_model.bin")
        with pytest.raises(CheckpointError, match="base model 'base'"):
            load_model("adapter")
    assert not Path("ran").exists()
    assert not Path("exploded").exists()
    torch.load("base/pytorch_model.bin", weights_only=False)
    assert Path("exploded").exists(), "it is hostile"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'transformers>=5\.0'"):
        load_model("adapter")


LABELS = {0: "bad", 1: "good", 2: "neither"}
HEAD = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
SEQUENCES, IMAGES = AutoModelForSequenceClassification, AutoModelForImageClassification


def bert(model_class: Callable[[transformers.BertConfig], nn.Module]) -> nn.Module:
    return model_class(transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SIDES))


def trained(base: nn.Module, auto: Any, train_also: list[str]) -> Any:
    write(base, BASE, is_sharded=True)
    torch.manual_seed(1)
    model = auto.from_pretrained("base", ignore_mismatched_sizes=True, problem_type="regression", **HEAD)
    randlora.save(adapt(model, r=4, train_also=train_also), ADAPTER)
    return model.eval()


BASES: dict[str, tuple[Callable[[], nn.Module], Any, RealModel, list[str]]] = {
    "bare": (lambda: bert(transformers.BertModel), SEQUENCES, BERT, ["classifier"]),
    "masked": (lambda: bert(transformers.BertForMaskedLM), SEQUENCES, BERT, ["classifier", "pooler"]),
    "other-labels": (lambda: vit(num_labels=5), IMAGES, VIT, ["classifier"]),
}


@pytest.mark.parametrize(("build", "auto", "kind", "train_also"), BASES.values(), ids=BASES)
def test_a_new_head_is_loaded(
    build: Callable[[], nn.Module], auto: Any, kind: RealModel, train_also: list[str]
) -> None:
    model = trained(build(), auto, train_also)
    assert same_bits(logits(load_model("adapter"), kind), logits(model, kind))
    with pytest.raises(CheckpointError, match=r"a head or labels that the model lacks: load .*files\.load_model"):
        randlora.files.merge(ADAPTER, MERGED, base=BASE)
    assert not MERGED.exists()
    randlora.files.save_merged(load_model("adapter"), MERGED)
    randlora.merge(model)
    assert_same_tensors(MERGED, write(model, Path("expected")))
    merged, told = auto.from_pretrained(MERGED, output_loading_info=True)
    assert not any(told.values())
    assert type(merged) is type(model)
    assert same_bits(logits(merged, kind), logits(model, kind))
    assert (merged.config.id2label, merged.config.problem_type) == (LABELS, "regression")
    assert randlora.files.verify(ADAPTER, base=MERGED).passed
    assert randlora.files.verify(ADAPTER).passed
    failed = [check.name for check in randlora.files.verify(ADAPTER, base=BASE).checks if check.outcome == "failed"]
    assert failed == ["base"]


@pytest.mark.parametrize("prefix", ["body", "body."])
def test_a_new_head_that_was_trained_in_a_wrapper_is_loaded_without_the_prefix(prefix: str) -> None:
    write(bert(transformers.BertModel), BASE)
    model = SEQUENCES.from_pretrained(BASE, num_labels=3)
    randlora.save(adapt(nn.ModuleDict({"body": model}), r=4, train_also=["classifier"]), ADAPTER)
    loaded = load_model(ADAPTER, base=BASE, model_class=SEQUENCES, num_labels=3, prefix=prefix)
    assert same_bits(logits(loaded, BERT), logits(model.eval(), BERT))


def test_a_file_of_version_0_2_which_names_no_class_is_loaded_as_the_class_that_is_given() -> None:
    model = trained(bert(transformers.BertModel), SEQUENCES, ["classifier"])
    reseal(ADAPTER, model_class=None)
    with pytest.raises(CheckpointError, match="the prefix 'bert': give prefix=\"bert\", or make the model as it"):
        load_model("adapter")
    for given in (transformers.BertForSequenceClassification, SEQUENCES):
        loaded = load_model("adapter", model_class=given, num_labels=3)
        assert same_bits(logits(loaded, BERT), logits(model, BERT))
    other: Any = torch.nn.Linear
    with pytest.raises(CheckpointError, match=r"model_class=Linear fits .*no attribute 'from_pretrained'"):
        load_model("adapter", model_class=other)
    with pytest.raises(CheckpointError, match=r"and that model_class=LlamaModel fits its config\.json, or give base="):
        load_model("adapter", model_class=transformers.LlamaModel)
    (BASE / "modules.json").write_text("[]")  # as sentence-transformers writes
    known = ModelClass("transformers", "BertForSequenceClassification", tuple(LABELS.values()), "regression")
    reseal(ADAPTER, model_class=known)
    assert same_bits(logits(load_model("adapter"), BERT), logits(model, BERT))


def test_a_class_in_a_file_that_transformers_does_not_export_or_that_does_not_fit_is_not_made() -> None:
    trained(bert(transformers.BertForMaskedLM), SEQUENCES, ["classifier"])
    lacking = r"bert\.pooler\.dense\.weight|a head or labels that the model lacks"
    for name in ("pipeline", "__path__", "os.system", "GPT2Model", None):
        for call in (lambda: load_model("adapter"), lambda: randlora.files.merge(ADAPTER, MERGED, base=BASE)):
            with pytest.raises(CheckpointError, match=lacking):
                call()
        lacking = r"no parameter classifier\.weight|a head or labels that the model lacks"
        reseal(ADAPTER, model_class=ModelClass("transformers", name or ""))
    assert not MERGED.exists()

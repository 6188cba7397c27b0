"""`load_model`: a base model and its adapter in one call, with the class and the labels that were trained."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaModel,
    ViTConfig,
    ViTForImageClassification,
)

import randlora
from randlora.checkpoint.header import ModelClass
from randlora.errors import CheckpointError, ConfigError
from tests import models
from tests.checkpoint_files import reseal
from tests.kit import adapter_values, all_bits, fill, same_bits
from tests.model_directories import assert_same_tensors
from tests.models import BERT, SIDES, VIT, VOCABULARY, RealModel
from tests.peer import THEIR_WARNINGS, as_peft_draws
from tests.trainers import plain_model

pytestmark = THEIR_WARNINGS

IDS = torch.tensor([[1, 2, 3, 4]])


class Hostile:
    """What makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A Llama in ``base``, an adapter of it in ``adapter``, and the model of both."""
    monkeypatch.chdir(tmp_path)
    plain: Any = models.llama()
    plain.save_pretrained("base")
    model: nn.Module = AutoModelForCausalLM.from_pretrained("base")
    randlora.inject(model, r=4)
    randlora.save(fill(model), "adapter")
    return model


def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


def edit(path: str, **fields: object) -> None:
    file = Path(path)
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def edit_nameless(path: str, **fields: object) -> None:
    """Edit a file of the base, or make one, beside an adapter of version 0.2, which names no class."""
    reseal(Path("adapter"), model_class=None)
    if not Path(path).exists():
        Path(path).write_text("{}", encoding="utf-8")
    edit(path, **fields)


def test_base_and_adapter_are_loaded_as_they_are_or_as_is_said(saved: nn.Module) -> None:
    for device_map in (None, {"": "cpu"}, "auto"):
        model = randlora.files.load_model("adapter", device_map=device_map)
        assert type(model).__name__.endswith("LlamaForCausalLM")
        assert torch.equal(logits(model), logits(saved))
    (adapter,) = randlora.adapters(model)
    assert (adapter.name, adapter.is_active, adapter.is_trainable) == ("default", True, False)
    with pytest.raises(CheckpointError, match=r"holds no values yet \(meta\)"):
        randlora.files.load_model("adapter", device_map="meta")
    Path("elsewhere").mkdir()
    base = Path("base").rename("elsewhere/base")
    model = randlora.files.load_model("adapter", base=base, name="other", trainable=True, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert all_bits(adapter_values(model, "other")) == all_bits(adapter_values(saved))
    assert randlora.adapters(model)[0].is_trainable


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file("base/model.safetensors")
    change(tensors)
    save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})


def name_base(name: str | None) -> None:
    edit("adapter/adapter_config.json", base_model_name_or_path=name)


def other_base() -> None:
    other: Any = models.gpt2()
    shutil.rmtree("base")
    other.save_pretrained("base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("base").rename("gone"), "cannot load the base model 'base', which the adapter names"),
        (lambda: name_base(None), "names no base model"),
        (lambda: name_base(""), "names no base model"),
        (lambda: name_base("/no/where"), "is not there: give base="),
        (lambda: name_base("no/where"), "base model 'no/where"),
        (lambda: edit_nameless("base/config.json", architectures=["Unheard"]), "has no class 'Unheard'"),
        (lambda: edit_nameless("base/config.json", architectures=["pipeline"]), "has no class 'pipeline'"),
        (lambda: edit_nameless("base/model_index.json"), "a model of diffusers: create it with"),
        (lambda: edit("base/config.json", hidden_size=16), "base model 'base'"),
        (lambda: Path("adapter/adapter_model.safetensors").write_bytes(b"x" * 64), "adapter_model.safetensors"),
        (
            lambda: change_tensors(lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight")),
            r"its files have no model\.layers\.0\.mlp\.up_proj\.weight.*values would be random: give base=",
        ),
        (
            lambda: change_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})),
            r"a different shape of model\.norm\.weight",
        ),
        (other_base, "cannot load .*adapter"),
    ],
)
def test_what_cannot_be_loaded_is_said(change: Callable[[], object], message: str, saved: nn.Module) -> None:
    change()
    with pytest.raises(CheckpointError, match=message):
        randlora.files.load_model("adapter", ignore_mismatched_sizes=True)


@pytest.mark.parametrize("tied", [False, True])
def test_values_that_files_need_not_have_are_no_reason_to_refuse(tied: bool, saved: nn.Module) -> None:
    """Tied weights are written once, and a base may have values that the model does not use."""
    base: Any = plain_model(tie_word_embeddings=tied)
    base.save_pretrained("other")
    tensors = load_file("other/model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    save_file({**tensors, "unused": torch.ones(2)}, "other/model.safetensors", metadata={"format": "pt"})
    randlora.inject(base, r=4)
    randlora.save(fill(base), "other-adapter")
    assert torch.equal(logits(randlora.files.load_model("other-adapter", base="other")), logits(base))


def test_no_code_of_a_base_model_is_run_and_nothing_unpickled(
    saved: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: tuple[dict[str, Any], ...] = {"trust_remote_code": True}, {"use_safetensors": False}, {"config": None}
    for option in options:
        with pytest.raises(ConfigError, match="create such a model yourself"):
            randlora.files.load_model("adapter", **option)
    Path("base/modeling.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    edit("base/config.json", auto_map={"AutoModelForCausalLM": "modeling.Any"}, _attn_implementation="some/kernel")
    assert torch.equal(logits(randlora.files.load_model("adapter")), logits(saved))
    tensors = load_file("base/model.safetensors")
    Path("base/model.safetensors").unlink()
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("ran").exists(), "it is hostile"
    Path("ran").unlink()
    for pickled in (tensors, Hostile()):
        torch.save(pickled, "base/pytorch_model.bin")
        with pytest.raises(CheckpointError, match="base model 'base'"):
            randlora.files.load_model("adapter")
    assert not Path("ran").exists()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'transformers>=5\.0'"):
        randlora.files.load_model("adapter")


@as_peft_draws
@pytest.mark.parametrize("bases", ["seed", "stored"])
def test_transformers_and_peft_read_the_directory(bases: Any, saved: nn.Module) -> None:
    randlora.save(saved, "adapter", bases=bases)
    by_method = AutoModelForCausalLM.from_pretrained("base")
    by_method.load_adapter("adapter")
    by_peft = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    for model in (AutoModelForCausalLM.from_pretrained("adapter"), by_method, by_peft):
        torch.testing.assert_close(logits(model), logits(saved))


LABELS = {0: "bad", 1: "good", 2: "neither"}
HEAD = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
CONFIG = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SIDES)
FIVE = ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIDES)
BARE: Callable[[], Any] = lambda: BertModel(CONFIG)  # noqa: E731


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(make: Callable[[], Any], auto: Any, train_also: list[str], **options: Any) -> Any:
    """Save a base, put another head on it, adapt and save that, and return it."""
    make().save_pretrained("base", **options)
    torch.manual_seed(1)
    model = auto.from_pretrained("base", ignore_mismatched_sizes=True, problem_type="regression", **HEAD)
    randlora.inject(model, r=4, train_also=train_also)
    randlora.save(fill(model), "adapter")
    return model.eval()


def logits_of(model: Any, kind: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**kind.inputs()).logits
    return found


@pytest.mark.parametrize(
    ("make", "auto", "kind", "train_also"),
    [
        (BARE, AutoModelForSequenceClassification, BERT, ["classifier"]),
        (lambda: BertForMaskedLM(CONFIG), AutoModelForSequenceClassification, BERT, ["classifier", "pooler"]),
        (lambda: ViTForImageClassification(FIVE), AutoModelForImageClassification, VIT, ["classifier"]),
    ],
    ids=["bare", "masked", "other-labels"],
)
def test_a_new_head_is_loaded_and_merged_with_the_class_that_was_trained(
    make: Callable[[], Any], auto: Any, kind: RealModel, train_also: list[str]
) -> None:
    model = trained(make, auto, train_also, max_shard_size="20KB")
    loaded = randlora.files.load_model("adapter")
    assert same_bits(logits_of(loaded, kind), logits_of(model, kind))
    report = randlora.files.merge("adapter", "merged", base="base")
    assert len(report.added or report.replaced) == 2 * len(train_also)
    randlora.merge(model)
    model.save_pretrained("expected")
    merged, told = auto.from_pretrained("merged", output_loading_info=True)
    assert not any(told.values())
    assert type(merged) is type(auto.from_pretrained("expected"))
    assert same_bits(logits_of(merged, kind), logits_of(model, kind))
    assert (merged.config.id2label, merged.config.problem_type) == (LABELS, "regression")
    assert_same_tensors(Path("merged"), Path("expected"))
    assert randlora.files.verify("adapter", base="base").passed


def test_a_file_of_version_0_2_which_names_no_class_is_loaded_as_the_class_that_is_given() -> None:
    model = trained(BARE, AutoModelForSequenceClassification, ["classifier"])
    reseal(Path("adapter"), model_class=None)
    with pytest.raises(
        CheckpointError, match=r"no parameter classifier\.weight.*, which was trained with the adapter$"
    ):
        randlora.files.load_model("adapter")
    for given in (BertForSequenceClassification, AutoModelForSequenceClassification):
        loaded = randlora.files.load_model("adapter", model_class=given, num_labels=3)
        assert same_bits(logits_of(loaded, BERT), logits_of(model, BERT))
    others: list[Any] = [dict, torch.nn.Linear]
    for other in others:
        with pytest.raises(ConfigError, match="must be a class of transformers"):
            randlora.files.load_model("adapter", model_class=other)
    with pytest.raises(CheckpointError, match=r"and that model_class=LlamaModel fits its config\.json, or give base="):
        randlora.files.load_model("adapter", model_class=LlamaModel)
    Path("base/modules.json").write_text("[]")  # as sentence-transformers writes
    with pytest.raises(CheckpointError, match="a model of sentence-transformers: create it with"):
        randlora.files.load_model("adapter")
    known = ModelClass("transformers", "BertForSequenceClassification", tuple(LABELS.values()), "regression")
    reseal(Path("adapter"), model_class=known)
    assert same_bits(logits_of(randlora.files.load_model("adapter"), BERT), logits_of(model, BERT))


BOTH: tuple[Callable[[], object], ...] = (
    lambda: randlora.files.load_model("adapter"),
    lambda: randlora.files.merge("adapter", "merged", base="base"),
)


def test_a_class_in_a_file_that_transformers_does_not_export_or_that_does_not_fit_is_not_made() -> None:
    trained(BARE, AutoModelForSequenceClassification, ["classifier"])
    for name in ("pipeline", "__path__", "os.system", "GPT2Model"):
        reseal(Path("adapter"), model_class=ModelClass("transformers", name))
        for call in BOTH:
            with pytest.raises(CheckpointError, match=r"no parameter classifier\.weight"):
                call()


def test_what_was_random_when_the_head_was_trained_and_is_in_no_file_is_refused() -> None:
    trained(lambda: BertForMaskedLM(CONFIG), AutoModelForSequenceClassification, ["classifier"])
    for call in BOTH:
        with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.weight"):
            call()
    assert not Path("merged").exists()

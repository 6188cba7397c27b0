"""A new head on an encoder: `load_model` and `files.merge` make the class that was trained, with its labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
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
from tests.checkpoint_files import reseal
from tests.further import further
from tests.kit import fill, same_bits
from tests.model_directories import assert_same_tensors
from tests.models import BERT, SIDES, VIT, VOCABULARY

LABELS = {0: "bad", 1: "good", 2: "neither"}
HEAD = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
CONFIG = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **SIDES)
FIVE = ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIDES)
BARE: Callable[[], Any] = lambda: BertModel(CONFIG)  # noqa: E731

CASES: dict[str, tuple[Callable[[], Any], Any, Any, list[str]]] = {
    "bare": (BARE, AutoModelForSequenceClassification, BERT, ["classifier"]),
    "masked": (lambda: BertForMaskedLM(CONFIG), AutoModelForSequenceClassification, BERT, ["classifier", "pooler"]),
    "without-pooler": (BARE, AutoModelForTokenClassification, BERT, ["classifier"]),
    "other-labels": (lambda: ViTForImageClassification(FIVE), AutoModelForImageClassification, VIT, ["classifier"]),
    "renamed-labels": (VIT.build, AutoModelForImageClassification, VIT, ["classifier"]),
}


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


def logits(model: Any, kind: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**kind.inputs()).logits
    return found


@pytest.mark.parametrize("is_sharded", [False, further(True)])
@pytest.mark.parametrize("case", ["bare", "masked", *map(further, [*CASES][2:])])
def test_a_new_head_is_loaded_and_merged_with_the_class_that_was_trained(case: str, is_sharded: bool) -> None:
    make, auto, kind, train_also = CASES[case]
    model = trained(make, auto, train_also, **({"max_shard_size": "20KB"} if is_sharded else {}))
    loaded = randlora.files.load_model("adapter")
    assert same_bits(logits(loaded, kind), logits(model, kind))
    report = randlora.files.merge("adapter", "merged", base="base")
    assert len(report.added or report.replaced) == 2 * len(train_also)
    randlora.merge(model)
    model.save_pretrained("expected")
    merged, told = auto.from_pretrained("merged", output_loading_info=True)
    assert not any(told.values())
    assert type(merged) is type(auto.from_pretrained("expected"))
    assert same_bits(logits(merged, kind), logits(model, kind))
    assert (merged.config.id2label, merged.config.problem_type) == (LABELS, "regression")
    assert_same_tensors(Path("merged"), Path("expected"))
    assert randlora.files.verify("adapter", base="base").passed


def bert(train_also: tuple[str, ...] = ("classifier",)) -> Any:
    return trained(BARE, AutoModelForSequenceClassification, [*train_also])


def test_a_file_of_version_0_2_which_names_no_class_is_loaded_as_the_class_that_is_given() -> None:
    model = bert()
    reseal(Path("adapter"), model_class=None)
    with pytest.raises(
        CheckpointError, match=r"no parameter classifier\.weight.*, which was trained with the adapter$"
    ):
        randlora.files.load_model("adapter")
    for given in (BertForSequenceClassification, AutoModelForSequenceClassification):
        loaded = randlora.files.load_model("adapter", model_class=given, num_labels=3)
        assert same_bits(logits(loaded, BERT), logits(model, BERT))
    others: list[Any] = [dict, torch.nn.Linear]
    for other in others:
        with pytest.raises(ConfigError, match="must be a class of transformers"):
            randlora.files.load_model("adapter", model_class=other)
    with pytest.raises(CheckpointError, match=r"and that model_class=LlamaModel fits its config\.json, or give base="):
        randlora.files.load_model("adapter", model_class=LlamaModel)


def test_a_directory_of_sentence_transformers_is_one_only_if_that_was_trained() -> None:
    model = bert()
    Path("base/modules.json").write_text("[]")
    assert same_bits(logits(randlora.files.load_model("adapter"), BERT), logits(model, BERT))
    known = ModelClass("sentence_transformers", "SentenceTransformer")
    for written in (known, None):
        reseal(Path("adapter"), model_class=written)
        with pytest.raises(CheckpointError, match="one of sentence-transformers: create it by"):
            randlora.files.load_model("adapter")


@pytest.mark.parametrize("name", ["pipeline", "Unheard", "__path__", "os.system", "GPT2Model", "LlamaForCausalLM"])
def test_a_class_in_a_file_that_transformers_does_not_export_or_that_does_not_fit_is_not_made(name: str) -> None:
    bert()
    reseal(Path("adapter"), model_class=ModelClass("transformers", name))
    for call in (
        lambda: randlora.files.load_model("adapter"),
        lambda: randlora.files.merge("adapter", "merged", base="base"),
    ):
        with pytest.raises(CheckpointError, match=r"no parameter classifier\.weight"):
            call()


def test_what_was_random_when_the_head_was_trained_and_is_in_no_file_is_refused() -> None:
    trained(lambda: BertForMaskedLM(CONFIG), AutoModelForSequenceClassification, ["classifier"])
    for call in (
        lambda: randlora.files.load_model("adapter"),
        lambda: randlora.files.merge("adapter", "merged", base="base"),
    ):
        with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.weight"):
            call()
    assert not Path("merged").exists()


def test_the_class_is_recorded_as_it_is_without_wrappers_and_with_labels_if_a_head_is_trained() -> None:
    model = bert()
    labels = tuple(LABELS.values())
    expected = ModelClass("transformers", "BertForSequenceClassification", labels, "regression")
    assert ModelClass.of(model, has_trained=True) == expected
    assert ModelClass.of(model, has_trained=False) == ModelClass("transformers", "BertForSequenceClassification")
    assert ModelClass.from_dict(json.loads(json.dumps(expected.to_dict()))) == expected
    assert ModelClass.of(torch.nn.Linear(2, 2), has_trained=True) is None
    assert ModelClass.of(type("Own", (BertModel,), {})(CONFIG), has_trained=True) is None

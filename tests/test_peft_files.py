"""PEFT 0.21.2 and we load each other's files, and the adapter does the same in both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora.checkpoint.peft_config import CONFIG_FILE
from randlora.checkpoint.tensors import TENSORS_FILE
from randlora.config import BasisKind, Stream
from randlora.errors import CheckpointError
from tests.kit import fill, untouched
from tests.models import (
    BERT,
    GPT2,
    LLAMA,
    RealModel,
    every_transformers_model,
    outputs,
)
from tests.peer import (
    ALPHA,
    THEIR_WARNINGS,
    R,
    assert_same_effect,
    every_peft_kind,
    in_ours,
    in_peft,
    our_model,
    peft_config,
    peft_draw,
    peft_model,
    their_values,
)

pytestmark = THEIR_WARNINGS


@pytest.mark.parametrize("save_projection", [True, False], ids=["bases in the file", "bases from the key"])
@every_peft_kind
@every_transformers_model
def test_files_of_peft_load(kind: RealModel, basis: BasisKind, save_projection: bool, tmp_path: Path) -> None:
    theirs = peft_model(kind, basis, save_projection=save_projection, projection_prng_key=11)
    theirs.save_pretrained(tmp_path)
    copies = [key for key in load_file(tmp_path / TENSORS_FILE) if key.endswith("randlora_B")]
    assert len(copies) == (1 + len(list(their_values(theirs))) if save_projection else 0)
    assert_same_effect(in_ours(kind, tmp_path), theirs, kind)


@every_transformers_model
def test_files_of_peft_that_hold_the_bases_once_load(kind: RealModel, tmp_path: Path) -> None:
    """The layout of PEFT after 0.21.2."""
    theirs = peft_model(kind)
    theirs.save_pretrained(tmp_path)
    top = {"base_model.randlora_A", "base_model.randlora_B"}
    rewrite(tmp_path, lambda key, value: value if key in top or not key.endswith(("_A", "_B")) else None)
    assert_same_effect(in_ours(kind, tmp_path), theirs, kind)


def test_bases_that_no_key_draws_are_taken_from_the_file_of_peft(tmp_path: Path) -> None:
    """As from a machine where PEFT draws in float16."""
    theirs = peft_model(LLAMA)
    with torch.no_grad():
        theirs.base_model.randlora_B["default"].mul_(1.5)
    theirs.save_pretrained(tmp_path)
    assert_same_effect(in_ours(LLAMA, tmp_path), theirs, LLAMA)


@pytest.mark.parametrize("changed", ["randlora_A", "randlora_B"])
def test_copies_of_the_bases_that_disagree_are_refused_and_change_nothing(changed: str, tmp_path: Path) -> None:
    peft_model(LLAMA).save_pretrained(tmp_path)
    damaged = f"base_model.model.model.layers.1.mlp.up_proj.{changed}"
    rewrite(tmp_path, lambda key, value: value * (1 + 1e-6) if key == damaged else value)
    model = LLAMA.build()
    with untouched(model), pytest.raises(CheckpointError, match=f"holds copies of base_model.{changed} that differ"):
        randlora.load(model, tmp_path)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_classifiers_that_peft_trained_load(task_type: str | None, tmp_path: Path) -> None:
    theirs = peft_model(BERT, modules_to_save=["classifier"], task_type=task_type)
    theirs.save_pretrained(tmp_path)
    ours = BERT.build()
    report = randlora.load(ours, tmp_path)
    assert report.train_also == ("classifier.bias", "classifier.weight")
    assert_same_effect(ours, theirs, BERT)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
@pytest.mark.parametrize("bias", ["randlora_only", "all"])
def test_biases_that_peft_trained_load(bias: str, tmp_path: Path) -> None:
    theirs = peft_model(BERT, bias=bias)
    theirs.save_pretrained(tmp_path)
    ours = BERT.build()
    report = randlora.load(ours, tmp_path)
    assert "bert.encoder.layer.0.attention.self.query.bias" in report.train_also
    assert ("bert.embeddings.LayerNorm.bias" in report.train_also) == (bias == "all")
    assert_same_effect(ours, theirs, BERT)


@every_transformers_model
def test_a_file_of_peft_loads_onto_a_bfloat16_base(kind: RealModel, tmp_path: Path) -> None:
    theirs = peft_model(kind, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = kind.build().to(torch.bfloat16)
    report = randlora.load(ours, tmp_path)
    for fqn in report.targets:
        theirs_delta = theirs.base_model.model.get_submodule(fqn).get_delta_weight("default")
        expected = theirs_delta.T if kind is GPT2 else theirs_delta
        torch.testing.assert_close(randlora.delta_weight(ours, fqn), expected, rtol=1e-4, atol=1e-5)
    # PEFT multiplies in float32 here, and we in bfloat16; each is as far as 5e-2 from a model in float32 throughout
    assert_same_effect(ours, theirs, kind, tolerance=6e-2)


def test_adapters_of_any_name_in_peft_load_under_any_name_here(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA)
    theirs.add_adapter("french", peft_config(LLAMA))
    theirs.set_adapter("french")
    fill(theirs)
    for name in ("default", "french"):
        for _, lam, _ in their_values(theirs, name):
            lam.mul_(1.0 if name == "default" else -0.5)
    theirs.save_pretrained(tmp_path)

    ours = LLAMA.build()
    randlora.load(ours, tmp_path, name="english")
    randlora.load(ours, tmp_path / "french", name="français")

    theirs.set_adapter("default")
    assert_same_effect(ours, theirs, LLAMA)
    theirs.set_adapter("french")
    randlora.activate(ours, "français")
    assert_same_effect(ours, theirs, LLAMA)
    theirs.base_model.set_adapter(["default", "french"])
    randlora.activate(ours, ["english", "français"])
    assert_same_effect(ours, theirs, LLAMA)


def test_fields_from_a_later_peft_are_kept_reported_and_written_back(tmp_path: Path) -> None:
    theirs = peft_model(LLAMA, task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "theirs")
    fields = json.loads((tmp_path / "theirs" / CONFIG_FILE).read_text())
    fields |= {"use_quantum": {"qubits": 3}, "exclude_modules": None, "peft_version": "9.0.0"}
    (tmp_path / "theirs" / CONFIG_FILE).write_text(json.dumps(fields))

    ours = LLAMA.build()
    report = randlora.load(ours, tmp_path / "theirs")
    randlora.save(ours, tmp_path / "ours")

    assert report.notes == ("fields kept but not understood: exclude_modules, use_quantum",)
    assert_same_effect(ours, theirs, LLAMA)
    written = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    made_anew = {"peft_version", "randlora_stream", "save_projection", "target_modules"}
    assert {k: v for k, v in written.items() if k not in made_anew} == {
        k: v for k, v in fields.items() if k not in made_anew
    }
    assert set(written["target_modules"]) == set(LLAMA.targets)


@every_transformers_model
def test_fields_we_write_are_those_peft_writes(kind: RealModel, tmp_path: Path) -> None:
    peft_model(kind, save_projection=False).save_pretrained(tmp_path / "theirs")
    randlora.save(our_model(kind, stream=None), tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / who / CONFIG_FILE).read_text()) for who in ("ours", "theirs"))
    set_aside = {"auto_mapping", "base_model_name_or_path", "target_modules"}
    assert ours.keys() == theirs.keys()
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    assert {k: v for k, v in ours.items() if k not in set_aside} == {
        k: v for k, v in theirs.items() if k not in set_aside
    }


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "one block of layers": {"layers_to_transform": [1]},
    "one block by pattern": {"layers_to_transform": 1, "layers_pattern": "layer"},
    "a regex": {"target_modules": r".*layer\.1.*(query|value)"},
    "all linear layers": {"target_modules": "all-linear"},
    "dropout": {"randlora_dropout": 0.1},
    "a head": {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    "random from the start": {"init_weights": False},
    "a large key": {"projection_prng_key": 2**63 + 5},
    "a negative key": {"projection_prng_key": -1},
    "r above every side": {"r": 64},
}


@pytest.mark.parametrize("bases", ["seed", "stored"])
@pytest.mark.parametrize("options", PEFT_OPTIONS.values(), ids=PEFT_OPTIONS)
def test_an_adapter_goes_from_peft_to_us_and_back(options: dict[str, Any], bases: Any, tmp_path: Path) -> None:
    theirs = peft_model(BERT, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = in_ours(BERT, tmp_path / "theirs")
    assert_same_effect(ours, theirs, BERT)
    randlora.save(ours, tmp_path / "ours", bases=bases)
    back = in_peft(BERT, tmp_path / "ours")
    assert {fqn for fqn, _, _ in their_values(back)} == {fqn for fqn, _, _ in their_values(theirs)}
    assert_same_effect(back, theirs, BERT)


@every_peft_kind
@every_transformers_model
def test_peft_loads_files_without_bases(kind: RealModel, basis: BasisKind, tmp_path: Path) -> None:
    ours = our_model(kind, basis, seed=2**40 + 1)
    report = randlora.save(ours, tmp_path, bases="seed")
    assert bool(report.notes) == (peft_draw(basis) == "torch-2.11")  # which newer versions of torch do not draw
    assert_same_effect(ours, in_peft(kind, tmp_path), kind)


STORED: dict[str, tuple[BasisKind, Stream]] = {
    "dense": ("dense", "torch"),
    "sparse": ("sparse", "torch"),
    "very_sparse": ("very_sparse", "torch"),
    "block": ("block", "portable"),
    "portable-dense": ("dense", "portable"),
    "portable-sparse": ("sparse", "portable"),
    "portable-very_sparse": ("very_sparse", "portable"),
}


@pytest.mark.parametrize(("basis", "stream"), STORED.values(), ids=STORED)
@every_transformers_model
def test_peft_loads_files_with_bases(kind: RealModel, basis: BasisKind, stream: Stream, tmp_path: Path) -> None:
    ours = our_model(kind, basis, stream=stream, seed=3)
    report = randlora.save(ours, tmp_path, bases="stored")
    assert report.notes == ()
    assert_same_effect(ours, in_peft(kind, tmp_path), kind)


@pytest.mark.parametrize("bases", ["seed", "stored"])
def test_peft_loads_a_classifier_trained_with_us(bases: Any, tmp_path: Path) -> None:
    ours = our_model(BERT, train_also=["classifier"])
    randlora.save(ours, tmp_path, bases=bases)
    theirs = in_peft(BERT, tmp_path)
    assert theirs.peft_config["default"].modules_to_save == ["classifier"]
    assert_same_effect(ours, theirs, BERT)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
def test_peft_loads_biases_trained_with_us(tmp_path: Path) -> None:
    ours = our_model(BERT, train_also=r".*\.bias")
    randlora.save(ours, tmp_path, bases="stored")
    inputs = BERT.inputs()
    expected, base = outputs(ours, inputs), outputs(BERT.build(), inputs)
    found = outputs(in_peft(BERT, tmp_path), inputs)
    assert (found - expected).abs().max() <= 2e-4 * (expected - base).abs().max()


OUR_OPTIONS: dict[str, dict[str, Any]] = {
    "layers no suffix tells apart": {"targets": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "alpha that is no integer": {"alpha": 2.5},
    "dropout": {"dropout": 0.1},
    "the default alpha and targets": {"alpha": None, "targets": None},
    "r above every side": {"r": 64},
    "a head": {"train_also": ["lm_head"]},
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
    assert "PEFT would draw others: save with bases='stored'" in "\n".join(report.notes)
    with pytest.raises(AssertionError):
        assert_same_effect(ours, in_peft(LLAMA, tmp_path / "seed"), LLAMA)
    assert randlora.save(ours, tmp_path / "stored", name="small", bases="stored").notes == ()
    assert_same_effect(ours, in_peft(LLAMA, tmp_path / "stored"), LLAMA)


def test_save_says_when_peft_wants_wider_bases_than_were_drawn(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 40), nn.Linear(40, 10), nn.Linear(10, 40))

    ours = build()
    randlora.inject(ours, 4, targets=["0"], name="first")
    randlora.inject(ours, 4, targets=["1", "2"], name="second")
    report = randlora.save(ours, tmp_path, name="second", bases="stored")
    assert "too narrow for PEFT, which cannot load this adapter" in "\n".join(report.notes)
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.randlora_A"):
        PeftModel.from_pretrained(build(), tmp_path)
    randlora.load(build(), tmp_path)


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_save_says_when_peft_cannot_draw_the_bases(basis: BasisKind, tmp_path: Path) -> None:
    report = randlora.save(our_model(LLAMA, basis, stream="portable"), tmp_path, bases="seed")
    assert report.notes == ("PEFT cannot draw stream='portable': save with bases='stored' to load there",)


def test_peft_takes_our_file_beside_an_adapter_of_its_own(tmp_path: Path) -> None:
    ours = our_model(LLAMA)
    randlora.save(ours, tmp_path)
    theirs = get_peft_model(LLAMA.build(), peft_config(LLAMA, save_projection=False)).eval()
    theirs.load_adapter(tmp_path, "ours")
    theirs.set_adapter("ours")
    assert isinstance(theirs, PeftModel)
    assert_same_effect(ours, theirs, LLAMA)


@pytest.mark.parametrize("to", ["native", "peft", "lora"])
def test_peft_loads_nothing_without_the_json_which_a_kill_may_take(to: Any, tmp_path: Path) -> None:
    randlora.save(our_model(LLAMA), tmp_path / "saved", bases="stored")
    randlora.files.convert(tmp_path / "saved", tmp_path / "out", to)
    in_peft(LLAMA, tmp_path / "out")
    (tmp_path / "out" / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=f"Can't find '{CONFIG_FILE}'"):
        in_peft(LLAMA, tmp_path / "out")


def rewrite(directory: Path, change: Any) -> None:
    """Replace every tensor of a file by ``change(key, tensor)``, and drop it for ``None``."""
    path = directory / TENSORS_FILE
    changed = {key: change(key, value) for key, value in load_file(path).items()}
    save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, path, {"format": "pt"})

"""PEFT 0.21.2 and we are the same method, and load each other's files with all that either trains: all returns."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import PeftConfig, RandLoraConfig, get_peft_model
from torch import Tensor, nn

import randlora
from randlora.bases import BasisBank
from randlora.config import BasisKind, Stream
from randlora.errors import CheckpointError, ConfigError
from tests import models, peer
from tests.checkpoint_files import CONFIG_FILE, basis_of, read_fields, read_tensors, refused
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.models import BERT, GPT2, LLAMA, VIT, RealModel, every_transformers_model, outputs
from tests.peer import THEIR_WARNINGS, assert_same_effect, in_ours, in_peft, our_model, peft_config, peft_model, untied
from tests.transformers_zoo import tiny

pytestmark = [
    *THEIR_WARNINGS,
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

Shapes = tuple[tuple[int, int], ...]  # (out, in) of each layer


@pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom is <= 0:UserWarning")
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3).map(tuple),
    r=st.integers(1, 50),
    basis=st.sampled_from(sorted(peer.PEFT_FLAGS)),
    seed=st.integers(0, 2**64 - 1),
)
@example(((768, 768),), 32, "dense", 7)
@example(((300, 7),), 2, "sparse", 7)
@example(((1000, 1000),), 15, "very_sparse", 7)
@example(((10, 40), (40, 10)), 4, "dense", 7)  # min(largest out, largest in) = 40: a rectangle no layer uses whole
@example(((1, 9),), 1, "dense", 0)  # one number has no deviation
@example(((9, 1),), 1, "sparse", 0)  # one sign has no deviation
@example(((4, 4),), 1, "very_sparse", 2)  # nothing but zeros
def test_bases_are_those_of_peft_bit_for_bit_or_refused(shapes: Shapes, r: int, basis: BasisKind, seed: int) -> None:
    base, model = (nn.Sequential(*(nn.Linear(in_, out) for out, in_ in shapes)) for _ in range(2))
    names = [str(i) for i in range(len(shapes))]
    config = peft_config(LLAMA, basis, r=r, projection_prng_key=seed, target_modules=names)
    theirs: Any = get_peft_model(base, config).base_model
    expected = [each["default"].float() for each in (theirs.randlora_A, theirs.randlora_B)]
    options: dict[str, Any] = {"targets": "all-linear", "basis": basis, "seed": seed, "stream": peer.peft_draw(basis)}
    if not all(part.isfinite().all() for part in expected):
        with untouched(model), pytest.raises(ConfigError, match="have a standard deviation of 0"):
            randlora.inject(model, r, **options)
        return
    spec = randlora.plan(model, r, **options).specs[0]
    ours = BasisBank().acquire(spec).slices(spec.max_dim, spec.min_dim, device="cpu", dtype=torch.float32)
    for own, part in zip(ours, expected, strict=True):
        if basis == "dense" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            # torch may multiply and add in two steps there, so PEFT draws a few other numbers: docs/from_peft.md
            assert (own != part).sum() <= own.numel() / 1000
            torch.testing.assert_close(own, part, rtol=0, atol=2**-7)  # a step of bfloat16 between 1 and 2
        else:
            assert torch.equal(own, part)


def assert_same_deltas(ours: nn.Module, theirs: nn.Module, kind: RealModel, tolerance: float = 1e-5) -> None:
    """Compare what the adapter adds to each weight, where no rounding to the base's dtype hides a difference."""
    for fqn in randlora.adapters(ours)[0].targets:
        layer: Any = theirs.get_submodule(peer.PREFIX + fqn)
        delta: Tensor = layer.get_delta_weight("default")
        expected = delta.T if kind is GPT2 else delta  # PEFT gives the layout that Conv1D stores
        assert (randlora.delta_weight(ours, fqn) - expected).norm() <= tolerance * expected.norm(), fqn


@pytest.mark.product
@pytest.mark.parametrize("basis", peer.PEFT_FLAGS)
@every_transformers_model
def test_outputs_and_updates_agree_with_peft_also_merged(kind: RealModel, basis: BasisKind) -> None:
    theirs, ours = peft_model(kind, basis), our_model(kind, basis)
    for fqn, lam, gamma in peer.their_values(theirs):
        ours.get_parameter(f"{fqn}.randlora_lambda.default").data.copy_(lam)
        ours.get_parameter(f"{fqn}.randlora_gamma.default").data.copy_(gamma)
    assert_same_effect(ours, theirs, kind)
    assert_same_deltas(ours, theirs, kind)
    randlora.merge(ours)
    assert_same_effect(ours, theirs, kind)


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_training_follows_peft_for_25_steps(kind: RealModel) -> None:
    theirs, ours = get_peft_model(kind.build(), peft_config(kind)), kind.build()
    randlora.inject(ours, peer.R, alpha=peer.ALPHA, targets=kind.targets, stream=peer.peft_draw("dense"))
    batch = torch.randint(0, models.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(3))
    losses = torch.zeros(2, 25)
    for of, model in zip(losses, (theirs, ours), strict=True):
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
        for step in range(25):
            optimizer.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            of[step] = loss.detach()
    assert losses[0, -1] < 0.95 * losses[0, 0], "nothing was learnt, so there is nothing to compare"
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)
    for fqn, lam, gamma in peer.their_values(theirs):
        for name, expected, start in (("lambda", lam, 0.0), ("gamma", gamma, 1 / max(gamma.shape))):
            found = ours.get_parameter(f"{fqn}.randlora_{name}.default").detach()
            assert (found - expected).norm() <= 2e-3 * (expected - start).norm(), f"{name} of {fqn}"


FOLDER = Path(__file__).parent.parent / "docs" / "examples" / "peft_method_comparison"
EXPERIMENTS = sorted((FOLDER / "experiments" / "randlora").iterdir())
EQUIVALENT = randlora.equivalent_alpha(lora_r=32, lora_alpha=64, r=32)
PEFT_LR = 1e-4


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_is_as_peft_writes_it_and_as_the_page_says(experiment: Path, tmp_path: Path) -> None:
    config: Any = PeftConfig.from_pretrained(str(experiment))
    path = experiment / "training_params.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    lr = float(given.get("optimizer_kwargs", {"lr": PEFT_LR})["lr"])
    assert type(config) is RandLoraConfig
    config.save_pretrained(str(tmp_path))
    assert (tmp_path / CONFIG_FILE).read_bytes() == (experiment / CONFIG_FILE).read_bytes()
    scaling = config.randlora_alpha / config.r
    step, growth = (scaling / (EQUIVALENT / 32) * (lr / PEFT_LR) ** power for power in (1, 2))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `randlora/{experiment.name}`"))
    said = [float(cell) for cell in row.split("|")[2:7]]
    assert said == pytest.approx([config.randlora_alpha, scaling, lr, step, growth], abs=0.006)
    assert said[2] == lr
    theirs = fill(get_peft_model(LLAMA.build(), config).eval())
    theirs.save_pretrained(tmp_path)
    assert_same_effect(in_ours(LLAMA, tmp_path), theirs, LLAMA)


# Files


def task(name: str, of: str, *targets: str) -> RealModel:
    build: Any = partial(models.reproducible, partial(tiny, of.lower(), f"{of}For{name}"))
    return RealModel(of, build, models.tokens, targets)


HEAD = r"classifier\.(bias|weight)"
FROM_PEFT: dict[str, tuple[RealModel, BasisKind, dict[str, Any], str]] = {
    "a copy of the bases a layer": (LLAMA, "dense", {"projection_prng_key": 11}, ""),
    "ternary bases": (GPT2, "sparse", {"projection_prng_key": 11}, ""),
    "no bases": (BERT, "very_sparse", {"save_projection": False, "modules_to_save": ["classifier"]}, HEAD),
    "a regex": (BERT, "dense", {"target_modules": r".*layer\.1.*(query|value)", "randlora_dropout": 0.1}, ""),
    "a large key": (BERT, "dense", {"target_modules": "all-linear", "projection_prng_key": 2**63 + 5}, ""),
    "a negative key": (BERT, "dense", {"task_type": "SEQ_CLS", "projection_prng_key": -1}, HEAD),
    "begun at random": (LLAMA, "sparse", {"init_weights": False}, ""),
    "layers by number": (VIT, "dense", {"layers_to_transform": [1], "layers_pattern": ["layers"]}, ""),
    "SEQ_CLS of RoBERTa": (  # whose targets are not the dense layer of the head, which is trained as a whole
        task("SequenceClassification", "Roberta", "query", "dense"),
        *("dense", {"task_type": "SEQ_CLS"}, r"classifier\.\w+\.(bias|weight)"),
    ),
    "TOKEN_CLS": (task("TokenClassification", "Bert", "query", "value"), "dense", {"task_type": "TOKEN_CLS"}, HEAD),
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
    ours = in_ours(kind, tmp_path / "theirs")
    assert_same_effect(ours, theirs, kind)
    (info,) = randlora.adapters(ours)
    assert {fqn for fqn, _, _ in peer.their_values(theirs)} == set(info.targets)
    assert bool(info.train_also) == bool(trained)
    assert all(re.fullmatch(trained, fqn) for fqn in info.train_also)
    for bases in ("seed", "stored"):
        randlora.save(ours, tmp_path / bases, bases=bases)
        back = in_peft(kind, tmp_path / bases)
        assert type(back) is type(theirs)
        assert peer.in_peft_bit_for_bit(back) == peer.in_peft_bit_for_bit(theirs)
        assert torch.equal(outputs(back, kind.inputs()), outputs(theirs, kind.inputs()))
    fields = read_fields(tmp_path / "seed")
    assert all(fields[name] == options[name] for name in KEPT & options.keys())


FROM_US: dict[str, tuple[RealModel, BasisKind, Stream, Any, dict[str, Any]]] = {
    "llama": (LLAMA, "dense", peer.peft_draw("dense") or "torch", "seed", {}),
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
    assert {fqn for fqn, _, _ in peer.their_values(theirs)} == set(left.targets)
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
    peft_model(kind, save_projection=False).save_pretrained(tmp_path / "theirs")
    saves: dict[Any, Stream | None] = {"stored": peer.peft_draw("dense"), "seed": None}
    for bases, stream in saves.items():
        randlora.save(our_model(kind, stream=stream), tmp_path / "ours", bases=bases)
        loaded = in_peft(kind, tmp_path / "ours", low_cpu_mem_usage=True)
        again = in_peft(kind, tmp_path / "ours", is_trainable=True)
        assert peer.in_peft_bit_for_bit(loaded) == peer.in_peft_bit_for_bit(again)
    ours, theirs = (read_fields(tmp_path / who) for who in ("ours", "theirs"))
    for fields in (ours, theirs):
        fields |= {"auto_mapping": None, "base_model_name_or_path": None}
        fields["target_modules"] = {*fields["target_modules"]}
    assert ours == theirs


AUTO: dict[str, tuple[Any, RealModel, str | None]] = {  # each with the head, without which PEFT does not load it
    "causal": (peft.AutoPeftModelForCausalLM, LLAMA, None),
    "texts": (peft.AutoPeftModelForSequenceClassification, BERT, "classifier"),
    "answers": (
        *(peft.AutoPeftModelForQuestionAnswering, task("QuestionAnswering", "Bert", "query", "value")),
        "qa_outputs",
    ),
    "words": (
        *(peft.AutoPeftModelForTokenClassification, task("TokenClassification", "Bert", "query", "value")),
        "classifier",
    ),
}


@pytest.mark.parametrize("name", AUTO)
def test_classes_of_peft_that_find_the_base_model_load_our_files(name: str, tmp_path: Path) -> None:
    auto, kind, head = AUTO[name]
    base: Any = kind.build()
    base.save_pretrained(tmp_path / "base")
    ours = type(base).from_pretrained(tmp_path / "base")
    randlora.inject(ours, peer.R, targets=kind.targets, stream=peer.peft_draw("dense"), train_also=head and [head])
    fill(ours)
    randlora.save(ours, tmp_path / "ours", bases="stored")
    inputs = kind.inputs()
    for each in (auto, peft.AutoPeftModel):
        theirs = each.from_pretrained(tmp_path / "ours").eval()
        assert type(theirs.get_base_model()) is type(base)
        torch.testing.assert_close(every_output(theirs, inputs), every_output(ours, inputs))


def test_an_adapter_beside_its_base_is_loaded_with_it_by_transformers_and_nothing_warns_of_that(tmp_path: Path) -> None:
    model: Any = LLAMA.build()
    model.save_pretrained(tmp_path)
    randlora.inject(model, peer.R, targets=LLAMA.targets, stream=peer.peft_draw("dense"))
    assert randlora.save(fill(model), tmp_path, bases="stored").notes == ()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {name.rsplit(".")[-1] for name, _ in loaded.named_parameters() if "randlora" in name} == {"default"}
    torch.testing.assert_close(every_output(loaded, LLAMA.inputs()), every_output(model, LLAMA.inputs()))


def every_output(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(**inputs).to_tuple()
    return tuple(each for each in found if isinstance(each, Tensor))


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


WIDER = "PEFT would draw different ones: save with bases='stored'"
UNKNOWN = "PEFT cannot draw stream='portable': save with bases='stored' to load there"
LARGER: list[tuple[BasisKind, Stream, str]] = [
    ("dense", "torch-2.11", WIDER),
    ("block", "portable", UNKNOWN),
]


@pytest.mark.parametrize(("basis", "stream", "note"), LARGER, ids=str)
def test_bases_that_peft_would_draw_otherwise_are_noted_and_loaded_when_they_are_stored(
    basis: BasisKind, stream: Stream, note: str, tmp_path: Path
) -> None:
    ours, small = our_model(LLAMA, basis, stream=stream), "default"
    if note is WIDER:
        options: dict[str, Any] = {"targets": ["v_proj"], "active": True, "trainable": True, "stream": stream}
        randlora.inject(ours, peer.R, alpha=peer.ALPHA, name=(small := "small"), **options)
        fill(ours, small)
    assert note in "\n".join(randlora.save(ours, tmp_path / "seed", name=small, bases="seed").notes)
    if stream == "portable":
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['randlora_stream'\] for class RandLora"):
            theirs = in_peft(LLAMA, tmp_path / "seed")
    else:
        theirs = in_peft(LLAMA, tmp_path / "seed")
    with pytest.raises(AssertionError):
        assert_same_effect(ours, theirs, LLAMA)
    assert randlora.save(ours, tmp_path / "stored", name=small, bases="stored").notes == ()
    assert_same_effect(ours, in_peft(LLAMA, tmp_path / "stored"), LLAMA)


# Parameters that a model ties

WTE, LM_HEAD = "transformer.wte.weight", "lm_head.weight"  # two places of one parameter
TIED: dict[tuple[str, ...], str] = {
    ("wte",): f"{WTE} is tied to {LM_HEAD}, but PEFT trained it alone: untie",
    ("lm_head",): f"{LM_HEAD} is tied to {WTE}, but PEFT trained it alone: untie",
    ("wte", "lm_head"): f"{WTE} and {LM_HEAD} are one parameter here and two in the file: untie",
}


def test_values_for_one_place_of_a_tied_parameter_or_two_are_refused_unless_untied(tmp_path: Path) -> None:
    for modules, message in TIED.items():
        theirs, ours = peft_model(GPT2, modules_to_save=[*modules]), untied()
        if len(modules) > 1:
            theirs.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").data.neg_()
        theirs.save_pretrained(tmp_path / "theirs")
        refused(GPT2.build(), tmp_path / "theirs", message)
        randlora.load(ours, tmp_path / "theirs")
        assert_same_effect(ours, theirs, GPT2)
        randlora.save(ours, tmp_path / "ours")
        if len(modules) > 1:
            refused(GPT2.build(), tmp_path / "ours", message)


def test_a_tied_parameter_is_one_here_and_save_says_where_peft_would_untie_it(tmp_path: Path) -> None:
    theirs = peft_model(GPT2)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours: Any = GPT2.build()
    assert randlora.load(ours, tmp_path / "theirs", trainable=True).train_also == (WTE,)
    assert sum(parameter is ours.lm_head.weight for parameter in randlora.trainable_parameters(ours)) == 1
    assert_same_effect(ours, theirs, GPT2)
    ours = our_model(GPT2, train_also=["wte"])
    note = f"PEFT would untie {WTE} and {LM_HEAD} and change only {WTE}"
    assert randlora.save(ours, tmp_path, bases="stored").notes == (note,)
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


@pytest.mark.parametrize(("dtype", "autocast", "basis"), IN_DTYPES, ids=str)
def test_files_add_what_they_added_in_peft_but_for_the_scale_that_peft_rounds(
    dtype: torch.dtype, autocast: bool, basis: BasisKind, tmp_path: Path
) -> None:
    """PEFT casts its bases to the dtype of the base model: dense ones are exact in it, the scale of ternary ones not.

    A file without bases does not say which dtype that was. In one that has them, rounded ones are kept as they are.
    """
    kind, source = GPT2 if autocast else LLAMA, tmp_path / "theirs"

    def loaded(dtype: torch.dtype) -> nn.Module:
        model = kind.build().to(dtype)
        randlora.load(model, source, stream=peer.told_stream(source))
        return model

    theirs = peft_model(kind, basis, dtype=dtype, autocast=autocast)
    theirs.save_pretrained(source)
    tensors, _ = read_tensors(source)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32 if autocast else dtype}
    ours = loaded(dtype)
    assert_same_deltas(ours, theirs, kind)
    randlora.save(ours, tmp_path / "ours", bases="stored")
    back = in_peft(kind, tmp_path / "ours", dtype=dtype, autocast_adapter_dtype=autocast)
    assert peer.in_peft_bit_for_bit(back) == peer.in_peft_bit_for_bit(theirs)
    assert_same_deltas(loaded(torch.float16 if dtype == torch.float32 else torch.float32), theirs, kind)
    is_rounded, held = basis != "dense" and dtype != torch.float32, basis_of(ours)
    assert (held.stored is not None) == is_rounded
    stored = tensors["base_model.randlora_B"].float()
    assert not is_rounded or torch.equal(held.slices(*held.extent, device="cpu", dtype=torch.float32).B, stored)

    theirs = peft_model(kind, basis, dtype=dtype, autocast=autocast, save_projection=False)
    theirs.save_pretrained(source)
    assert_same_deltas(loaded(dtype), theirs, kind, SCALES_ROUNDED if is_rounded else 1e-5)

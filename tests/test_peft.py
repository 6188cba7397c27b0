"""PEFT 0.21.2 and we are the same method: the same bases, outputs and training, and each loads the other's files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from randlora.checkpoint.layout import CONFIG_FILE, TENSORS_FILE
from randlora.config import BasisKind, Stream
from tests.models import (
    BERT,
    GPT2,
    LLAMA,
    VOCABULARY,
    RealModel,
    assert_untouched,
    every_transformers_model,
    outputs,
    snapshot,
)
from tests.peer import (
    ALPHA,
    PEFT_FLAGS,
    THEIR_WARNINGS,
    R,
    assert_same_effect,
    copy_values,
    fill,
    in_ours,
    in_peft,
    our_model,
    peft_config,
    peft_model,
    their_values,
)

pytestmark = THEIR_WARNINGS

Shapes = tuple[tuple[int, int], ...]  # (out, in) of each layer

every_peft_kind = pytest.mark.parametrize("basis", PEFT_FLAGS)

SHAPES_AND_RANKS: tuple[tuple[Shapes, int], ...] = (
    (((16, 16),), 4),
    (((33, 17),), 3),
    (((17, 33),), 16),
    (((128, 384),), 100),
    (((64, 64),), 100),
    (((5, 90),), 6),
    (((300, 7),), 2),
    (((768, 768),), 32),
    (((1536, 384),), 6),
    (((1000, 1000),), 15),
    (((32, 32), (16, 32), (48, 32), (32, 48)), 6),
    (((10, 40), (40, 10)), 4),  # min(largest out, largest in) = 40: a rectangle no layer uses whole
)


def shapes_id(value: object) -> str | None:
    return "+".join(f"{out}x{in_}" for out, in_ in value) if isinstance(value, tuple) else None


def stack(shapes: Shapes) -> nn.Module:
    return nn.Sequential(*(nn.Linear(in_, out) for out, in_ in shapes))


def their_bases(shapes: Shapes, r: int, basis: BasisKind, seed: int) -> tuple[Tensor, Tensor]:
    config = peft_config(
        LLAMA, basis, r=r, projection_prng_key=seed, target_modules=[str(i) for i in range(len(shapes))]
    )
    model = get_peft_model(stack(shapes), config)
    return model.base_model.randlora_A["default"].float(), model.base_model.randlora_B["default"].float()


def our_bases(shapes: Shapes, r: int, basis: BasisKind, seed: int) -> randlora.Bases:
    spec = randlora.plan(stack(shapes), r, targets="all-linear", basis=basis, seed=seed).spec
    held = randlora.BasisBank().acquire(spec)
    return held.slices(spec.max_dim, spec.min_dim, device="cpu", dtype=torch.float32)


@every_peft_kind
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("shapes", "r"), SHAPES_AND_RANKS, ids=shapes_id)
def test_bases_are_those_of_peft_bit_for_bit(shapes: Shapes, r: int, seed: int, basis: BasisKind) -> None:
    ours, theirs = our_bases(shapes, r, basis, seed), their_bases(shapes, r, basis, seed)
    assert torch.equal(ours.A, theirs[0])
    assert torch.equal(ours.B, theirs[1])


@pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom is <= 0:UserWarning")
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3).map(tuple),
    r=st.integers(1, 50),
    basis=st.sampled_from(sorted(PEFT_FLAGS)),
    seed=st.integers(0, 2**64 - 1),
)
def test_bases_are_those_of_peft_or_refused_where_peft_divides_by_nothing(
    shapes: Shapes, r: int, basis: BasisKind, seed: int
) -> None:
    theirs = their_bases(shapes, r, basis, seed)
    if not all(part.isfinite().all() for part in theirs):
        with pytest.raises(randlora.ConfigError, match="have no spread to be normalised by"):
            randlora.inject(stack(shapes), r, targets="all-linear", basis=basis, seed=seed)
        return
    ours = our_bases(shapes, r, basis, seed)
    assert torch.equal(ours.A, theirs[0])
    assert torch.equal(ours.B, theirs[1])


@pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom is <= 0:UserWarning")
@pytest.mark.parametrize(
    ("shape", "basis", "seed"),
    [((1, 9), "dense", 0), ((9, 1), "sparse", 0), ((4, 4), "very_sparse", 2)],
    ids=["one number has no deviation", "one sign has no deviation", "nothing but zeros"],
)
def test_bases_that_peft_draws_as_nan_are_refused(shape: tuple[int, int], basis: BasisKind, seed: int) -> None:
    assert their_bases((shape,), 1, basis, seed)[0].isnan().all()
    model = stack((shape,))
    before = snapshot(model)
    with pytest.raises(randlora.ConfigError, match="have no spread to be normalised by"):
        randlora.inject(model, 1, targets="all-linear", basis=basis, seed=seed)
    assert_untouched(model, before)


@every_peft_kind
@every_transformers_model
def test_outputs_agree_with_peft(kind: RealModel, basis: BasisKind) -> None:
    theirs = peft_model(kind, basis)
    ours = kind.build()
    randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets, basis=basis)
    copy_values(theirs, ours)
    assert_same_effect(ours, theirs, kind)


@every_transformers_model
def test_delta_weights_agree_with_peft(kind: RealModel) -> None:
    theirs = peft_model(kind)
    ours = kind.build()
    report = randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets)
    copy_values(theirs, ours)
    expected = {fqn: theirs.base_model.model.get_submodule(fqn).get_delta_weight("default") for fqn in report.targets}
    if kind is GPT2:
        expected = {fqn: delta.T for fqn, delta in expected.items()}  # PEFT gives the layout that Conv1D stores
    found = {fqn: randlora.delta_weight(ours, fqn) for fqn in report.targets}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_transformers_model
def test_merged_outputs_agree_with_peft(kind: RealModel) -> None:
    theirs = peft_model(kind)
    ours = kind.build()
    randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets)
    copy_values(theirs, ours)
    randlora.merge(ours)
    assert_same_effect(ours, theirs, kind)


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_training_follows_peft_for_25_steps(kind: RealModel) -> None:
    theirs = get_peft_model(kind.build(), peft_config(kind))
    ours = kind.build()
    randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets)

    their_losses = losses_of_training(theirs, [p for p in theirs.parameters() if p.requires_grad])
    our_losses = losses_of_training(ours, list(randlora.trainable_parameters(ours)))

    assert their_losses[-1] < 0.95 * their_losses[0], "nothing was learnt, so there is nothing to compare"
    torch.testing.assert_close(our_losses, their_losses, rtol=2e-3, atol=0)
    for fqn, lam, gamma in their_values(theirs):
        start = 1 / max(gamma.shape)
        moved = {"lambda": (lam, 0.0), "gamma": (gamma, start)}
        for name, (expected, origin) in moved.items():
            found = ours.get_parameter(f"{fqn}.randlora_{name}.default").detach()
            assert (found - expected).norm() <= 2e-3 * (expected - origin).norm(), f"{name} of {fqn}"


def losses_of_training(model: nn.Module, parameters: list[nn.Parameter], steps: int = 25) -> Tensor:
    """Let a model learn one batch by heart."""
    optimiser = torch.optim.AdamW(parameters, lr=5e-3)
    tokens = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses)


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
    before = snapshot(model)
    with pytest.raises(randlora.CheckpointError, match=f"holds copies of base_model.{changed} that differ"):
        randlora.load(model, tmp_path)
    assert_untouched(model, before)


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
    assert_same_effect(ours, theirs, kind, tolerance=5e-2)  # PEFT multiplies in float32 here, and we in bfloat16


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
    made_anew = {"peft_version", "save_projection", "target_modules"}
    assert {k: v for k, v in written.items() if k not in made_anew} == {
        k: v for k, v in fields.items() if k not in made_anew
    }
    assert set(written["target_modules"]) == set(LLAMA.targets)


@every_transformers_model
def test_fields_we_write_are_those_peft_writes(kind: RealModel, tmp_path: Path) -> None:
    peft_model(kind, save_projection=False).save_pretrained(tmp_path / "theirs")
    randlora.save(our_model(kind), tmp_path / "ours")
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
    assert report.notes == ()
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


def test_peft_loads_an_adapter_whose_bases_were_drawn_for_larger_layers_only_when_they_are_stored(
    tmp_path: Path,
) -> None:
    ours = our_model(LLAMA, name="large")
    randlora.inject(ours, R, alpha=ALPHA, targets=["v_proj"], name="small", active=True, trainable=True)
    fill(ours)
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


def rewrite(directory: Path, change: Any) -> None:
    """Replace every tensor of a file by ``change(key, tensor)``, and drop it for ``None``."""
    path = directory / TENSORS_FILE
    changed = {key: change(key, value) for key, value in load_file(path).items()}
    save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, path, {"format": "pt"})

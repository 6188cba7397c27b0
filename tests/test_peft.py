"""PEFT 0.21.2 and we are the same method: the same bases, outputs and training; experiments for its comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import PeftConfig, RandLoraConfig, get_peft_model
from torch import Tensor, nn

import randlora
from randlora.bases import BasisBank
from randlora.config import BasisKind
from randlora.errors import ConfigError
from tests.checkpoint_files import CONFIG_FILE
from tests.kit import fill, untouched
from tests.models import GPT2, LLAMA, VOCABULARY, RealModel, every_transformers_model, llama, tokens
from tests.peer import (
    ALPHA,
    PEFT_FLAGS,
    THEIR_WARNINGS,
    R,
    assert_same_effect,
    copy_values,
    every_peft_kind,
    in_ours,
    peft_config,
    peft_draw,
    peft_model,
    their_values,
)

pytestmark = THEIR_WARNINGS

Shapes = tuple[tuple[int, int], ...]  # (out, in) of each layer


def stack(shapes: Shapes) -> nn.Module:
    return nn.Sequential(*(nn.Linear(in_, out) for out, in_ in shapes))


@pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom is <= 0:UserWarning")
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3).map(tuple),
    r=st.integers(1, 50),
    basis=st.sampled_from(sorted(PEFT_FLAGS)),
    seed=st.integers(0, 2**64 - 1),
)
@example(((768, 768),), 32, "dense", 7)
@example(((300, 7),), 2, "sparse", 7)
@example(((1000, 1000),), 15, "very_sparse", 7)
@example(((10, 40), (40, 10)), 4, "dense", 7)  # min(largest out, largest in) = 40: a rectangle no layer uses whole
@example(((1, 9),), 1, "dense", 0)  # one number has no deviation
@example(((9, 1),), 1, "sparse", 0)  # one sign has no deviation
@example(((4, 4),), 1, "very_sparse", 2)  # nothing but zeros
def test_bases_are_those_of_peft_or_refused_where_peft_divides_by_nothing(
    shapes: Shapes, r: int, basis: BasisKind, seed: int
) -> None:
    """Bit for bit."""
    names = [str(i) for i in range(len(shapes))]
    config = peft_config(LLAMA, basis, r=r, projection_prng_key=seed, target_modules=names)
    theirs: Any = get_peft_model(stack(shapes), config)
    expected = [theirs.base_model.randlora_A["default"].float(), theirs.base_model.randlora_B["default"].float()]
    model = stack(shapes)
    options: dict[str, Any] = {"targets": "all-linear", "basis": basis, "seed": seed, "stream": peft_draw(basis)}
    if not all(part.isfinite().all() for part in expected):
        with untouched(model), pytest.raises(ConfigError, match="have a standard deviation of 0"):
            randlora.inject(model, r, **options)
        return
    spec = randlora.plan(model, r, **options).specs[0]
    ours = BasisBank().acquire(spec).slices(spec.max_dim, spec.min_dim, device="cpu", dtype=torch.float32)
    assert all(map(torch.equal, ours, expected))


@every_peft_kind
@every_transformers_model
def test_outputs_and_updates_agree_with_peft_also_merged(kind: RealModel, basis: BasisKind) -> None:
    theirs = peft_model(kind, basis)
    ours = kind.build()
    report = randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets, basis=basis, stream=peft_draw(basis))
    copy_values(theirs, ours)
    assert_same_effect(ours, theirs, kind)
    expected = {fqn: theirs.base_model.model.get_submodule(fqn).get_delta_weight("default") for fqn in report.targets}
    if kind is GPT2:
        expected = {fqn: delta.T for fqn, delta in expected.items()}  # PEFT gives the layout that Conv1D stores
    found = {fqn: randlora.delta_weight(ours, fqn) for fqn in report.targets}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    randlora.merge(ours)
    assert_same_effect(ours, theirs, kind)


@pytest.mark.parametrize("kind", [LLAMA, GPT2], ids=lambda kind: kind.name)
def test_training_follows_peft_for_25_steps(kind: RealModel) -> None:
    theirs, ours = get_peft_model(kind.build(), peft_config(kind)), kind.build()
    randlora.inject(ours, R, alpha=ALPHA, targets=kind.targets, stream=peft_draw("dense"))
    their_losses = losses_of_training(theirs, [p for p in theirs.parameters() if p.requires_grad])
    our_losses = losses_of_training(ours, list(randlora.trainable_parameters(ours)))
    assert their_losses[-1] < 0.95 * their_losses[0], "nothing was learnt, so there is nothing to compare"
    torch.testing.assert_close(our_losses, their_losses, rtol=2e-3, atol=0)
    for fqn, lam, gamma in their_values(theirs):
        for name, expected, start in (("lambda", lam, 0.0), ("gamma", gamma, 1 / max(gamma.shape))):
            found = ours.get_parameter(f"{fqn}.randlora_{name}.default").detach()
            assert (found - expected).norm() <= 2e-3 * (expected - start).norm(), f"{name} of {fqn}"


def losses_of_training(model: nn.Module, parameters: list[nn.Parameter]) -> Tensor:
    """Let a model learn one batch by heart."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    tokens = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(25):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


FOLDER = Path(__file__).parent.parent / "docs" / "examples" / "peft_method_comparison"
EXPERIMENTS = sorted((FOLDER / "experiments" / "randlora").iterdir())
KIND = RealModel("llama", lambda: llama(hidden_size=96), tokens, ("q_proj", "v_proj"))  # q has three bases of rank 32
EQUIVALENT = randlora.equivalent_alpha(lora_r=32, lora_alpha=64, r=32)
PEFT_LR = 1e-4


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_is_as_peft_writes_it_and_as_the_page_says_and_ours_computes_the_same(
    experiment: Path, tmp_path: Path
) -> None:
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

    theirs, ours = fill(get_peft_model(KIND.build(), config).eval()), KIND.build()
    options = {"r": config.r, "alpha": config.randlora_alpha, "seed": config.projection_prng_key}
    randlora.inject(ours, targets=config.target_modules or KIND.targets, stream=peft_draw("dense"), **options)
    copy_values(theirs, ours)
    assert_same_effect(ours, theirs, KIND)
    theirs.save_pretrained(tmp_path)
    assert_same_effect(in_ours(KIND, tmp_path), theirs, KIND)

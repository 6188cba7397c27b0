"""Λ alone trained: Γ stays what it was, r is the size, and sums of adapters are adapters."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.errors import CheckpointError, ConfigError
from randlora.integrations.optimizers import check_optimizers
from randlora.serving import combine
from tests.kit import adapt, adapter_values, all_bits, bits, untouched
from tests.laws import TOKENS, Mixed, diagonals, oracle_of, update_of
from tests.strategies import sides
from tests.test_readers_experts import COUNT, IN, OUT, Flat


def step(model: nn.Module, x: Any = TOKENS) -> None:
    """Take a step of training that moves all that an optimizer has."""
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    for _ in range(2):  # the gradient of a Γ is zero in the first
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def gammas(model: nn.Module, name: str = "default") -> dict[str, Any]:
    return all_bits({key: value for key, value in adapter_values(model, name).items() if "gamma" in key})


@pytest.mark.parametrize("options", [{"r": 7}, {"r": 100}, {"r": 48, "basis": "block"}], ids=str)
def test_training_moves_lambda_and_nothing_else(options: dict[str, Any], tmp_path: Path) -> None:
    model = Mixed()
    report = randlora.inject(model, train="lambda", **options)
    before, fixed = all_bits(adapter_values(model)), gammas(model)
    trained = randlora.trainable_parameters(model)
    assert sum(each.numel() for each in trained) == report.trainable_parameters
    assert report.total_parameters == sum(each.numel() for each in model.parameters())
    assert report.checkpoint_bytes == 4 * sum(each.numel() for each in adapter_values(model).values())
    step(model)
    after = all_bits(adapter_values(model))
    assert gammas(model) == fixed
    assert all(after[key] != before[key] for key in after if key not in fixed)

    randlora.set_trainable(model, "default", False)
    randlora.set_trainable(model, "default")
    assert {*map(id, randlora.trainable_parameters(model))} == {*map(id, trained)}
    randlora.save(model, tmp_path)
    told = randlora.files.inspect(tmp_path)
    assert told.trainable_parameters == report.trainable_parameters
    assert all("Λ alone" in str(each) for each in (report, told, *randlora.adapters(model)))
    twin = Mixed()
    twin.load_state_dict(model.state_dict(), strict=False)
    loaded = randlora.load(twin, tmp_path, trainable=True)
    assert loaded.trainable_parameters == report.trainable_parameters
    assert loaded.config.train == "lambda"
    assert bits(twin(TOKENS)) == bits(model(TOKENS))
    step(twin)
    assert gammas(twin) == fixed


@given(
    out=sides, into=sides, r=st.integers(1, 60), seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)),
    factors=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
)  # fmt: skip
def test_sums_of_adapters_are_adapters_of_their_kind(
    out: int, into: int, r: int, seeds: tuple[int, int], factors: tuple[float, float]
) -> None:
    model = nn.Sequential(nn.Linear(into, out, bias=False))
    for name, seed in zip("ab", seeds, strict=True):
        randlora.inject(model, r=r, name=name, train="lambda", stream="portable")
        lam, _ = diagonals(model[0], name)
        lam.data = torch.randn(lam.shape, generator=torch.Generator().manual_seed(seed))
    given = dict(zip("ab", factors, strict=True))
    combine(model, given, name="c")
    made = {info.name: info for info in randlora.adapters(model)}["c"]
    lam, gamma = diagonals(model[0], "c")
    assert made.config.train == "lambda"
    assert bits(gamma) == bits(torch.full_like(gamma, 1 / min(out, into)))
    wanted = sum(factor * diagonals(model[0], name)[0].double() for name, factor in given.items())
    torch.testing.assert_close(lam.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(update_of(model[0], "c").double(), oracle_of(model[0], name="c"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("r", "rank"), [(3, 3), (16, 16), (60, 16)])
def test_r_is_the_size_and_below_the_width_the_rank(r: int, rank: int) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 40))
    report = randlora.inject(model, r=r, train="lambda")
    assert [row.trainable for row in report.rows] == [r * row.num_bases for row in report.rows]
    assert [row.expected_rank for row in report.rows] == [rank, rank]
    step(model, torch.randn(50, 24))
    for fqn in "01":
        assert torch.linalg.matrix_rank(randlora.delta_weight(model, fqn).double(), rtol=1e-6) == rank


@pytest.mark.parametrize(("rank", "r"), [(1, 48), (4, 192), (32, 1536)])
def test_a_size_like_lora_s_has_an_r_above_the_widths(rank: int, r: int) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 40))
    dense, block = (randlora.plan(model, like_lora=rank, train="lambda", basis=basis) for basis in ("dense", "block"))
    assert (dense.rows[0].r, dense.trainable_parameters) == (r, rank * (24 + 16 + 16 + 40))
    assert dense.lora_rank == rank
    assert block.rows[0].r == {1: 48, 4: 192, 32: 1560}[rank]  # a multiple of 120, if it is near, has more blocks
    assert [row.expected_rank for row in block.rows] == [16, 16]
    with pytest.raises(ConfigError, match="like_lora=1 is out of reach"):
        randlora.plan(
            nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)), nn.Linear(90, 90)), like_lora=1, train="lambda"
        )


def test_a_size_like_lora_s_is_counted_by_matrix_and_has_an_end() -> None:
    report = randlora.plan(nn.Sequential(Flat()), like_lora=2, train="lambda", targets=["up_proj"])
    assert (report.rows[0].r, report.rows[0].count, report.trainable_parameters) == (2 * (OUT + IN), COUNT, 112)
    with pytest.raises(ConfigError, match=r"out of reach: .* with r from 24 to 1048576"):
        randlora.plan(nn.Sequential(nn.Linear(24, 24)), like_lora=2**16, train="lambda")
    narrow = nn.Sequential(nn.Linear(7, 3))  # of which no multiple of 8 is an r that could be of use
    assert randlora.plan(narrow, like_lora=1, basis="block").rows[0].r == 2


def test_a_gamma_that_is_not_trained_takes_no_memory_but_its_own() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 40))
    both, alone = (randlora.training_memory(model, r=16, train=train) for train in ("both", "lambda"))
    assert (alone.parameters, alone.optimizer) == (2 * 16 * 4, 2 * 2 * 16 * 4)
    assert alone.weights + alone.parameters == both.weights + both.parameters


def test_a_gamma_that_was_trained_does_not_come_into_an_adapter_of_lambda_alone() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 40))
    for name, target, train in (("alone", "0", "lambda"), ("also alone", "1", "lambda"), ("both", "1", "both")):
        options: Any = {"train": train, "targets": [target], "stream": "portable"}
        adapt(model, r=7, name=name, **options)
    kinds = {}
    for other in ("also alone", "both"):
        combine(model, {"alone": 1, other: 1}, name=f"with {other}")
        randlora.set_trainable(model, f"with {other}")
        (kinds[other],) = (info.config.train for info in randlora.adapters(model) if info.name == f"with {other}")
        assert {diagonals(layer, f"with {other}")[1].requires_grad for layer in model} == {kinds[other] == "both"}
    assert kinds == {"also alone": "lambda", "both": "both"}
    randlora.set_trainable(model, ["also alone", "both"])
    assert [diagonals(model[1], name)[1].requires_grad for name in ("also alone", "both")] == [False, True]

    trained, alone = (adapt(nn.Sequential(nn.Linear(24, 16)), r=7, train=train) for train in ("both", "lambda"))
    with untouched(alone), pytest.raises(CheckpointError, match='the adapter has train="lambda", and the files train='):
        randlora.swap(alone, randlora.adapter_state(trained))


def test_trainers_look_for_lambda_alone_in_optimizers() -> None:
    model = adapt(nn.Sequential(nn.Linear(24, 16)), r=60, train="lambda")
    own = torch.optim.SGD(randlora.trainable_parameters(model), lr=1e-2)
    check_optimizers(model, [own])
    randlora.inject(model, r=4, name="other", trainable=True)
    others = randlora.trainable_parameters(model, "other")
    with pytest.warns(UserWarning, match="the optimizer does not train default"):
        check_optimizers(model, [torch.optim.SGD([*others, diagonals(model[0])[1]], lr=1e-2)])
    randlora.eject(model)
    adapt(model, r=60, train="lambda")
    with pytest.warns(UserWarning, match="those of an adapter that the model no longer has"):
        check_optimizers(model, [own])


def test_what_would_never_move_or_add_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(24, 16))
    with untouched(model), pytest.raises(ConfigError, match=r'train="lambda" leaves Γ .* init="gamma"'):
        randlora.inject(model, r=4, train="lambda", init="gamma")
    with untouched(model), pytest.raises(ConfigError, match="r=2000 is larger than its layers"):
        randlora.inject(model, r=2000)
    randlora.plan(model, r=1024)  # which costs little, however narrow the layer


@pytest.mark.filterwarnings("ignore:Specified to not save basis_A")
def test_peft_computes_the_same_from_a_file(tmp_path: Path) -> None:
    base: Any = nn.Sequential(nn.Linear(24, 16))
    model = adapt(nn.Sequential(nn.Linear(24, 16)), r=60, train="lambda", basis="sparse")
    base.load_state_dict(model.state_dict(), strict=False)
    randlora.save(model, tmp_path)
    x = torch.randn(5, 24)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x))

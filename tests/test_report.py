"""What the reports of `inject` and `plan` say: figures, the table, a rate to try first, and notes."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Embedding4bit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.report import as_bytes, table
from tests.kit import adapt, adapter_values, on_one_line
from tests.laws import Mixed
from tests.quantized import INT8, MODELS, NF4, Codes, of_4_bits, quantized_model
from tests.strategies import ranks


@given(r=ranks, also=st.sampled_from([None, ["head"], ["norm.weight", "q.bias"]]))
def test_figures_are_those_counted_on_the_model(r: int, also: list[str] | None) -> None:
    model = Mixed()
    plain = sum(parameter.numel() for parameter in model.parameters())
    report = randlora.inject(model, r=r, train_also=also, stream="portable", targets=["q"])
    trainable = list(randlora.trainable_parameters(model))
    own = sum(value.numel() for name, value in adapter_values(model).items() if "randlora" in name)
    assert report.trainable_parameters == sum(parameter.numel() for parameter in trainable)
    assert report.total_parameters == plain + own
    assert report.share == report.trainable_parameters / report.total_parameters
    assert report.checkpoint_bytes == sum(parameter.nbytes for parameter in trainable)
    assert sum(row.count for row in report.rows) == len(report.targets) == 1
    assert report.basis_bytes == randlora.state.adapted_root(model)[1].bank.nbytes
    other: dict[str, Any] = {"r": r, "targets": ["up"], "stream": "portable", "name": "b"}
    planned = randlora.plan(model, **other)
    assert randlora.inject(model, **other) == planned
    assert planned.basis_bytes == randlora.state.adapted_root(model)[1].bank.nbytes, "of a basis that is shared"


@pytest.mark.parametrize(("codes", "is_adapted"), [(NF4, True), (INT8, False)])
def test_a_quantized_weight_counts_as_the_numbers_it_stands_for(codes: Codes, is_adapted: bool) -> None:
    dense, quantized = MODELS[0].build(), quantized_model(MODELS[0], codes)
    for model in (dense, quantized) if is_adapted else ():
        randlora.inject(model, r=8, targets="all-linear", name="first")
    expected, found = randlora.plan(dense, r=8, name="b"), randlora.plan(quantized, r=8, name="b")
    assert (found.total_parameters, found.share) == (expected.total_parameters, expected.share)
    for storage in (torch.uint8, torch.bfloat16):
        embedding = Embedding4bit(16, 64, quant_type="nf4", quant_storage=storage)
        model = nn.Sequential(of_4_bits(64, 31, quant_storage=storage), embedding).to("cpu")
        report = randlora.plan(model, r=8, targets=["0"])
        assert report.total_parameters - report.trainable_parameters == 64 * 31 + 31 + 16 * 64


def test_the_table_of_a_small_model_reads_so_fits_80_columns_and_breaks_no_name() -> None:
    model: nn.Module = Mixed()
    assert "\n1 layer adapted, about" in str(randlora.plan(model, r=4, targets=["up"]))
    report = randlora.plan(model, r=4, train_also=["head"])
    assert str(report).splitlines() == [
        "RandLoRA adapter 'default': alpha=80",
        "dense bases (stream=torch, seed=0, r=4, dims=20x20)",
        "targets: all linear layers but the output head",
        "count  in  out  r  num_bases  rank  trainable",
        "    1  12   12  4          3    12         48",
        "    1  12   20  4          3    12         48",
        "    1  20   12  4          3    12         48",
        "trainable 183 of 987 parameters (18.54%)",
        "3 layers adapted, about LoRA r = 1.6 in size, active, trainable",
        "bases 576 B in memory, checkpoint 732 B",
        "also trained: head.weight, head.bias",
        "learning rate to try first: 0.01, after a short warm-up; for long runs down to a",
        "  tenth (for layers of width 12, the median)",
        'left out: 1 embedding, 15.66% of the weights: targets="all" adapts it',
    ]
    assert str(randlora.merge(adapt(model, r=4))) == "merged default into 3 layers; the layers are plain again"
    texts = {0: "0 B", 999: "999 B", 1000: "1 kB", 347e6: "347 MB", 1.86e11: "186 GB"}
    assert {count: as_bytes(count) for count in texts} == texts
    assert table(("a", "number"), [(1, 1234), (1000000, 2)])[1:] == ["        1   1,234", "1,000,000       2"]
    model = nn.ModuleDict({letter * 30: nn.Linear(8, 8) for letter in "abcdef"})
    report = randlora.plan(model, r=4, basis="block", train_also=[f"{name}.bias" for name in model], trainable=False)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(f"{letter * 30}.bias" in line for line in lines) for letter in "abcd")


SMALL = [(12, 12), (12, 20), (20, 12)]
RATES: list[tuple[list[tuple[int, int]], dict[str, Any], float | None, int]] = [
    (SMALL, {"r": 4}, 1e-2, 12),
    (SMALL, {"r": 4, "alpha": {"0": 80, ".*": 8000}, "init": "gamma"}, 0.3 / 12 / 10, 12),
    (SMALL, {"r": 4, "trainable": False}, None, 12),
    ([(64, 64)] * 3 + [(256, 256)], {"r": 32}, 0.3 / 256, 256),  # which has four fifths of the parameters
    ([(512, 64)], {"r": 32}, 0.3 / 64, 64),
    ([(64, 64)], {"like_lora": 1, "train": "lambda"}, 0.5 / 64, 64),
    ([(64, 64)], {"like_lora": 4, "train": "lambda"}, 0.5 / 64 / 4, 64),
]


@pytest.mark.parametrize(("sides", "options", "expected", "median"), RATES)
def test_the_learning_rate_to_try_goes_by_the_width_in_which_most_is_trained_and_the_size_of_a_step(
    sides: list[tuple[int, int]], options: dict[str, Any], expected: float | None, median: int
) -> None:
    model = nn.Sequential(*(nn.Linear(*each) for each in sides))
    report = randlora.plan(model, targets="all-linear", **options)
    assert report.learning_rate == (expected if expected is None else pytest.approx(expected))
    assert ("learning rate to try first" in str(report)) == (expected is not None)
    assert (f"for layers of width {median}, the median" in on_one_line(report)) == (expected is not None)


@pytest.mark.parametrize(("width", "noted"), [(1024, 0.5), (4096, 0.4), (512, 0.6), (256, None)])
def test_the_report_of_dense_bases_names_block_bases_with_their_share_of_the_work(
    width: int, noted: float | None
) -> None:
    layers = nn.Linear(width, width, device="meta"), nn.Embedding(9 * width, width, device="meta")
    layer, said = nn.Sequential(*layers), "basis='block' would take about"
    report = str(randlora.plan(layer, r=32, targets=["0", "1"]))
    assert (f"{said} {noted} of the work" in report) == (noted is not None) == (said in report)
    c, b, tokens = 4, 8, 2048  # the defaults for r = 32; docs/method.md has the formulas
    dense = 6 * tokens + 6 * width if width < tokens else 14 * tokens
    block = (4 + 2 / c + 2 / b) * tokens + 4 * width / (c * b)
    assert noted is None or round(block / dense, 1) == noted
    for options in ({"basis": "block"}, {"basis": "sparse"}, {"trainable": False}):
        assert said not in str(randlora.plan(layer, r=32, targets=["0"], **options))


def test_a_head_that_is_left_frozen_is_told_of_with_how_to_train_it() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "classifier": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})
    note = 'frozen: classifier; if it is new, with random values, give train_also="classifier"'
    rows: list[dict[str, Any]] = [{}, {"targets": ["q_proj"]}, {"targets": ["classifier"]}, {"trainable": False}]
    told = [note in randlora.plan(model, r=4, **options).notes for options in (*rows, {"train_also": "classifier"})]
    assert told == [True, True, False, False, False]

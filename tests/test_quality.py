"""The contest of quality: its one rule of significance, the rates it goes on to, and contestants of its own."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.quality import __main__ as quality
from benchmarks.quality import docstrings, fashion, pieces, summary
from benchmarks.quality.contestants import GROUPS, MAIN, lora_once
from benchmarks.quality.pieces import PIECES
from benchmarks.quality.runs import Key, Run, add_run, read_runs
from benchmarks.quality.significance import difference
from benchmarks.quality.spectrum import SPECTRUM_TASKS
from benchmarks.quality.step_time import MEASURED, reference_of
from benchmarks.quality.task import Prepared, Targets

TASK = quality.TASKS["tweets"]
LIMIT = 2.776  # of t with four degrees of freedom


def by_seed(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(values))


def made_runs(contestant: str, metrics: Sequence[float], lr: float = 1e-3, **found: float) -> list[Run]:
    return [
        Run(Key("tweets", contestant, lr, seed), {"accuracy": value, "drift": 0.0, **found}, None, 1.0, 1, 1, 1, {})
        for seed, value in enumerate(metrics)
    ]


def with_errors_away(errors: float) -> list[float]:
    """Five values whose mean is so many standard errors above zero."""
    around = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    return (around + errors * around.std() / math.sqrt(5)).tolist()


@pytest.mark.parametrize(
    ("values", "is_told"),
    [
        ([0.0] * 5, False),
        ([0.5] * 5, True),
        ([1.0, -1.0, 1.0, -1.0, 0.0], False),
        (with_errors_away(LIMIT - 0.01), False),
        (with_errors_away(LIMIT + 0.01), True),
        (with_errors_away(-LIMIT - 0.01), True),
        ([3.0], False),
        ([], False),
        ([1.0, 1.0, math.nan], False),
    ],
)
def test_a_difference_is_told_only_where_its_interval_over_equal_seeds_leaves_zero_out(
    values: list[float], is_told: bool
) -> None:
    found = difference(by_seed(values), {**dict.fromkeys(range(len(values)), 0.0), 9: 5.0})
    assert found.is_distinguishable is is_told
    assert found.written(1).startswith("not distinguishable") is not is_told


def test_tables_tell_no_tie_apart_and_mark_all_that_is_level_with_the_best() -> None:
    ties = [0.70, 0.72, 0.74, 0.76, 0.78]
    runs = [*made_runs("dense", ties), *made_runs("block", ties), *made_runs("LoRA", [x - 0.05 for x in ties])]
    rows = {name: name for name in ("dense", "block", "LoRA", "absent")}
    *_, dense, block, lora, absent = summary.overview([(TASK, runs)], rows).splitlines()
    assert (dense.count("**74.0 ± 1.4**"), block.count("**74.0 ± 1.4**"), lora.count("**")) == (1, 1, 0)
    assert absent.split(" | ")[1].strip(" |") == ""
    nan = summary.overview([(TASK, [*runs, *made_runs("absent", [math.nan] * 5)])], rows).splitlines()[-1]
    assert nan == "| absent | nan |"
    pairs = {"tie": ("dense", "block"), "better": ("dense", "LoRA"), "worse": ("LoRA", "dense")}
    *_, tie, better, worse = summary.differences([(TASK, runs)], pairs).splitlines()
    assert tie == "| tie | (0.0 to 0.0) |"
    assert "+5.0 (5.0 to 5.0)" in better
    assert "-5.0 (-5.0 to -5.0)" in worse
    assert "not distinguishable" in summary.table_of(TASK, runs)


def test_the_smallest_adapter_is_the_one_with_the_fewest_parameters_within_a_point_of_the_reference() -> None:
    runs = [*made_runs("full", [0.8] * 5), *made_runs("dense 1", [0.785] * 5), *made_runs("LoRA 1", [0.7] * 5)]
    runs += [
        Run(run.key, run.found, None, 1.0, 1, trained, 1, {})
        for name, trained in (("dense 2", 20), ("dense 4", 10), ("rsLoRA 32", 5))
        for run in made_runs(name, [0.795] * 5)
    ]
    later = [replace(run, key=replace(run.key, seed=run.key.seed + 5)) for run in made_runs("full", [0.7] * 5)]
    methods = {"dense": "ours", "LoRA": "LoRA", "rsLoRA": "rsLoRA"}
    assert summary.smallest([(TASK, [*runs, *later])], methods, "full").splitlines()[2:] == [  # by the seeds of both
        "| ours | 10: -0.5 (-0.5 to -0.5) |",
        "| LoRA | none |",
        "| rsLoRA | at most 5: -0.5 (-0.5 to -0.5) |",  # no smaller one was tried
    ]
    losses = [replace(run, found={"loss": run.found["accuracy"], "drift": 0.0}) for run in runs]
    table = summary.smallest([(quality.TASKS["word problems"], losses)], methods, "full")
    assert table.splitlines()[3] == "| LoRA | 1: +0.100 (0.100 to 0.100) |"


def test_a_sweep_goes_beyond_its_edges_then_halves_the_steps_beside_the_best_which_validation_chooses() -> None:
    def rates(metrics: dict[float, float], **found: float) -> tuple[float, ...]:
        runs = [run for lr, value in metrics.items() for run in made_runs("dense", [value] * 2, lr, **found)]
        return summary.next_rates(TASK, summary.points_of(TASK, runs), is_halved=True)

    assert rates({1e-3: 0.9, 3e-3: 0.8, 1e-2: 0.1}) == (3e-4,)
    assert rates({1e-3: 0.1, 3e-3: 0.8, 1e-2: 0.9}) == (3e-2,)
    assert rates({1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.1}) == (1.7e-3, 5.5e-3)
    assert rates({1e-3: 0.7, 1.7e-3: 0.75, 3e-3: 0.8, 5.5e-3: 0.5, 1e-2: 0.1}) == ()
    late = made_runs("dense", [0.7] * 5 + [0.9] * 5) + made_runs("dense", [0.75] * 5, 3e-3)
    assert summary.best(TASK, summary.points_of(TASK, summary.whole(late))).lr == 3e-3  # five seeds of ten choose
    low, high = made_runs("dense", [0.9] * 2, validation=0.5), made_runs("dense", [0.8] * 2, 3e-3, validation=0.6)
    assert summary.best(TASK, summary.points_of(TASK, [*low, *high])).lr == 3e-3


def test_a_piece_that_was_interrupted_makes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, contestants, rates = SPECTRUM_TASKS[0], {"dense": MAIN["dense"]}, {"dense": (1e-3, 3e-3)}
    file, other = tmp_path / "flat_spectrum.jsonl", Key(task.name, "dense", 3e-3, 1)
    made: list[Key] = []

    def make_run(_task: object, _contestant: object, key: Key, _size: object) -> Run:
        made.append(key)
        if len(made) == 3:
            raise KeyboardInterrupt
        if len(made) == 4:  # meanwhile, a second process makes the next one
            add_run(file, Run(other, {"residual": 2.0, "drift": 0.0}, None, 1.0, 1, 1, 1, {}))
        return Run(key, {"residual": 1.0, "drift": 0.0}, None, 1.0, 1, 1, 1, {})

    monkeypatch.setattr(quality, "make_run", make_run)
    with pytest.raises(KeyboardInterrupt):
        quality.runs_of(task, contestants, range(2), tmp_path, full=True, rates=rates)
    found = quality.runs_of(task, contestants, range(2), tmp_path, full=True, rates=rates)
    assert [(key.lr, key.seed) for key in made] == [(1e-3, 0), (3e-3, 0), (1e-3, 1), (1e-3, 1)]
    assert len(found) == len({run.key for run in read_runs(file)}) == len([*read_runs(file)]) == 4


def test_of_screened_rates_two_have_the_seeds_that_the_best_is_chosen_on_and_that_has_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_run(_task: object, _contestant: object, key: Key, _size: object) -> Run:
        is_late = key.lr == 1e-2 and key.seed >= 2  # it is the best on two seeds alone
        residual = abs(math.log(key.lr / 1.2e-2)) + 2 * is_late
        return Run(key, {"residual": residual, "drift": 0.0}, None, 1.0, 1, 1, 1, {})

    monkeypatch.setattr(quality, "make_run", make_run)
    contestants = {"dense": MAIN["dense"]}
    found = quality.runs_of(SPECTRUM_TASKS[0], contestants, range(7), tmp_path, full=True, screening=2)
    seeds: dict[float, list[int]] = {}
    for run in found:
        seeds.setdefault(run.key.lr, []).append(run.key.seed)
    assert sorted(seeds) == [1e-3, 3e-3, 5.5e-3, 1e-2, 1.7e-2, 3e-2, 1e-1]
    assert {lr: own for lr, own in seeds.items() if own != [0, 1]} == {1e-2: [*range(5)], 1.7e-2: [*range(7)]}


def test_pieces_share_no_run() -> None:
    taken = [(piece.task.name, name) for piece in PIECES.values() for name in piece.contestants or GROUPS[piece.group]]
    assert len(taken) == len(set(taken))


def test_a_share_of_the_rule_loses_to_the_best_of_all_rates_whose_cliff_is_ten_points_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "KEPT", tmp_path)
    rates = PIECES["rule of tweets"].rates["dense, by the rule"]
    runs = [*made_runs("dense", [0.75] * 5, 1.0 / 384), *made_runs("dense", [0.6] * 5, 2.0 / 384)]
    runs += made_runs("dense", [0.8] * 5 + [0.9] * 5, rates[1])  # whose later seeds others have not
    for lr, metric in zip(rates[::2], (0.7, 0.78), strict=True):
        runs += made_runs("dense, by the rule", [metric] * 5, lr)
    for run in runs:
        add_run(tmp_path / "tweets.jsonl", run)
    for run in made_runs("block, by the rule", [0.7] * 5, rates[1]):  # what an interrupted piece has made
        add_run(tmp_path / "tweets.jsonl", run)
    dense, block = pieces.losses_of_rule().splitlines()[2:]
    assert dense == "| tweets, dense | 10.0 | 0.0 | 2.0 | 0.30 | 2.00 |"
    assert block == "| tweets, block |  | 0.0 |  | 0.30 |  |"


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("block 16", "LoRA 16"),
        ("dense, Λ alone 4", "LoRA 4"),
        ("LoRA+ 2", "LoRA 2"),
        ("dense, r = 8", "LoRA, equal size"),
        ("dense", "LoRA, equal size"),
    ],
)
def test_the_step_of_a_contestant_is_timed_beside_the_lora_of_its_size(name: str, reference: str) -> None:
    assert reference_of(name) == reference
    assert reference in MEASURED


def prepared(model: nn.Module, targets: list[str] | str) -> Prepared:
    return Prepared(model, None, Targets(targets, targets, targets), [], lambda _: torch.zeros(()), dict)


def test_a_lora_adds_its_update_to_each_weight_of_attention_once() -> None:
    model: Any = fashion.VisionTransformer()
    before = model.blocks[0].attention.out_proj.weight.detach().clone()
    lora_once(prepared(model, fashion.OURS), 0, rank=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 2 * fashion.DEPTH * 16 * fashion.WIDTH
    added = model.blocks[0].attention.out_proj.parametrizations.weight[0]
    nn.init.normal_(added.up)
    now = model.blocks[0].attention.out_proj.weight
    torch.testing.assert_close(now - before, 2.0 * added.up @ added.down, atol=1e-5, rtol=1e-4)


def test_docstrings_keep_neither_code_nor_the_names_of_libraries() -> None:
    text = "Return a `DataFrame` of scikit-learn's :class:`~pandas.Index`, as np.array or Series does for numpy input."
    assert docstrings.without_names(text) == "Return a of , as or Series does for input."

"""Summing up runs of several seeds, and going on where they stopped. Nothing is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.command import Settings
from benchmarks.quality import FULL, QUICK, Run
from benchmarks.texts import FILM_REVIEWS, TWEETS, Source, label_of

FOUND = {"accuracy": 0.8, "seconds": 2.0, "trained_parameters": 1234}


def run(contestant: str, seed: int, accuracy: float, seconds: float, *, source: str = "tweets") -> Run:
    return Run(source, contestant, seed, {}, accuracy, seconds, 1234)


RUNS = [
    run("full", 0, 0.70, 4.0),
    run("dense", 0, 0.80, 3.0),
    run("full", 1, 0.90, 5.0),
    run("dense", 1, 0.80, 2.0),
    run("dense", 0, 0.75, 6.0, source="film reviews"),
]


def test_the_table_gives_mean_and_standard_error_and_the_ratio_of_the_best_times() -> None:
    titles, _, *lines = quality.table_of(RUNS).splitlines()
    assert titles.endswith("| accuracy, film reviews | training time, tweets | training time, film reviews |")
    assert lines == [
        "| full | 1,234 | 80.0 ± 10.0 % |  | 1.00 |  |",
        "| dense | 1,234 | 80.0 ± 0.0 % | 75.0% | 0.50 |  |",
    ]


def test_rows_hold_the_mean_accuracy_and_the_best_time() -> None:
    rows = {row.case: row.figures for row in quality.rows_of([*RUNS, run("dense", 2, 0.95, 9.0)])}
    assert list(rows) == [
        f"{data}, {what}" for data in ("tweets", "film reviews") for what in ("accuracy", "training time")
    ]
    accuracy, time = rows["tweets, accuracy"]["dense"], rows["tweets, training time"]["dense"]
    assert (accuracy.best, accuracy.median) == pytest.approx((85, 80))
    assert accuracy.unit == "%"
    assert (time.best, time.median, time.unit) == (2.0, 3.0, "s")


def test_a_finished_run_is_recalled_and_any_other_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def fine_tune(source: Source, _contestant: object, seed: int, *_: object) -> dict[str, Any]:
        made.append((source.name, seed))
        return FOUND

    monkeypatch.setattr(quality, "fine_tune", fine_tune)
    settings = Settings("cpu", is_quick=True, out=tmp_path / "new")
    first = quality.run_or_recall(TWEETS, "dense", 0, QUICK, settings)
    assert quality.run_or_recall(TWEETS, "dense", 0, QUICK, settings) == first
    assert made == [("tweets", 0)]
    for source, seed, size in ((TWEETS, 1, QUICK), (FILM_REVIEWS, 0, QUICK), (TWEETS, 0, replace(QUICK, epochs=3))):
        quality.run_or_recall(source, "dense", seed, size, settings)
    assert made == [("tweets", 0), ("tweets", 1), ("film reviews", 0), ("tweets", 0)]
    assert len(quality.saved_runs(tmp_path / "new")) == 4


def test_all_sizes_name_contestants_and_the_full_one_has_three_seeds() -> None:
    assert set(QUICK.contestants) <= set(FULL.contestants) == set(quality.CONTESTANTS)
    assert len(set(FULL.seeds)) >= 3


def test_peft_and_ours_are_trained_with_one_learning_rate() -> None:
    kinds = ("PEFT", "dense", "block", "very_sparse", "dense bf16")
    assert len({quality.CONTESTANTS[name].lr for name in kinds}) == 1


@pytest.mark.parametrize(("rating", "label"), [(-4, 0), (-0.6, 0), (-0.5, 2), (0, 2), (0.5, 2), (0.6, 1), (4, 1)])
def test_ratings_in_between_are_neutral(rating: float, label: int) -> None:
    assert label_of(rating) == label

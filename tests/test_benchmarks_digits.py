"""The study of a small vision transformer: how runs are summed up, and one that is short."""

import pytest
import torch

import randlora
from benchmarks import digits
from benchmarks.digits import FULL, QUICK, Run, Size

RUNS = [
    Run("head", 0, 0.1, validation=0.6, test=0.60, seconds=1.0, trained_parameters=0),
    Run("head", 1, 0.1, validation=0.6, test=0.70, seconds=1.0, trained_parameters=0),
    Run("full", 0, 1e-3, validation=0.8, test=0.70, seconds=1.0, trained_parameters=1234),
    Run("full", 1, 1e-3, validation=0.8, test=0.90, seconds=1.0, trained_parameters=1234),
    Run("full", 0, 1e-2, validation=0.7, test=0.90, seconds=1.0, trained_parameters=1234),
    Run("full", 1, 1e-2, validation=0.8, test=0.95, seconds=1.0, trained_parameters=1234),
]


def test_a_contestant_is_judged_at_the_learning_rate_that_is_best_on_images_not_tested_on() -> None:
    titles, _, *lines = digits.table_of(RUNS).splitlines()
    assert titles.count("|") == 7
    assert lines == [
        "| head | 0 | 0.1 | 65.0 ± 5.0 % | 0.0 ± 0.0 % | 0.1: 65.0 % |",
        "| full | 1,234 | 0.001 | 80.0 ± 10.0 % | 15.0 ± 5.0 % | 0.001: 80.0 %, 0.01: 92.5 % |",
    ]


def test_the_full_study_has_several_seeds_and_learning_rates_and_no_contestant_has_its_best_from_one() -> None:
    assert len(FULL.seeds) >= 3
    assert all(len(contestant.rates) >= 3 for contestant in digits.CONTESTANTS.values())
    assert len({digits.CONTESTANTS[name].rates for name in ("RandLoRA", "split", "without attention")}) == 1
    assert len(QUICK.seeds) == 1


@pytest.mark.medium
def test_the_images_are_those_of_two_halves_of_the_digits() -> None:
    for half in digits.read_digits():
        assert half.pixels.shape == (2500, 28, 28)
        assert [half.pixels.min().item(), half.pixels.max().item()] == [0, 1]
        assert torch.equal(half.labels.bincount(), torch.full((5,), 500))


@pytest.mark.slow
def test_an_adapter_of_attention_beats_a_new_head_alone_and_trains_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = digits.read_digits()
    fewer = first, second[torch.arange(0, 2500, 4)]  # or most of the time is spent on testing
    monkeypatch.setattr(digits, "read_digits", lambda: fewer)
    size = Size((0,), pretraining_epochs=1, epochs=8, train_size=100, validation_size=1)
    model = digits.pretrained(0, epochs=size.pretraining_epochs)
    assert digits.accuracy(model, first[torch.arange(0, 2500, 4)]) > 0.85
    best = max(digits.fine_tune(model.state_dict(), "head", lr, 0, size).test for lr in (1e-2, 3e-2, 1e-1))
    for name in ("RandLoRA", "split"):
        found = digits.fine_tune(model.state_dict(), name, 1e-2, 0, size)
        assert found.test > best + 0.03
        adapted = digits.VisionTransformer()
        digits.CONTESTANTS[name].adapt(adapted, 0)
        count = sum(parameter.numel() for parameter in randlora.trainable_parameters(adapted))
        assert found.trained_parameters == count - sum(parameter.numel() for parameter in adapted.head.parameters())

"""What trainers say as training begins of a rate far from the report's, and of an optimizer older than the adapter."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError
from randlora.integrations.optimizers import check_optimizers


def adapted(**options: Any) -> tuple[nn.Module, float]:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    rate = randlora.inject(model, r=32, targets=["0"], **options).learning_rate
    assert rate is not None
    assert rate == pytest.approx(0.3 / 256)
    return model, rate


def said(model: nn.Module, *optimizers: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_optimizers(model, optimizers)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


FACTORS = [(0.049, "below"), (0.051, ""), (1.0, ""), (2.9, ""), (3.1, "above")]


@pytest.mark.parametrize(("factor", "where"), FACTORS)
def test_a_rate_below_a_twentieth_or_above_three_times_the_reports_is_warned_of_with_both(
    factor: float, where: str
) -> None:
    model, rate = adapted()
    parameters = randlora.trainable_parameters(model)
    expected = [
        f"learning rate {factor * rate:.2g} is far {where} {rate:.2g}, which the report of adapter 'default' names"
    ]
    expected = expected if where else []

    def found(optimizer: Any) -> list[str]:
        return [each.partition(": ")[0] for each in said(nn.Sequential(model), optimizer)]

    adam = torch.optim.AdamW(parameters, factor * rate)
    with warnings.catch_warnings(action="error"):  # preferences and rewards need lower rates
        if where != "above":
            check_optimizers(model, [adam], is_supervised=False)
    assert found(adam) == found(SimpleNamespace(optimizer=SimpleNamespace(optimizer=adam))) == expected
    torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 0.0)  # a warm-up, whose first rate is not what is reached
    assert found(adam) == expected
    cycle = torch.optim.Adam(parameters, 1e-9)
    torch.optim.lr_scheduler.OneCycleLR(cycle, factor * rate, total_steps=9)
    assert found(cycle) == expected, "its first rate is a twenty-fifth of what is reached"
    for other in (torch.optim.SGD(parameters, 1.0), type("MuonWithAuxAdam", (torch.optim.AdamW,), {})(parameters, 1.0)):
        assert said(model, other) == []
    groups = torch.optim.AdamW([
        {"params": parameters[:1], "lr": factor * rate},
        {"params": parameters[1:], "lr": rate},
    ])
    assert said(model, groups) == [], "one of them is near"


def test_the_rate_is_the_one_of_the_adapters_that_are_trained() -> None:
    model, rate = adapted()
    adam = torch.optim.AdamW(randlora.trainable_parameters(model), rate)
    randlora.inject(model, r=32, targets=["0"], alpha=20 * 32 * 10**-4, name="b")
    assert said(model, adam) == [], "b, which would need a rate 100 times as large, is not trained"
    randlora.set_trainable(model, "b")
    assert len(said(model, torch.optim.AdamW(randlora.trainable_parameters(model), rate / 10))) == 1
    table = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    randlora.inject(table, r=2, train_rows={"0": [1]}, targets=["1"])
    for rate in (1e-5, 1.0):
        assert len(said(table, torch.optim.AdamW(randlora.trainable_parameters(table), rate))) == 1


@pytest.mark.parametrize("train_also", [None, ["1"]])
def test_an_optimizer_made_before_the_adapter_is_refused(train_also: list[str] | None) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    module = nn.ModuleDict({"model": model, "head": nn.Linear(4, 4)})  # of which the head is trained without an adapter
    before = [torch.optim.AdamW(each.parameters(), 1e-3) for each in (model, module)]
    randlora.inject(model, r=32, targets=["0"], train_also=train_also)
    for optimizer in before:
        with pytest.raises(
            AdapterError, match=r"older than these: make one of randlora\.trainable_parameters\(model\), after"
        ):
            check_optimizers(module, [optimizer])
    after = torch.optim.AdamW(randlora.trainable_parameters(model), 1e-3)
    of_engine = [torch.optim.AdamW([torch.zeros(9, requires_grad=flag)], 1e-3) for flag in (True, False)]  # or a dummy
    for right in ([*before, after], [after], *([each] for each in of_engine), []):
        assert said(module, *right) == []


def test_an_optimizer_of_an_adapter_that_is_gone_or_without_one_of_two_is_warned_of() -> None:
    model, rate = adapted()
    stale = torch.optim.AdamW(randlora.trainable_parameters(model), rate)
    randlora.eject(model)
    randlora.inject(model, r=32, targets=["0"])
    (message,) = said(model, stale)
    assert message.startswith("the optimizer's parameters are those of an adapter that the model no longer has: make")
    randlora.inject(model, r=32, targets=["0"], name="b", trainable=True)
    one = torch.optim.AdamW(randlora.trainable_parameters(model, "default"), rate)
    assert said(model, one) == [
        "the optimizer does not train b: make one of all trainable_parameters, or call set_trainable"
    ]
    assert said(model, torch.optim.AdamW(randlora.trainable_parameters(model), rate)) == []

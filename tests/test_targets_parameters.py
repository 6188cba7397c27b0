"""Weights that other code reads, and parameters of no kind, under their own names."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import randlora
from randlora.errors import TargetError
from tests.kit import untouched
from tests.left_out_models import mixed, quiet_plan, register


@pytest.fixture(autouse=True, scope="module")
def _kinds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        yield


def test_a_weight_that_other_code_reads_is_found_by_its_name_and_its_last_component() -> None:
    model = nn.ModuleDict({"first": mixed(), "second": mixed()})
    assert quiet_plan(model, targets=["up_proj"]).targets == ("first.experts.up_proj", "second.experts.up_proj")
    assert quiet_plan(model, targets=["second.experts.up_proj"]).targets == ("second.experts.up_proj",)
    assert quiet_plan(model, targets=r".*\.up_proj").targets == ("first.experts.up_proj", "second.experts.up_proj")
    with pytest.raises(TargetError, match=r'did you mean targets=\["up_proj"\]'):
        quiet_plan(model, targets="up_proj")
    with pytest.raises(TargetError, match=r"nearest names are up_proj"):
        quiet_plan(model, targets=["up_prjo"])


NO_LAYER = "for which there is no adapter layer"
OF_NO_KIND: list[tuple[str, Any, str]] = [
    ("name", ["odd.table"], rf"odd\.table is a parameter of Odd with shape \(3, 5\), {NO_LAYER}: narrow the pattern, "),
    ("beside-others", ["up", "stack"], rf"odd\.stack is a parameter of Odd with shape \(2, 3, 4\), {NO_LAYER}"),
    ("regex", r"up|odd\.table", rf"odd\.table is a parameter of Odd .*, {NO_LAYER}"),
    ("of-an-owner", r"experts\..*", rf"experts\.router is a parameter of Experts .*, {NO_LAYER}"),
    ("module", ["odd"], rf"odd is of type Odd, {NO_LAYER}: .* or register one with randlora\.layers\.register_layer"),
    ("last-component", "table", rf"'table' matches .*, only odd\.table \(a parameter of Odd .*, {NO_LAYER}: register"),
    ("vector", ["scale"], r"only odd\.scale \(a parameter of Odd with shape \(7,\), not a matrix\)"),
    ("of-a-layer", ["up.weight"], r"only up\.weight \(a parameter of up, which is the name to give\)"),
    ("in-a-named-module", ["experts", "router"], rf"experts\.router is a parameter of Experts .*, {NO_LAYER}"),
]


@pytest.mark.parametrize(("targets", "message"), [row[1:] for row in OF_NO_KIND], ids=[row[0] for row in OF_NO_KIND])
def test_a_parameter_that_no_kind_serves_is_refused_by_name_and_type(targets: Any, message: str) -> None:
    model = mixed()
    with untouched(model), pytest.raises(TargetError, match=message):
        randlora.inject(model, r=2, targets=targets)


def test_a_module_that_is_refused_stands_for_its_parameters() -> None:
    with pytest.raises(TargetError, match=r"^cannot find the targets: odd is of type Odd, .*$"):
        quiet_plan(mixed(), targets=r"odd.*")


def test_a_parameter_that_no_kind_serves_can_be_excluded() -> None:
    report = quiet_plan(mixed(), targets=r"experts\..*", exclude=["router"])
    assert report.targets == ("experts.up_proj", "experts.down_proj")

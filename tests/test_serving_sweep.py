"""Rows of small models of transformers and other libraries, in batches that divide their tokens and windows."""

from collections import defaultdict
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from randlora.errors import AdapterError
from randlora.serving import routed
from tests.rows_zoo import FAMILIES
from tests.serving import Names, row_by_row, with_adapters
from tests.transformers_zoo import TASKS

RIGHT = {
    "torch": 21, "diffusers": 28, "timm": 39, "torchvision": 9, "open_clip": 5, "sentence_transformers": 14,
    "causal LM": 124, "masked LM": 38, "sequence classification": 80, "vision": 15, "encoder and decoder": 28,
}  # fmt: skip
"""Of how many models of a family rows are at least known; the table in docs/serving.md has the numbers of libraries."""
REFUSED = {"FalconMambaForCausalLM", "LEDForConditionalGeneration", "LongformerForMaskedLM", "MambaForCausalLM"}
"""Classes of transformers that write into windows which overlap, or read a weight where its rows are unknown."""


def with_rows(output: Any, rows: int) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.dim() and output.shape[0] == rows else None
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for part in parts if (found := with_rows(part, rows)) is not None), None)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict | list | tuple):
        parts = [in_dtype(each, dtype) for each in (value.values() if isinstance(value, dict) else value)]
        return dict(zip(value, parts, strict=True)) if isinstance(value, dict) else type(value)(parts)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Case(NamedTuple):
    """A forward of a model, the names of its rows, and the output of each row by itself."""

    run: Callable[[], Tensor]
    names: Names
    expected: Tensor


def tolerance(expected: Tensor) -> float:
    """Return how far apart equal outputs may be: a model with random weights may lose five digits of float32."""
    return (1e-2 if expected.dtype is torch.float32 else 1e-3) * float(expected.abs().max())


def case_of(model: nn.Module, given: dict[Any, Any], names: Names) -> Case:
    args = [value for key, value in given.items() if isinstance(key, int)]
    kwargs = {key: value for key, value in given.items() if isinstance(key, str)}

    def run() -> Tensor:
        torch.manual_seed(1)
        found = with_rows(model(*args, **kwargs), len(names))
        assert found is not None
        return found

    expected, other = (row_by_row(model, own, run) for own in (names, [*names[1:], names[0]]))
    assert not torch.allclose(expected, other, rtol=0, atol=tolerance(expected)), "none could be wrong"
    return Case(run, names, expected)


def outcome(model: nn.Module, case: Case) -> str:
    try:
        with routed(model, case.names):
            found = [case.run(), case.run()]  # the first is followed
    except AdapterError:
        return "refused"
    atol = tolerance(case.expected)
    is_right = all(torch.allclose(each, case.expected, rtol=1e-3, atol=atol) for each in found)
    return "right" if is_right else "wrong"


def outcome_of(family: str, name: str, targets: str | None, dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    try:
        model, inputs = FAMILIES[family][0](name)
        for parameter in model.to(dtype).parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                nn.init.normal_(parameter, 0.3, 0.1)  # a gate that would hide what is behind it
        with_adapters(model, targets)
        cases = [case_of(model, in_dtype(inputs(rows), dtype), (["a", "b", None] * 2)[:rows]) for rows in (6, 4)]
    except Exception:  # another release has other options, or some sizes do not go together
        return "not run"
    outcomes = {outcome(model, case) for case in cases}
    return next(each for each in ("wrong", "refused", "right") if each in outcomes)


WAYS = [("all", torch.float64), ("all-linear", torch.float64), ("all", torch.float32)]
"""A model is right in one of them: embeddings of positions are refused with all targets, an LSTM in float32."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other libraries
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_models_are_right_or_refused(family: str) -> None:
    is_task = family in TASKS
    pytest.importorskip("transformers" if is_task else family)
    found: dict[str, set[str]] = defaultdict(set)
    for way, name in product([(None, torch.float64)] if is_task else WAYS, FAMILIES[family][1]):
        found[name].add(outcome_of(family, name, *way))
    wrong, right = ({name for name, outcomes in found.items() if each in outcomes} for each in ("wrong", "right"))
    refused = {name for name, outcomes in found.items() if "refused" in outcomes} - right
    assert not wrong
    assert not is_task or refused <= REFUSED
    assert len(right) >= RIGHT[family], refused

"""Sizes beside LoRA's: the r that has as many parameters, and the rank of a LoRA in a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.errors import ConfigError, TargetError
from randlora.targets.options import r_like_lora
from tests.kit import untouched
from tests.laws import Mixed
from tests.test_experts import EXPERTS, mixtral

SIDES = st.integers(1, 40)
NAMES = ["q", "up", "down"]


def trained(shape: tuple[int, ...], r: int) -> int:
    """Count Λ and Γ one by one."""
    *stack, rows, columns = shape
    side = min(rows, columns)
    bases = len(range(0, side, r))
    return (stack[0] if stack else 1) * (r * bases + bases * side)


@dataclass(frozen=True)
class Weight:
    """What is asked of a site."""

    shape: tuple[int, ...]

    def shape_with(self, _: object) -> tuple[int, ...]:
        return self.shape


@given(
    st.lists(st.tuples(SIDES, SIDES) | st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=4),
    st.integers(1, 60),
)
def test_no_r_has_a_number_of_parameters_that_is_nearer(shapes: list[tuple[int, ...]], lora_r: int) -> None:
    wanted = sum((shape[0] if len(shape) == 3 else 1) * lora_r * (shape[-2] + shape[-1]) for shape in shapes)
    sizes = {r: sum(trained(shape, r) for shape in shapes) for r in range(1, 1 + max(min(s[-2:]) for s in shapes))}
    nearest = min(abs(size - wanted) for size in sizes.values())
    weights: Any = [Weight(shape) for shape in shapes]
    try:
        found = r_like_lora(weights, lora_r, randlora.RandLoRAConfig())
    except ConfigError:
        near = [size for size in sizes.values() if abs(size - wanted) == nearest]
        assert all(max(size, wanted) > 1.5 * min(size, wanted) for size in near)
    else:
        assert abs(sizes[found] - wanted) == nearest


@pytest.mark.parametrize("experts", ["each", "shared"])
def test_experts_are_compared_with_a_lora_on_all_of_them(experts: Any) -> None:
    model = mixtral()
    report = randlora.plan(model, r=2, targets=EXPERTS, experts=experts)
    stacks = [parameter.shape for parameter in model.parameters() if parameter.dim() == 3]
    lora = sum(count * (rows + columns) for count, rows, columns in stacks)
    assert report.lora_rank == pytest.approx(report.trainable_parameters / lora)


@pytest.mark.parametrize(
    ("like_lora", "layer", "options", "message"),
    [
        (1000, nn.Linear(64, 64), {}, r"of rank 1 to 32, with r from 64 down to 1"),
        (32, nn.Embedding(3200, 64), {}, "is out of reach"),
        (2, nn.Linear(64, 64), {"basis": "block", "blocks": (128, 3)}, "with r from 384 down to 384"),
        (2, nn.Linear(64, 64), {"basis": "block", "blocks": (1000003, 999983)}, "an r that both blocks divide"),
    ],
)
def test_a_size_that_no_r_has_is_an_error(
    like_lora: int, layer: nn.Module, options: dict[str, Any], message: str
) -> None:
    model = nn.ModuleDict({"a": layer})
    with untouched(model), pytest.raises(ConfigError, match=message):
        randlora.inject(model, like_lora=like_lora, targets=["a"], **options)


@pytest.mark.parametrize("lora_r", [1, 2, 4])
def test_a_report_has_the_rank_of_a_lora_of_peft_with_as_many_parameters(lora_r: int) -> None:
    theirs = peft.get_peft_model(Mixed(), peft.LoraConfig(r=lora_r, target_modules=NAMES))
    size, _ = theirs.get_nb_trainable_parameters()
    report = randlora.plan(Mixed(), like_lora=lora_r, targets=NAMES)
    assert report.lora_rank == pytest.approx(report.trainable_parameters / (size / lora_r))
    assert abs(report.lora_rank / lora_r - 1) < 0.3
    assert f"about LoRA r = {report.lora_rank:.2g}" in " ".join(str(report).split())


@pytest.mark.parametrize(("r", "words"), [(2, "256"), (8, "64"), (30, "18"), (256, "2.5")])
def test_a_rank_is_printed_as_a_number_of_columns(r: int, words: str) -> None:
    report = randlora.plan(nn.ModuleDict({"a": nn.Linear(1024, 1024)}), r=r)
    assert f", about LoRA r = {words} in size," in str(report)


@pytest.mark.parametrize(
    ("like_lora", "options", "r"),
    [
        (8, {}, 18),
        (8, {"basis": "block"}, 16),
        (8, {"basis": "block", "blocks": (5, 3)}, 15),
        (40, {"basis": "block"}, 3),  # 8 would be a size of 17
    ],
)
def test_blocks_divide_the_r_that_is_chosen(like_lora: int, options: dict[str, Any], r: int) -> None:
    model = nn.ModuleDict({"a": nn.Linear(256, 256)})
    assert randlora.inject(model, like_lora=like_lora, **options).config.r == r


def test_the_r_that_was_chosen_is_an_option_like_any_other(tmp_path: Path) -> None:
    model = Mixed()
    report = randlora.inject(model, like_lora=2, targets=NAMES)
    assert report == randlora.plan(Mixed(), report.config.r, targets=NAMES)
    randlora.save(model, tmp_path)
    assert randlora.load(Mixed(), tmp_path).config == report.config
    sizes: list[dict[str, Any]] = [{"like_lora": 2}, {"r": report.config.r}]
    memory = [randlora.training_memory(Mixed(), targets=NAMES, **size) for size in sizes]
    assert memory[0] == memory[1]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"like_lora": 2, "r": 4}, ConfigError, "give like_lora= or r=, not both"),
        ({"like_lora": 2, "config": randlora.RandLoRAConfig()}, ConfigError, "like_lora= or config=, which has an r"),
        ({"like_lora": 0}, ConfigError, "must be the rank of a LoRA, a positive integer, got 0"),
        ({"like_lora": True}, ConfigError, "must be the rank of a LoRA, a positive integer, got True"),
        ({"like_lora": 2, "targets": ["norm"]}, TargetError, "norm"),
    ],
)
def test_what_leaves_r_open_or_gives_it_twice_is_an_error(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = Mixed()
    for verb in (randlora.inject, randlora.plan, randlora.training_memory):
        with untouched(model), pytest.raises(kind, match=message):
            verb(model, **options)

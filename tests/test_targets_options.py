"""r and alpha by pattern, and the r that has as many parameters as a LoRA."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import RandLoRAConfig
from randlora.config import LayerOptions
from randlora.errors import ConfigError, TargetError
from randlora.targets.options import listed, options_listed, r_like_lora, ranks_of_others, resolve
from tests import models
from tests.kit import untouched
from tests.laws import Mixed
from tests.test_readers_experts import EXPERTS, mixtral

TARGETS = ("layers.0.attn.q_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj", "layers.1.attn.in_proj_weight")


def test_a_pattern_is_a_name_a_suffix_a_module_or_else_a_regex_in_full() -> None:
    rows: list[tuple[Any, list[int]]] = [
        ({"attn.q_proj": 1, ".*": 7}, [1, 7, 1, 7]),
        ({"attn": 1, ".*": 7}, [1, 7, 1, 1]),
        ({"1": 1, "layers.0.mlp.up_proj": 2, ".*": 7}, [7, 2, 1, 1]),
        ({r".*\.(q|up)_proj": 1, ".*": 7}, [1, 1, 1, 7]),
        ({"layers.1": 4, "q_proj": 8, ".*": 16}, [8, 16, 4, 4]),  # the first that matches applies
        ({"q_proj": 8, "attn": 4, "mlp|.*mlp.*": 2, ".*": 16}, [8, 2, 8, 4]),  # the last finds none left
        ({".*": 4, "q_proj": 4}, [4, 4, 4, 4]),
    ]
    for r, ranks in rows:
        found, problems = resolve(RandLoRAConfig(r=r), TARGETS)
        assert ([found[fqn].r for fqn in TARGETS], problems) == (ranks, [])
    # as a regex, "a.0" matches "a10" too, but not where it is the name of another target
    found, _ = resolve(RandLoRAConfig(r={"a.0": 1, ".*": 2}), ["a.0", "a10", "b.a.0"])
    assert [own.r for own in found.values()] == [1, 2, 1]
    r = {"attn": 4, ".*": 16}
    both, _ = resolve(RandLoRAConfig(r=r, alpha={"layers.0": 2, ".*": 3.5}), TARGETS)  # alpha has patterns of its own
    scaled = [(*own, own.scaling) for own in both.values()]
    assert scaled == [(4, 2.0, 0.5), (16, 2.0, 0.125), (4, 3.5, 0.875), (4, 3.5, 0.875)]
    default, _ = resolve(RandLoRAConfig(r=r), TARGETS)  # 20 r of each layer
    assert [*default.values()] == [(4, 80.0), (16, 320.0), (4, 80.0), (4, 80.0)]
    assert ranks_of_others(RandLoRAConfig(r={"attn": 4, "mlp": 8}), ["0.attn.q", "head"]) == {"0.attn.q": 4, "head": 8}


REFUSED: tuple[tuple[dict[str, Any], list[str]], ...] = (
    (
        {"r": {"q_proj": 4}},
        ["r= has no pattern for model.layers.0.self_attn.k_proj, ", " and 8 more: add '.*' as the last"],
    ),
    ({"r": {"q_prj": 4, ".*": 8}}, ["r={'q_prj': …} matches no target; the nearest names are q_proj"]),
    (
        {"alpha": {"layers.0.mpl": 4, ".*": 8}},
        ["alpha={'layers.0.mpl': …} matches no target; the nearest names are model.layers.0.mlp"],
    ),
    ({"r": {"q_proj(": 4, ".*": 8}}, ["r={'q_proj(': …} is neither", "a regular expression: missing )"]),
    ({"r": {".*": 4, "q_proj": 8}}, ["r={'q_proj': …} matches only what '.*' took", "put it before '.*'"]),
    ({"r": {"x": 4, ".*": 8}, "alpha": {"q_proj": 1}}, ["2 problems", "r={'x': …}", "alpha= has no pattern"]),
)


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_fits_nothing_is_named_before_the_model_changes(options: Any, said: list[str]) -> None:
    model = models.llama()
    for verb in (randlora.plan, randlora.inject):
        with untouched(model), pytest.raises(TargetError) as refused:
            verb(model, targets="all-linear", **options)
        assert all(words in str(refused.value) for words in said)


parts = st.sampled_from(["a", "b", "0", "a.b"])
fqns = st.lists(st.lists(parts, min_size=1, max_size=3).map(".".join), min_size=1, max_size=6, unique=True)


@given(fqns, st.data())
def test_options_listed_by_fqn_are_those_of_each_target_in_whichever_way_they_are_read(
    names: list[str], data: st.DataObject
) -> None:
    """A target's name may be a suffix of another's, or that of a module that another is inside."""
    draw = st.builds(LayerOptions, st.sampled_from([2, 4]), st.sampled_from([1.0, 2.5]))
    options = {fqn: data.draw(draw) for fqn in names}
    config = listed(RandLoRAConfig(r={".*": 1}, alpha={".*": 1}), options)
    assert options_listed(config, names) == options
    assert resolve(config, names) == (options, [])
    config = RandLoRAConfig(r={"a": 4, ".*": 4}, alpha={"a": 2, ".*": 2})
    single = listed(config, {"a": LayerOptions(4, 2.0), "b": LayerOptions(4, 2.0)})
    assert (single.r, single.alpha) == (4, 2.0)  # one value for all is listed as a number


SIDES = st.integers(1, 40)
NAMES = ["q", "up", "down"]


def trained(shape: tuple[int, ...], r: int) -> int:
    """Count Λ and Γ one by one."""
    *stack, rows, columns = shape
    side = min(rows, columns)
    bases = len(range(0, side, r))
    return (stack[0] if stack else 1) * (r * bases + bases * side)


@given(
    st.lists(st.tuples(SIDES, SIDES) | st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=4),
    st.integers(1, 60),
)
def test_no_r_has_a_number_of_parameters_that_is_nearer(shapes: list[tuple[int, ...]], lora_r: int) -> None:
    wanted = sum((shape[0] if len(shape) == 3 else 1) * lora_r * (shape[-2] + shape[-1]) for shape in shapes)
    sizes = {r: sum(trained(shape, r) for shape in shapes) for r in range(1, 1 + max(min(s[-2:]) for s in shapes))}
    nearest = min(abs(size - wanted) for size in sizes.values())
    weights: Any = [SimpleNamespace(shape=shape, shape_with=lambda _, shape=shape: shape) for shape in shapes]
    try:
        found = r_like_lora(weights, lora_r, randlora.RandLoRAConfig())
    except ConfigError:
        near = [size for size in sizes.values() if abs(size - wanted) == nearest]
        assert all(max(size, wanted) > 1.5 * min(size, wanted) for size in near)
    else:
        assert abs(sizes[found] - wanted) == nearest


def test_a_report_has_the_rank_of_a_lora_of_peft_with_as_many_parameters_or_on_all_experts() -> None:
    for experts in ("each", "shared"):
        model: Any = mixtral()
        report = randlora.plan(model, r=2, targets=EXPERTS, experts=experts)
        stacks = [parameter.shape for parameter in model.parameters() if parameter.dim() == 3]
        lora = sum(count * (rows + columns) for count, rows, columns in stacks)
        assert report.lora_rank == pytest.approx(report.trainable_parameters / lora)
    theirs = peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, target_modules=NAMES))
    size, _ = theirs.get_nb_trainable_parameters()
    report = randlora.plan(Mixed(), like_lora=2, targets=NAMES)
    assert report.lora_rank == pytest.approx(report.trainable_parameters / (size / 2))
    assert abs(report.lora_rank / 2 - 1) < 0.3
    for r, words in {2: "256", 8: "64", 30: "18", 256: "2.5"}.items():
        told = randlora.plan(nn.ModuleDict({"a": nn.Linear(1024, 1024)}), r=r)
        assert f", about LoRA r = {words} in size," in str(told)


def test_blocks_divide_the_r_that_is_chosen() -> None:
    for like_lora, options, r in (
        (8, {}, 18),
        (8, {"basis": "block"}, 16),
        (8, {"basis": "block", "blocks": (5, 3)}, 15),
        (40, {"basis": "block"}, 3),  # 8 would be a size of 17
    ):
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


BLOCKS = {"basis": "block", "blocks": (1000003, 999983)}


@pytest.mark.parametrize(
    ("layer", "options", "kind", "message"),
    [
        (nn.Linear(64, 64), {"like_lora": 1000}, ConfigError, "of rank 1 to 32, with r from 64 down to 1"),
        (nn.Embedding(3200, 64), {"like_lora": 32}, ConfigError, "is out of reach"),
        (nn.Linear(64, 64), {"like_lora": 2, **BLOCKS}, ConfigError, "an r that both blocks divide"),
        (nn.Linear(64, 64), {"like_lora": 2, **BLOCKS, "blocks": (128, 3)}, ConfigError, "with r from 384 down to 384"),
        (nn.Linear(64, 64), {"like_lora": 2, "r": 4}, ConfigError, "give like_lora= or r=, not both"),
        (nn.Linear(8, 8), {"like_lora": 2, "config": RandLoRAConfig()}, ConfigError, "or config=, which has an r"),
        (nn.Linear(64, 64), {"like_lora": 0}, ConfigError, "must be the rank of a LoRA, a positive integer, got 0"),
        (nn.Linear(64, 64), {"like_lora": 2, "targets": ["norm"]}, TargetError, "norm"),
    ],
)
def test_a_size_that_no_r_has_or_that_is_given_twice_is_refused(
    layer: nn.Module, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = nn.ModuleDict({"a": layer})
    for verb in (randlora.inject, randlora.plan, randlora.training_memory):
        with untouched(model), pytest.raises(kind, match=message):
            verb(model, **{"targets": ["a"], **options})

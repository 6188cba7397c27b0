"""The config: a frozen value, checked all at once, that survives being written down."""

import copy
import inspect
import json
import pickle
import re
from dataclasses import FrozenInstanceError, fields
from functools import partial
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.config import LARGEST_FACTOR, MEANT, OPTIONS, RandLoRAConfig
from randlora.errors import ConfigError, OptionError
from randlora.targets.options import resolve
from tests.strategies import KINDS_AND_STREAMS, seeds

names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3)
regexes = st.text(max_size=12).map(re.escape)


@st.composite
def configs(draw: st.DrawFn) -> RandLoRAConfig:
    """Draw any config that can be written down."""
    kind, stream = draw(st.sampled_from(KINDS_AND_STREAMS))
    r = draw(st.integers(1, 64))
    divisors = st.sampled_from([size for size in range(1, r + 1) if r % size == 0])
    patterns = st.text(min_size=1, max_size=3)
    alphas = st.integers(-(10**9), 10**9) | st.floats(-LARGEST_FACTOR, LARGEST_FACTOR)
    return RandLoRAConfig(
        r=draw(st.just(r) | st.dictionaries(patterns, st.sampled_from([r, 2 * r]), min_size=1, max_size=3)),
        targets=draw(st.none() | regexes | names),
        exclude=draw(st.none() | regexes | names),
        alpha=draw(st.none() | alphas | st.dictionaries(patterns, alphas, min_size=1, max_size=3)),
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        basis=kind,
        stream=draw(st.sampled_from([stream, None])),
        blocks=draw(st.none() | st.tuples(divisors, divisors)) if kind == "block" else None,
        seed=draw(seeds),
        train_also=draw(st.none() | regexes | names),
    )


@given(configs())
def test_a_config_comes_back_from_its_dict_and_from_json(config: RandLoRAConfig) -> None:
    assert RandLoRAConfig.from_dict(config.to_dict()) == config
    assert RandLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config


def test_numbers_by_pattern_are_copied_and_cannot_be_changed() -> None:
    given_r = {"q": 4, ".*": 2}
    config = RandLoRAConfig(r=given_r)
    given_r["q"] = 8
    assert config.r == {"q": 4, ".*": 2}
    assert repr(config.r) == "{'q': 4, '.*': 2}"
    with pytest.raises(TypeError):
        config.r["q"] = 8  # type: ignore[index]


def test_configs_with_patterns_in_another_order_differ() -> None:
    one, other = RandLoRAConfig(r={"q": 4, ".*": 2}), RandLoRAConfig(r={".*": 2, "q": 4})
    assert one != other
    assert one == RandLoRAConfig(r={"q": 4, ".*": 2})


@given(configs())
def test_a_config_is_a_value(config: RandLoRAConfig) -> None:
    twin = copy.deepcopy(config)
    assert twin == config
    assert hash(twin) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_dict_holds_every_option_and_a_part_of_one_is_enough() -> None:
    later = {name for name, option in OPTIONS.items() if option.since > 1}
    assert later
    assert set(RandLoRAConfig().to_dict()) == {field.name for field in fields(RandLoRAConfig)} - later
    assert RandLoRAConfig.from_dict({"r": 4}) == RandLoRAConfig(r=4)
    assert RandLoRAConfig.from_dict({}) == RandLoRAConfig()


def test_an_unknown_option_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown options lora_alpha, rank: the options are alpha, basis"):
        RandLoRAConfig.from_dict({"rank": 4, "lora_alpha": 8, "r": 4})


OPTION_NAMES = [field.name for field in fields(RandLoRAConfig)]


def called(verb: Any, **options: Any) -> Any:
    return verb(**options) if verb is RandLoRAConfig else verb(nn.Sequential(nn.Linear(6, 4)), **options)


every_verb = pytest.mark.parametrize(
    "verb", [randlora.inject, randlora.plan, RandLoRAConfig], ids=lambda verb: verb.__name__
)


@every_verb
@given(option=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1).filter(lambda name: name not in MEANT))
def test_any_other_unknown_option_is_answered_with_ours_and_is_a_type_error(verb: Any, option: str) -> None:
    known = set(inspect.signature(verb).parameters)
    assume(option not in known)
    with pytest.raises(TypeError, match=f"unknown option {option}=: ") as caught:
        called(verb, **{option: 1})
    assert isinstance(caught.value, ConfigError)
    answer = str(caught.value).rsplit("=: ", 1)[1]
    assert set(re.sub("the nearest options are |the options are ", "", answer).split(", ")) <= known


@every_verb
def test_a_misspelled_option_is_answered_with_the_nearest(verb: Any) -> None:
    with pytest.raises(OptionError, match="unknown option dropot=: the nearest options are dropout"):
        called(verb, dropot=0.5)


def test_all_unknown_options_are_answered_at_once_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(OptionError, match="cannot call inject, 2 problems:") as caught:
        randlora.inject(model, rank=4, lora_alpha=8)  # type: ignore[call-arg]
    assert "use r=" in str(caught.value)
    assert "use alpha=" in str(caught.value)
    assert randlora.adapters(model) == []


def test_a_type_checker_and_help_see_every_option() -> None:
    assert list(inspect.signature(RandLoRAConfig).parameters) == OPTION_NAMES
    for verb in (randlora.inject, randlora.plan):
        assert set(OPTION_NAMES) < set(inspect.signature(verb).parameters)
        kinds = {parameter.kind for parameter in inspect.signature(verb).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_inject_has_every_option_of_the_table_with_its_type_its_default_and_a_line() -> None:
    parameters = inspect.signature(randlora.inject, eval_str=True).parameters
    assert [name for name in parameters if name in OPTIONS] == [*OPTIONS]
    for name, option in OPTIONS.items():
        if name != "r":  # of which like_lora= needs to know whether it is given
            assert (parameters[name].annotation, parameters[name].default) == (option.type, option.default)
        for documented in (randlora.inject, RandLoRAConfig):
            assert re.search(rf"^ +{name}: [A-Z`]", documented.__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("field", [field.name for field in fields(RandLoRAConfig)])
def test_a_config_cannot_be_written_to(field: str) -> None:
    config = RandLoRAConfig()
    with pytest.raises(FrozenInstanceError):
        setattr(config, field, getattr(config, field))


def test_options_are_given_by_name_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        RandLoRAConfig(4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "alpha", "scaling"),
    [
        ({}, 640.0, 20.0),
        ({"r": 6}, 120.0, 20.0),
        ({"r": 6, "alpha": 3}, 3.0, 0.5),
        ({"r": 4, "alpha": 0}, 0.0, 0.0),
        ({"r": 4, "alpha": -2.0}, -2.0, -0.5),
    ],
    ids=["default", "rank", "alpha", "zero", "negative"],
)
def test_the_update_is_scaled_by_alpha_over_r_with_20_r_as_the_default(
    options: dict[str, Any], alpha: float, scaling: float
) -> None:
    resolved, problems = resolve(RandLoRAConfig(**options), ["a"])
    assert problems == []
    assert (resolved["a"].alpha, resolved["a"].scaling) == (alpha, scaling)


def predicate(fqn: str, module: nn.Module) -> bool:
    return True


GOOD: list[dict[str, Any]] = [
    {"r": 1},
    {"r": 2**20},
    {"r": {"q": 4, ".*": 2}, "alpha": {".*": -0.5}},
    {"r": {"(": 4}},  # which may be a name
    {"r": {"a": 4, ".*": 12}, "basis": "block", "blocks": (4, 2)},
    {"alpha": 0},
    {"alpha": -1.5},
    {"alpha": LARGEST_FACTOR},
    {"dropout": 0},
    {"dropout": 1 - 2**-53},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"basis": "block", "stream": "portable"},
    {"basis": "block", "r": 12, "blocks": (3, 4)},
    {"basis": "block", "r": 12, "blocks": (12, 1)},
    {"targets": "all-linear"},
    {"targets": ""},
    {"targets": predicate, "exclude": partial(predicate)},
    {"targets": ["q"], "exclude": ("k",), "train_also": ["head"]},
]


@pytest.mark.parametrize(
    "options", GOOD, ids=[f"good-{index}-{'-'.join(options)}" for index, options in enumerate(GOOD)]
)
def test_values_at_the_edge_are_accepted(options: dict[str, Any]) -> None:
    config = RandLoRAConfig(**options)
    assert {name: getattr(config, name) for name in options} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r must be a positive integer of at most 1048576, got 0"),
    ({"r": -1}, "r must be a positive integer of at most 1048576, got -1"),
    ({"r": 4.0}, "r must be an integer or a mapping, got 4.0"),
    ({"r": "4"}, "r must be an integer or a mapping, got '4'"),
    ({"r": True}, "r must be an integer or a mapping, got True"),
    ({"r": None}, "r must be an integer or a mapping, got None"),
    ({"r": 2**20 + 1}, "r must be a positive integer of at most 1048576, got 1048577"),
    (
        {"r": {"q": 10**5000, ".*": 4}},
        "r['q'] must be a positive integer of at most 1048576, got an integer of 16610 bits",
    ),
    ({"r": {}}, "r must have patterns that are names or regexes, got {}"),
    ({"r": {"q": 0}}, "r['q'] must be a positive integer of at most 1048576, got 0"),
    ({"r": {"q": 4, ".*": True}}, "r['.*'] must be an integer, got True"),
    ({"r": {"": 4}}, "r must have patterns that are names or regexes, got {'': 4}"),
    ({"r": {4: 4}}, "a name in r must be a string, got 4"),
    ({"r": {"q": {"k": 4}}}, "r['q'] must be an integer, got {'k': 4}"),
    ({"alpha": {"q": None}}, "alpha['q'] must be a finite number, got None"),
    ({"alpha": {}}, "alpha must have patterns that are names or regexes, got {}"),
    ({"r": {"a": 4, ".*": 6}, "basis": "block", "blocks": (4, 2)}, "both of blocks (4, 2) must divide r=6"),
    ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
    ({"alpha": float("inf")}, "alpha must be a finite number, got inf"),
    ({"alpha": 10**400}, "alpha must be a finite number"),
    ({"alpha": 1e16}, "alpha must be a number of at most 1e+15 in size, got 1e+16"),
    ({"alpha": "16"}, "alpha must be a finite number, a mapping or None, got '16'"),
    ({"alpha": True}, "alpha must be a finite number, a mapping or None, got True"),
    ({"alpha": 1j}, "alpha must be a finite number, a mapping or None, got 1j"),
    ({"dropout": 1}, "dropout must be a number in [0, 1), got 1"),
    ({"dropout": -0.1}, "dropout must be a number in [0, 1), got -0.1"),
    ({"dropout": float("nan")}, "dropout must be a finite number, got nan"),
    ({"dropout": None}, "dropout must be a finite number, got None"),
    ({"dropout": False}, "dropout must be a finite number, got False"),
    ({"seed": -1}, "seed must be an integer in [0, 2**64), got -1"),
    ({"seed": 2**64}, "seed must be an integer in [0, 2**64), got 18446744073709551616"),
    ({"seed": 0.0}, "seed must be an integer, got 0.0"),
    ({"seed": True}, "seed must be an integer, got True"),
    ({"seed": None}, "seed must be an integer, got None"),
    ({"basis": "gauss"}, "basis must be one of dense, sparse, very_sparse, block, got 'gauss'"),
    ({"basis": None}, "basis must be one of dense, sparse, very_sparse, block, got None"),
    ({"basis": ["dense"]}, "basis must be one of dense, sparse, very_sparse, block, got ('dense',)"),
    ({"stream": "numpy"}, "stream must be one of torch, torch-2.11, portable or None, got 'numpy'"),
    ({"basis": "block", "stream": "torch"}, "basis 'block' needs stream 'portable', got 'torch'"),
    ({"basis": "block", "stream": "torch-2.11"}, "basis 'block' needs stream 'portable', got 'torch-2.11'"),
    (
        {"basis": "sparse", "stream": "torch-2.11"},
        "stream 'torch-2.11' is for basis 'dense': every torch draws the same",
    ),
    ({"blocks": (2, 2)}, "blocks (2, 2) need basis 'block', got 'dense'"),
    ({"basis": "sparse", "blocks": (1, 1)}, "blocks (1, 1) need basis 'block', got 'sparse'"),
    ({"basis": "block", "r": 8, "blocks": (3, 2)}, "both of blocks (3, 2) must divide r=8"),
    ({"basis": "block", "r": 8, "blocks": (2, 3)}, "both of blocks (2, 3) must divide r=8"),
    ({"basis": "block", "r": 8, "blocks": (16, 1)}, "both of blocks (16, 1) must divide r=8"),
    ({"basis": "block", "blocks": (0, 2)}, "blocks must be two positive integers (c, b), got (0, 2)"),
    ({"basis": "block", "blocks": (2, -2)}, "blocks must be two positive integers (c, b), got (2, -2)"),
    ({"basis": "block", "blocks": (2,)}, "blocks must have 2 entries, got 1"),
    ({"basis": "block", "blocks": (2, 2, 2)}, "blocks must have 2 entries, got 3"),
    ({"basis": "block", "blocks": (2, True)}, "blocks[1] must be an integer, got True"),
    ({"basis": "block", "blocks": (2.0, 2)}, "blocks[0] must be an integer, got 2.0"),
    ({"basis": "block", "blocks": 2}, "blocks must be a list or None, got 2"),
    ({"basis": "block", "blocks": "22"}, "blocks must be a list or None, got '22'"),
    (
        {"targets": "("},
        "targets must be a valid regular expression (missing ), ",
    ),
    ({"exclude": "*"}, "exclude must be a valid regular expression (nothing to repeat at position 0), got '*'"),
    (
        {"train_also": "[a"},
        "train_also must be a valid regular expression (unterminated character set",
    ),
    ({"targets": []}, "targets must be at least one name, and no empty names, got ()"),
    ({"exclude": ()}, "exclude must be at least one name, and no empty names, got ()"),
    ({"train_also": []}, "train_also must be at least one name, and no empty names, got ()"),
    ({"targets": [""]}, "targets must be at least one name, and no empty names, got ('',)"),
    ({"targets": ["q", 3]}, "targets[1] must be a string, got 3"),
    ({"targets": {"q", 3}}, "targets[0] must be a string, got 3"),
    ({"targets": [["q"]]}, "targets[0] must be a string, got ['q']"),
    ({"targets": 3}, "targets must be a string, a sequence, a function or None, got 3"),
    ({"exclude": {"q": 1}}, "exclude must be a string, a sequence, a function or None, got {'q': 1}"),
    ({"train_also": predicate}, "train_also must be a string, a sequence or None, got <function"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD, ids=[f"bad-{index}-{'-'.join(options)}" for index, (options, _) in enumerate(BAD)]
)
def test_a_value_that_cannot_work_is_named_with_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cannot configure RandLoRA: {message}")):
        RandLoRAConfig(**options)


FROM_DICT: list[tuple[dict[str, Any], str]] = [
    ({"basis": "block", "blocks": 5}, "blocks must be a list or None"),
    ({"basis": "block", "blocks": "22"}, "blocks must be a list or None"),
    ({"basis": "block", "blocks": ["2", "2"]}, "must be an integer"),
    ({"r": None}, "r must be an integer or a mapping"),
    ({"r": []}, "r must have patterns that are names or regexes"),
    ({"r": [["q", 0]]}, r"r\['q'\] must be a positive integer"),
    ({"r": [[["q"], 4]]}, "r must be an integer or a mapping"),
    ({"alpha": ["qk"]}, "alpha must be a finite number"),
]


@pytest.mark.parametrize(("values", "message"), FROM_DICT, ids=[f"dict-{index}" for index in range(len(FROM_DICT))])
def test_a_dict_with_a_value_that_cannot_work_is_refused_the_same_way(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandLoRAConfig.from_dict(values)


BAD_VALUES: dict[str, Any] = {
    "r": 0,
    "targets": "(",
    "exclude": [],
    "alpha": float("nan"),
    "dropout": 2,
    "basis": "gauss",
    "stream": "numpy",
    "blocks": (0, 2),
    "seed": -1,
    "train_also": "*",
}


def test_all_values_that_cannot_work_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RandLoRAConfig(**BAD_VALUES)
    first, *problems = str(caught.value).splitlines()
    assert first == "cannot configure RandLoRA, 10 problems:"
    assert [problem.removeprefix("  - ").split(" ")[0] for problem in problems] == [*BAD_VALUES]


def test_a_bad_rank_is_not_blamed_on_the_blocks() -> None:
    with pytest.raises(ConfigError, match=r"^cannot configure RandLoRA: r must be a positive [^\n]*, got 0$"):
        RandLoRAConfig(r=0, basis="block", blocks=(2, 2))


@pytest.mark.parametrize("collection", [list, tuple, set, frozenset], ids=lambda kind: kind.__name__)
def test_any_collection_of_names_becomes_a_tuple(collection: Any) -> None:
    config = RandLoRAConfig(targets=collection(["k", "q"]), exclude=collection(["v"]), train_also=collection(["head"]))
    assert (config.targets, config.exclude, config.train_also) == (("k", "q"), ("v",), ("head",))


def test_a_list_of_blocks_becomes_a_tuple() -> None:
    assert RandLoRAConfig(basis="block", r=8, blocks=[2, 4]).blocks == (2, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "name"),
    [(RandLoRAConfig(targets=predicate), "targets"), (RandLoRAConfig(exclude=predicate), "exclude")],
    ids=["targets", "exclude"],
)
def test_a_callable_cannot_be_written_down(config: RandLoRAConfig, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is a callable, which cannot be serialized: give the layers'"):
        config.to_dict()


@pytest.mark.parametrize("verb", [randlora.inject, randlora.plan], ids=lambda verb: verb.__name__)
def test_a_config_is_not_changed_by_being_used(verb: Any) -> None:
    config = RandLoRAConfig(r=2, targets=["0"], exclude=lambda *_: False, train_also=["1"])
    before = {field.name: getattr(config, field.name) for field in fields(config)}
    report = verb(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), config=config)
    assert report.config is config
    assert all(getattr(config, name) is value for name, value in before.items())


def test_an_option_that_the_first_format_lacks_is_written_only_where_it_was_chosen() -> None:
    chosen = RandLoRAConfig(in_proj="split", experts="shared")
    assert chosen.to_dict() == {**RandLoRAConfig().to_dict(), "in_proj": "split", "experts": "shared"}
    assert RandLoRAConfig.from_dict(chosen.to_dict()) == chosen


@pytest.mark.parametrize(("option", "value"), [("in_proj", "three"), ("experts", 8), ("experts", None)])
def test_what_is_no_choice_is_answered_with_the_choices(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{option} must be one of \w+, \w+, got {value!r}"):
        RandLoRAConfig(**{option: value})  # type: ignore[arg-type]

"""The config: a frozen value, checked all at once, that survives being written down."""

import copy
import inspect
import json
import pickle
import re
from dataclasses import FrozenInstanceError, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.checkpoint.header import NEWEST
from randlora.config import LARGEST_FACTOR, OPTIONS, RandLoRAConfig
from randlora.errors import ConfigError, OptionError
from tests.hostile_files import read_facts
from tests.strategies import KINDS_AND_STREAMS, seeds

OPTION_NAMES = [field.name for field in fields(RandLoRAConfig)]
names = st.none() | st.text(max_size=12).map(re.escape) | st.lists(st.text(min_size=1), min_size=1, max_size=3)


@st.composite
def configs(draw: st.DrawFn) -> RandLoRAConfig:
    kind, stream = draw(st.sampled_from(KINDS_AND_STREAMS))
    r = draw(st.integers(1, 64))
    divisors = st.sampled_from([size for size in range(1, r + 1) if r % size == 0])
    patterns = st.text(min_size=1, max_size=3)
    named: dict[str, Any] = {name: draw(names) for name in ("targets", "exclude", "train_also")}
    alphas = st.integers(-(10**9), 10**9) | st.floats(-LARGEST_FACTOR, LARGEST_FACTOR)
    return RandLoRAConfig(
        r=draw(st.just(r) | st.dictionaries(patterns, st.sampled_from([r, 2 * r]), min_size=1, max_size=3)),
        alpha=draw(st.none() | alphas | st.dictionaries(patterns, alphas, min_size=1, max_size=3)),
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        basis=kind,
        stream=draw(st.sampled_from([stream, None])),
        blocks=draw(st.none() | st.tuples(divisors, divisors)) if kind == "block" else None,
        seed=draw(seeds),
        **named,
    )


@given(configs())
def test_a_config_is_a_value(config: RandLoRAConfig) -> None:
    assert RandLoRAConfig.from_dict(config.to_dict()) == config
    assert RandLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config
    assert hash(copy.deepcopy(config)) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config


def test_nothing_of_a_config_can_be_changed_and_its_dict_has_later_options_where_they_were_chosen() -> None:
    given_r = {"0": 4, ".*": 2}
    config = RandLoRAConfig(r=given_r, exclude=lambda *_: False, train_also=["1"])
    held = {name: getattr(config, name) for name in OPTION_NAMES}
    given_r["0"] = 8
    assert repr(config.r) == "{'0': 4, '.*': 2}"
    with pytest.raises(TypeError):
        config.r["0"] = 8  # type: ignore[index]
    for name, value in held.items():
        with pytest.raises(FrozenInstanceError):
            setattr(config, name, value)
    for verb in (randlora.plan, randlora.inject):
        assert verb(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), config=config).config is config
    assert all(getattr(config, name) is value for name, value in held.items())
    assert RandLoRAConfig(r={"q": 4, ".*": 2}) != RandLoRAConfig(r={".*": 2, "q": 4})
    later = {name for name, option in OPTIONS.items() if option.since > 1}
    first = read_facts(Path(__file__).parent / "data" / "golden_v1")["config"]
    assert first.keys() == {*OPTION_NAMES} - later, "the first readers call others damaged: give a new option since="
    assert max(option.since for option in OPTIONS.values()) <= NEWEST
    assert set(RandLoRAConfig().to_dict()) == first.keys()
    chosen = RandLoRAConfig(in_proj="split", experts="shared")
    assert chosen.to_dict() == {**RandLoRAConfig().to_dict(), "in_proj": "split", "experts": "shared"}
    assert RandLoRAConfig.from_dict({"r": 4, "experts": "shared"}) == RandLoRAConfig(r=4, experts="shared")


def test_unknown_options_are_answered_at_once_with_ours() -> None:
    with pytest.raises(ConfigError, match=r"unknown options lora_alpha, rank: the options are alpha, basis"):
        RandLoRAConfig.from_dict({"rank": 4, "lora_alpha": 8, "r": 4})
    verb: Any = partial(randlora.inject, nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(OptionError, match="unknown option dropot=: the nearest options are dropout"):
        verb(dropot=0.5)
    with pytest.raises(TypeError, match="unknown option x_y=: the options are"):
        verb(x_y=1)


def test_signatures_have_every_option_of_the_table_with_its_type_its_default_and_a_line() -> None:
    own = inspect.signature(RandLoRAConfig).parameters
    assert ([*own], {each.kind for each in own.values()}) == (OPTION_NAMES, {inspect.Parameter.KEYWORD_ONLY})
    assert {*OPTION_NAMES} < set(inspect.signature(randlora.plan).parameters)
    parameters = inspect.signature(randlora.inject, eval_str=True).parameters
    assert [name for name in parameters if name in OPTIONS] == [*OPTIONS]
    for name, option in OPTIONS.items():
        if name != "r":  # of which like_lora= needs to know whether it is given
            assert (parameters[name].annotation, parameters[name].default) == (option.type, option.default)
        for documented in (randlora.inject, RandLoRAConfig):
            assert re.search(rf"^ +{name}: [A-Z`]", documented.__doc__ or "", re.MULTILINE)


def predicate(fqn: str, module: nn.Module) -> bool:
    return True


def test_values_at_the_edge_are_accepted_and_collections_become_tuples() -> None:
    good: list[dict[str, Any]] = [
        {"r": 1, "alpha": -1.5, "seed": 2**64 - 1, "dropout": 1 - 2**-53, "targets": ""},
        {"r": 2**20, "alpha": LARGEST_FACTOR, "seed": 0, "dropout": 0},
        {"r": {"(": 4}, "alpha": {".*": -0.5}},  # which may be a name
        {"r": {"a": 4, ".*": 12}, "basis": "block", "blocks": (4, 2)},
        {"r": 12, "alpha": 0, "basis": "block", "stream": "portable", "blocks": [12, 1]},
        {"targets": predicate, "exclude": partial(predicate)},
        {"targets": ["q"], "exclude": ("k",), "train_also": ["head"]},
    ]
    for options in good:
        config = RandLoRAConfig(**options)
        assert {name: getattr(config, name) for name in options} == {
            name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
        }
    assert RandLoRAConfig(targets={"q", "k"}).targets == ("k", "q")  # type: ignore[arg-type]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"r": 0, "basis": "block", "blocks": (2, 2)}, "r must be a positive integer of at most 1048576, got 0"),
    ({"r": 2**20 + 1}, "r must be a positive integer of at most 1048576, got 1048577"),
    ({"r": 4.0}, "r must be an integer or a mapping, got 4.0"),
    ({"r": {"q": 10**5000}}, "r['q'] must be a positive integer of at most 1048576, got a int"),
    ({"r": {}}, "r must have patterns that are names or regexes, got {}"),
    ({"r": {"": 4}}, "r must have patterns that are names or regexes, got {'': 4}"),
    ({"r": {"q": 4, ".*": True}}, "r['.*'] must be an integer, got True"),
    (
        {"r": {"a": 4, ".*": 6}, "basis": "block", "blocks": (4, 2)},
        "both numbers of blocks must divide r=6, got 4 and 2",
    ),
    ({"alpha": {"q": None}}, "alpha['q'] must be a finite number, got None"),
    ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
    ({"alpha": -1e16}, "alpha must be a number of at most 1e+15 in size, got -1e+16"),
    ({"dropout": 1}, "dropout must be a number in [0, 1), got 1"),
    ({"dropout": -0.1}, "dropout must be a number in [0, 1), got -0.1"),
    ({"seed": -1}, "seed must be an integer in [0, 2**64), got -1"),
    ({"seed": 2**64}, "seed must be an integer in [0, 2**64), got 18446744073709551616"),
    ({"basis": ["dense"]}, "basis must be one of dense, sparse, very_sparse, block, got ('dense',)"),
    ({"stream": "numpy"}, "stream must be one of torch, torch-2.11, portable or None, got 'numpy'"),
    ({"in_proj": "three"}, "in_proj must be one of packed, split, got 'three'"),
    ({"experts": None}, "experts must be one of each, shared, got None"),
    ({"basis": "block", "stream": "torch"}, 'basis="block" has no stream="torch": omit stream'),
    ({"basis": "sparse", "stream": "torch-2.11"}, 'stream="torch-2.11" is for basis="dense": every torch draws'),
    ({"blocks": (2, 2)}, "blocks needs basis=\"block\", got 'dense'"),
    ({"basis": "block", "r": 8, "blocks": (16, 1)}, "both numbers of blocks must divide r=8, got 16 and 1"),
    ({"basis": "block", "blocks": (0, 2)}, "blocks must be two positive integers (c, b), got (0, 2)"),
    ({"basis": "block", "blocks": (2,)}, "blocks must have 2 entries, got 1"),
    ({"basis": "block", "blocks": "22"}, "blocks must be a list or None, got '22'"),
    ({"targets": "("}, "targets must be a valid regular expression (missing ), "),
    ({"exclude": ()}, "exclude must be at least one name, and no empty names, got ()"),
    ({"targets": [""]}, "targets must be at least one name, and no empty names, got ('',)"),
    ({"exclude": {"q": 1}}, "exclude must be a string, a sequence, a function or None, got {'q': 1}"),
    ({"train_also": predicate}, "train_also must be a string, a sequence or None, got <function"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_value_that_cannot_work_is_named_with_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cannot configure RandLoRA: {message}")):
        RandLoRAConfig(**options)


def test_all_values_that_cannot_work_are_named_at_once_and_callables_are_not_written_down() -> None:
    bad: dict[str, Any] = {"r": 0, "targets": "(", "exclude": [], "alpha": float("nan"), "dropout": 2}
    bad |= {"basis": "gauss", "stream": "numpy", "blocks": (0, 2), "seed": -1, "train_also": "*"}
    with pytest.raises(ConfigError, match=r"^cannot configure RandLoRA, 10 problems:") as caught:
        RandLoRAConfig(**bad)
    assert re.findall(r"^  - (\w+)", str(caught.value), re.MULTILINE) == [*bad]
    for name in ("targets", "exclude"):
        with pytest.raises(ConfigError, match=f"{name} is a callable, which cannot be serialized: give the layers'"):
            RandLoRAConfig(**{name: predicate}).to_dict()  # type: ignore[arg-type]
    for value, message in (([], "r must have patterns"), ([["q", 0]], "must be a positive"), ([[["q"], 4]], "mapping")):
        with pytest.raises(ConfigError, match=message):
            RandLoRAConfig.from_dict({"r": value})

"""A new adapter whose update is exactly a weighted sum of others, or an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import randlora
from randlora.errors import AdapterError
from randlora.serving import combine
from randlora.state import adapted_root
from tests.kit import adapt, adapter_values, all_bits, bits, fill, set_alpha, untouched
from tests.laws import TOKENS, Mixed, assert_close, diagonals
from tests.read_kinds import READ_KINDS, ReadKind

FACTORS = {"a": 0.7, "b": -0.3}
FORMS = "Embedding", "Conv2d-groups", "attention-in_proj-split", "experts-down-square-batched", "Linear-other-forward"


def two(model: nn.Module, *, equal: str | None = "gamma", **options: Any) -> nn.Module:
    for seed, (name, alpha) in enumerate({"a": 6, "b": 9}.items()):
        adapt(model, values=seed, name=name, **{"r": 3, "alpha": alpha, "stream": "portable", **options})
    for name, value in dict(model.named_parameters()).items():
        if equal and f"randlora_{equal}.b" in name:
            value.data = model.get_parameter(name.removesuffix("b") + "a").data * -2
    return model


def assert_is_sum(
    model: nn.Module, name: str, factors: dict[str, float], *fqns: str, dtype: Any = torch.float32
) -> None:
    for fqn in fqns:
        parts = (f * randlora.delta_weight(model, fqn, name=one).double() for one, f in factors.items())
        assert_close(randlora.delta_weight(model, fqn, name=name), sum(parts, torch.zeros(())), dtype)


@pytest.mark.parametrize("equal", ["gamma", "lambda"])
@pytest.mark.parametrize("kind", [kind for kind in READ_KINDS if kind.name in FORMS], ids=lambda kind: kind.name)
def test_the_sum_is_exact_where_one_of_both_is_the_same(kind: ReadKind, equal: str) -> None:
    dtype = kind.dtypes[0]
    model = two(kind.model(dtype), **{**kind.adapter_options, "alpha": 7}, equal=equal).to(dtype)
    combine(model, FACTORS, name="c")
    assert_is_sum(model, "c", FACTORS, kind.target, dtype=dtype)
    randlora.activate(model, FACTORS)
    expected = kind.run(model, dtype)
    randlora.activate(model, "c")
    assert_close(kind.run(model, dtype), expected, dtype)


def test_what_is_not_trained_adds_nothing_and_a_sum_of_it_can_be_trained() -> None:
    model = nn.Sequential(nn.Linear(9, 14))
    for name, init in {"a": "gamma", "b": "gamma", "c": "lambda"}.items():
        randlora.inject(model, r=3, name=name, init=init)  # type: ignore[arg-type]
    combine(model, {"a": 1.0, "b": 0.5}, name="none")
    assert sum(bool(part.any()) for part in diagonals(model[0], "none")) == 1
    assert adapted_root(model)[1].adapters["none"].config.alpha is None
    fill(model, "c")
    combine(model, {"c": 2.0, "a": 1.0}, name="d")
    assert_is_sum(model, "d", {"c": 2.0}, "0")


def test_the_new_adapter_is_reported_and_saves_and_loads_like_any_other(tmp_path: Path) -> None:
    model = two(Mixed(), targets=["q", "up"])
    before = all_bits(adapter_values(model, "a")) | all_bits(adapter_values(model, "b"))
    made = combine(model, FACTORS, name="c")
    assert (made.name, made.rule, made.is_active, made.is_trainable) == ("c", "the sum 0.7·a + -0.3·b", False, False)
    assert len({info.specs for info in randlora.adapters(model)}) == len(adapted_root(model)[1].bank) == 1
    assert all_bits(adapter_values(model, "a")) | all_bits(adapter_values(model, "b")) == before
    report = randlora.save(model, tmp_path, name="c")
    assert not [note for note in report.notes if "combined" in note]
    twin = Mixed()
    twin.load_state_dict(model.state_dict(), strict=False)
    randlora.load(twin, tmp_path, name="c")
    assert all_bits(adapter_values(twin, "c")) == all_bits(adapter_values(model, "c"))
    randlora.activate(model, "c")
    assert bits(twin(TOKENS)) == bits(model(TOKENS))
    combine(model, {"a": 0.0}, name="none")
    own, made_of_none = adapter_values(model, "a"), adapter_values(model, "none")
    for name, value in own.items():
        if "randlora" in name:
            assert bits(made_of_none[name]) == bits(value * 0.0 + 0.0 if name.endswith("lambda") else value)


def test_layers_and_options_are_those_of_all_the_adapters() -> None:
    model: Any = Mixed()
    randlora.inject(model, r=4, name="a", targets=["q"], alpha=5, stream="portable")
    randlora.inject(model, {"up": 2, ".*": 4}, name="b", targets=["up", "down"], stream="portable")
    model.double()
    fill(model, "a", seed=1), fill(model, "b", seed=2)
    made = combine(model, FACTORS, name="c")
    assert made.targets == ("q", "up", "down")
    adapter = adapted_root(model)[1].adapters["c"]
    assert (adapter.config.targets, adapter.config.train_also) == (("q", "up", "down"), None)
    assert adapter.options == {"q": (4, 5.0), "up": (2, 40.0), "down": (4, 80.0)}
    assert_is_sum(model, "c", {"a": 0.7}, "q")  # each exact that one adapter has alone
    assert_is_sum(model, "c", {"b": -0.3}, "up", "down")


def test_bases_grow_with_the_layers_of_the_sum_where_they_can() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(20, 20))
    for stream in ("torch", "portable"):
        for fqn, name in (("0", f"small-{stream}"), ("1", f"large-{stream}")):
            adapt(model, r=2, targets=[fqn], name=name, stream=stream)
    with untouched(model), pytest.raises(AdapterError, match=r"is on .*20x20.*, and 'small-torch' on .*6x6"):
        combine(model, {"small-torch": 1, "large-torch": 0.5}, name="c")
    combine(model, {"small-portable": 1, "large-portable": 0.5}, name="c")
    assert_is_sum(model, "c", {"small-portable": 1}, "0")
    assert_is_sum(model, "c", {"large-portable": 0.5}, "1")


def crowded() -> nn.Module:
    """Add adapters that go together with none of the others; "near" has nearly the values of "a"."""
    model = two(Mixed())
    options: dict[str, dict[str, Any]] = {
        "both": {"r": 3, "alpha": 9},
        "near": {"r": 3, "alpha": 6},
        "seed": {"r": 3, "alpha": 3, "seed": 5},
        "r": {"r": 4, "targets": ["q"]},
        "dropping": {"r": 4, "targets": ["q"], "dropout": 0.5},
        "read": {"r": 4, "targets": ["embed"]},
        "beside": {"r": 4, "targets": ["up"], "train_also": ["q.weight"]},
        "off": {"r": 4, "targets": ["q"]},
        "elsewhere": {"r": 2, "targets": ["up"], "seed": 1},
    }
    for seed, (name, own) in enumerate(options.items()):
        adapt(model, values=seed + 2, name=name, stream="portable", **own)
    for name, value in adapter_values(model, "a").items():
        model.get_parameter(f"{name}.near").data = value.data * (1 + 1e-4 * torch.rand_like(value))
    set_alpha(model, 0, "off")
    diagonals(model.get_submodule("q"), "r")[0].data[0, 0] = 1e37
    return model


def attention() -> nn.Module:
    model = nn.Sequential(nn.MultiheadAttention(12, 2))
    randlora.inject(model, r=3, name="a", targets=["0.in_proj_weight"])
    randlora.inject(model, r=3, name="b", targets=["0.in_proj_weight"], in_proj="split")
    return model


def merged() -> nn.Module:
    randlora.merge(model := two(Mixed()), reversible=True)
    return model


def without_values() -> nn.Module:
    with torch.device("meta"):
        return two(Mixed())


def pruned() -> nn.Module:
    model = Mixed()
    randlora.inject(model, r=3, name="a", train_also=["head"])
    prune.identity(model.head, "weight")
    return model


INSTEAD = ".*activate the adapters with factors, which is exact, or merge one after the other"
REFUSED: list[tuple[Any, Any, str]] = [
    ({"a": 0.7, "both": -0.3}, "c", f"exactly this sum in q, up, down, where both Λ and Γ differ{INSTEAD}"),
    ({"a": 0.7, "near": -0.3}, "c", "exactly this sum"),
    ({"a": 1, "seed": 0.1}, "c", rf"'seed' is on .*seed=5.*, and 'a' on .*seed=0{INSTEAD}"),
    ({"a": 1, "r": 0.1}, "c", f"a and r have r=3 and 4 in q{INSTEAD}"),
    ({"dropping": 1, "read": 1}, "c", r"embed is a weight that other code reads, and dropout=0\.5 cannot"),
    (
        {"dropping": 1, "beside": 1},
        "c",
        r"'beside' trained q\.weight with train_also or train_rows, which combine does not sum",
    ),
    ({"off": 1, "dropping": 1}, "c", "'off' has alpha=0 in q"),
    ({"dropping": 1, "elsewhere": 1}, "c", r"'elsewhere' is on .*seed=1.*, but 'dropping' has no such bases"),
    ({"a": 1, "x": 1}, "c", "no adapter named 'x': it has a, b"),
    ({"a": float("nan")}, "c", "must be a finite number, got nan"),
    ("a", "c", "expected a mapping from names"),
    ({}, "c", "expected a mapping from names"),
    ({"a": 1}, "b", "the model has an adapter of that name"),
    ({"a": 1}, 3, "an adapter named 3: expected a printable name"),
    ({"r": 1e5}, "c", "would not be finite in q"),
]
STATES: list[tuple[Callable[[], nn.Module], Any, str]] = [
    (merged, {"b": 1}, "while the adapters are merged"),
    (without_values, {"a": 1}, r"has no values \(meta or fake\)"),
    (pruned, {"a": 1}, "head.weight, which adapter 'a' trains, is no longer in the model"),
    (attention, {"a": 1, "b": 1}, r"'b' adapts 0.in_proj_weight as 3 x 12 x 12, and one like 'a' as 36 x 12"),
]


def test_what_no_such_adapter_could_have_is_refused_and_changes_nothing() -> None:
    model = crowded()
    for adapters, name, message in REFUSED:
        with untouched(model), pytest.raises(AdapterError, match=message):
            combine(model, adapters, name=name)
    for build, adapters, message in STATES:
        model = build()
        with untouched(model), pytest.raises(AdapterError, match=message):
            combine(model, adapters, name="c")

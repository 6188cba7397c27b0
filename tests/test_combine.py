"""A new adapter whose update is a weighted sum of others: exact where there is one, else near, with its error."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, ConfigError, RandLoRAError
from randlora.functional.combined import DenseBases, Factors, fitted, summed
from tests.kit import adapter_values, all_bits, bits, fill, set_alpha, untouched
from tests.laws import TOKENS, Mixed, assert_close, diagonals
from tests.layer_kinds import LayerKind, every_kind
from tests.read_kinds import ReadKind, every_read_kind

FACTORS = {"a": 0.7, "b": -0.3}


def two(model: nn.Module, *, equal: str | None = "gamma", **options: Any) -> nn.Module:
    """Add two adapters with values as after some training, all but one of Λ and Γ: of that both have multiples."""
    for seed, (name, alpha) in enumerate({"a": 6, "b": 9}.items()):
        randlora.inject(model, name=name, **{"r": 3, "alpha": alpha, "stream": "portable", **options})
        fill(model, name, seed=seed)
    for name, value in dict(model.named_parameters()).items():
        if equal and f"randlora_{equal}.b" in name:
            value.data = model.get_parameter(name.removesuffix("b") + "a").data * -2
    return model


def wanted(model: nn.Module, fqn: str, factors: dict[str, float]) -> Tensor:
    """Sum the updates of some adapters that have a layer."""
    return sum(
        (f * randlora.delta_weight(model, fqn, name=name).double() for name, f in factors.items()), torch.zeros(())
    )


def error_of(model: nn.Module, fqn: str, factors: dict[str, float], name: str = "c") -> float:
    expected = wanted(model, fqn, factors).detach()
    return float((randlora.delta_weight(model, fqn, name=name).detach().double() - expected).norm() / expected.norm())


@every_kind
@pytest.mark.parametrize("equal", ["gamma", "lambda"])
def test_the_sum_is_exact_where_one_of_both_is_the_same(kind: LayerKind, equal: str) -> None:
    model = two(nn.Sequential(kind.build(9, 14, True, kind.exact)), equal=equal)
    for part in ("randlora_lambda", "randlora_gamma"):
        model.get_submodule(f"0.{part}").to(kind.exact)
    report = randlora.combine(model, FACTORS, name="c")
    assert report.is_exact
    assert_close(randlora.delta_weight(model, "0", name="c"), wanted(model, "0", FACTORS), kind.exact)


def test_what_is_not_trained_adds_nothing_and_a_sum_of_it_can_be_trained() -> None:
    model = nn.Sequential(nn.Linear(9, 14))
    for seed, (name, init) in enumerate({"a": "gamma", "b": "gamma", "c": "lambda"}.items()):
        randlora.inject(model, r=3, name=name, init=init, seed=seed)  # type: ignore[arg-type]
    assert randlora.combine(model, {"a": 1.0, "b": 0.5}, name="none").is_exact
    assert [bool(part.any()) for part in diagonals(model[0], "none")] == [False, True]
    fill(model, "c")
    assert randlora.combine(model, {"c": 2.0, "a": 1.0}, name="d").is_exact
    assert_close(randlora.delta_weight(model, "0", name="d"), wanted(model, "0", {"c": 2.0}), torch.float32)


@every_read_kind
def test_the_sum_is_exact_for_weights_that_are_read(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = two(kind.model(dtype), **{**kind.adapter_options, "alpha": 7}).to(dtype)
    report = randlora.combine(model, FACTORS, name="c")
    assert report.is_exact
    assert_close(randlora.delta_weight(model, kind.target, name="c"), wanted(model, kind.target, FACTORS), dtype)
    randlora.activate(model, FACTORS)
    expected = kind.run(model, dtype)
    randlora.activate(model, "c")
    assert_close(kind.run(model, dtype), expected, dtype)


@pytest.mark.parametrize("factor", [1.0, -2.0, 0.0])
def test_one_adapter_is_multiplied(factor: float) -> None:
    model = two(Mixed(), equal=None)
    randlora.combine(model, {"a": factor}, name="c")
    own, made = adapter_values(model, "a"), adapter_values(model, "c")
    assert all_bits(made) == all_bits({k: v * factor + 0.0 if k.endswith("lambda") else v for k, v in own.items()})


def test_the_new_adapter_saves_and_loads_like_any_other(tmp_path: Path) -> None:
    model = two(Mixed(), targets=["q", "up"], train_also=["head"])
    before = all_bits(adapter_values(model, "a")) | all_bits(adapter_values(model, "b"))
    randlora.combine(model, FACTORS, name="c")
    assert all_bits(adapter_values(model, "a")) | all_bits(adapter_values(model, "b")) == before
    report = randlora.save(model, tmp_path, name="c")
    assert not [note for note in report.notes if "combined" in note]
    twin = Mixed()
    twin.load_state_dict(model.state_dict(), strict=False)
    randlora.load(twin, tmp_path, name="c")
    assert all_bits(adapter_values(twin, "c")) == all_bits(adapter_values(model, "c"))
    randlora.activate(model, "c")
    assert bits(twin(TOKENS)) == bits(model(TOKENS))


def test_parameters_trained_beside_are_summed_in_the_dtype_that_the_model_was_cast_to() -> None:
    model: Any = Mixed()
    randlora.inject(model, r=4, name="a", targets=["q"], train_also=["head.bias"], trainable=True)
    own = model.head.bias.detach().clone().double()
    model.double()
    with torch.no_grad():
        model.head.bias.add_(torch.randn(3).double())
    trained = model.head.bias.detach().clone()
    randlora.combine(model, {"a": -2.0}, name="c")
    randlora.activate(model, "c")
    assert model.head.bias.dtype == torch.float64
    torch.testing.assert_close(model.head.bias.detach(), own - 2 * (trained - own), rtol=1e-14, atol=1e-14)


def test_what_was_trained_beside_is_summed_as_changes_of_the_models_own() -> None:
    model = Mixed(torch.float64)
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    randlora.inject(model, r=4, name="a", train_also=["head"], targets=["q"])
    randlora.inject(model, r=4, name="b", train_also=["head.weight", "norm"], targets=["q"])
    fill(model, "a", seed=1), fill(model, "b", seed=2)
    randlora.combine(model, FACTORS, name="c", method="fit", tolerance=1)
    state = randlora.state.adapted_root(model)[1]
    for fqn, copy in state.adapters["c"].trained.items():
        changes = {name: state.adapters[name].trained.get(fqn, own[fqn]) - own[fqn] for name in FACTORS}
        assert_close(copy, own[fqn] + 0.7 * changes["a"] - 0.3 * changes["b"], torch.float64)
    assert {*state.adapters["c"].trained} == {"head.weight", "head.bias", "norm.weight", "norm.bias"}


def test_each_layer_is_exact_that_one_adapter_has_alone() -> None:
    model = Mixed(torch.float64)
    randlora.inject(model, r=4, targets=["q"], name="a")
    randlora.inject(model, {"up": 2, ".*": 3}, targets=["up", "down"], alpha={"up": 5, ".*": 7}, name="b")
    fill(model, "a"), fill(model, "b", seed=1)
    assert randlora.combine(model, FACTORS, name="c").is_exact
    info = next(info for info in randlora.adapters(model) if info.name == "c")
    assert info.options == {"q": (4, 80.0), "up": (2, 5.0), "down": (3, 7.0)}
    for fqn, name in {"q": "a", "up": "b", "down": "b"}.items():
        expected = FACTORS[name] * randlora.delta_weight(model, fqn, name=name)
        assert_close(randlora.delta_weight(model, fqn, name="c"), expected, torch.float32)


def test_bases_are_shared_and_those_of_another_seed_can_be_chosen() -> None:
    model = two(Mixed())
    randlora.inject(model, r=3, name="other", seed=5)
    randlora.combine(model, {**FACTORS, "other": 2.0}, name="c")  # an update that is 0 is on all bases
    specs = {info.name: info.specs for info in randlora.adapters(model)}
    assert specs["c"] == specs["a"] != specs["other"]
    randlora.combine(model, {"a": 0.0, "other": 1.0}, name="d", like="other")
    assert {info.name: info.specs for info in randlora.adapters(model)}["d"] == specs["other"]
    assert len(randlora.state.adapted_root(model)[1].bank) == 2


@pytest.mark.parametrize("basis", ["dense", "very_sparse", "block"])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_fit_says_how_near_it_is_and_is_refused_if_that_is_too_far(basis: Any, seed: int) -> None:
    model = two(Mixed(), equal=None, basis=basis)
    randlora.inject(model, r=3, alpha=3, basis=basis, stream="portable", seed=seed, name="other")
    fill(model, "other", seed=4)
    factors = {**FACTORS, "other": 0.1}
    with untouched(model), pytest.raises(AdapterError, match=r"no adapter has exactly this sum in q, up, down"):
        randlora.combine(model, factors, name="c")
    with untouched(model), pytest.raises(AdapterError, match=r"above tolerance=0\.001 in"):
        randlora.combine(model, factors, name="c", method="fit", tolerance=1e-3)
    report = randlora.combine(model, factors, name="c", method="fit", tolerance=1)
    for fqn, error in report.errors.items():
        assert error == pytest.approx(error_of(model, fqn, factors), rel=1e-3)
        alone = randlora.combine(model, {"a": 0.7}, name="of_a")
        assert error < error_of(model, fqn, factors, "of_a")
        assert alone.is_exact
        randlora.remove(model, "of_a")
    assert not report.is_exact
    assert "fitted in 3" in str(report)


def test_a_fit_finds_what_is_there_through_other_bases() -> None:
    model = two(Mixed(torch.float64), equal=None)
    for name in ("x", "y"):
        randlora.inject(model, r=5, stream="portable", seed=9, name=name)
        fill(model, name)
    report = randlora.combine(model, {"a": 1.0, "x": 3.0, "y": -3.0}, name="c", method="fit", tolerance=1e-4)
    assert report.errors.keys() == {"q", "up", "down"}
    assert all(error_of(model, fqn, {"a": 1.0}) < 1e-6 for fqn in report.errors)


def test_the_fit_is_a_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, target, gamma = (
        torch.randn(size, generator=generator).double() for size in ((3, 8), (12, 9), (12, 8), (3, 8))
    )
    bases = DenseBases(A, B)
    lam, gamma = (each.requires_grad_() for each in fitted(bases, target, gamma))
    error = (bases.update(lam, gamma) - target).square().sum()
    grads = torch.autograd.grad(error, (lam, gamma))
    assert all(grad.abs().max() < 0.05 * error for grad in grads)
    nearby = [Factors(lam + 0.05 * torch.randn_like(lam), gamma + 0.05 * torch.randn_like(gamma)) for _ in range(20)]
    assert all((bases.update(*each) - target).square().sum() > error for each in nearby)


def test_a_sum_of_rank_one_is_found_where_no_two_terms_share_a_factor() -> None:
    x, y = torch.eye(4, dtype=torch.float64)[:2]
    terms = [(x, x), (x, y), (y, x), (y, y)]  # (x + y) (x + y)
    factors, left = summed([Factors(lam[:, None], gamma[None]) for lam, gamma in terms])
    assert left < 1e-15
    torch.testing.assert_close(factors.lam @ factors.gamma, torch.outer(x + y, x + y))


def test_layers_larger_than_the_bases_are_fitted_on_larger_ones() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(20, 20))
    for seed, stream in enumerate(("torch", "portable")):
        randlora.inject(model, r=2, targets=["0"], name=f"small-{stream}", stream=stream)  # type: ignore[arg-type]
        randlora.inject(model, r=2, targets=["1"], name=f"large-{stream}", stream=stream, seed=3)  # type: ignore[arg-type]
        fill(model, f"small-{stream}", seed=seed), fill(model, f"large-{stream}", seed=seed)
        factors = {f"small-{stream}": 1.0, f"large-{stream}": 0.5}
        report = randlora.combine(model, factors, name=f"c-{stream}", method="fit", tolerance=1)
        assert (report.errors["0"] == 0) == (stream == "portable")
        assert 0 < report.errors["1"] < 1
        specs = {info.name: info.specs for info in randlora.adapters(model)}
        assert (specs[f"c-{stream}"] == specs[f"small-{stream}"]) == (stream == "portable")  # which was extended


def meta() -> nn.Module:
    with torch.device("meta"):
        return two(Mixed())


def attention(in_proj: Any) -> nn.Module:
    model = nn.Sequential(nn.MultiheadAttention(12, 2))
    randlora.inject(model, r=3, name="a", targets=["0.in_proj_weight"])
    randlora.inject(model, r=3, name="b", targets=["0.in_proj_weight"], in_proj=in_proj)
    return model


def test_what_no_such_adapter_could_have_is_refused() -> None:
    model = Mixed()
    randlora.inject(model, r=4, targets=["q"], dropout=0.5, name="dropping")
    randlora.inject(model, r=4, targets=["embed"], name="read")
    randlora.inject(model, r=4, targets=["up"], train_also=["q.weight"], name="beside")
    randlora.inject(model, r=4, targets=["q"], name="off")
    set_alpha(model, 0, "off")
    for name in ("dropping", "read", "beside", "off"):
        fill(model, name)
    for adapters, message in [
        ({"dropping": 1, "read": 1}, r"embed is a weight that other code reads, whose input dropout=0\.5 cannot reach"),
        ({"off": 1, "beside": 1}, r"'beside' trained a copy of q\.weight, a weight that the new adapter would adapt"),
        ({"off": 1, "dropping": 1}, "above tolerance=100 in q, up to inf"),
    ]:
        with untouched(model), pytest.raises(AdapterError, match=message):
            randlora.combine(model, adapters, name="c", method="fit", tolerance=100)
    assert randlora.combine(model, {"off": 1, "dropping": 0}, name="c").is_exact


def test_a_bad_call_is_refused_and_changes_nothing() -> None:
    model = two(Mixed())
    calls: list[tuple[Any, dict[str, Any], type[RandLoRAError], str]] = [
        ({"a": 1, "x": 1}, {}, AdapterError, "no adapter named 'x': it has a, b"),
        ({"a": float("nan")}, {}, AdapterError, "must be a finite number, got nan"),
        ("a", {}, AdapterError, "expected a mapping from names"),
        ({}, {}, AdapterError, "expected a mapping from names"),
        ({"a": 1}, {"name": "b"}, AdapterError, "the model has an adapter of that name"),
        ({"a": 1}, {"like": "b"}, AdapterError, "like must be one of"),
        ({"a": 1}, {"method": "ties"}, ConfigError, "method must be"),
        ({"a": 1}, {"tolerance": 0}, ConfigError, "tolerance must be a positive number"),
        ({"a": 1}, {"tolerance": "no"}, ConfigError, "tolerance must be a positive number"),
    ]
    for adapters, options, error, message in calls:
        with untouched(model), pytest.raises(error, match=message):
            randlora.combine(model, adapters, **{"name": "c", **options})
    diagonals(model.get_submodule("q"), "a")[0].data[0, 0] = 1e38
    with untouched(model), pytest.raises(AdapterError, match="would not be finite in q"):
        randlora.combine(model, {"a": 1e5}, name="c")
    with randlora.merged(model), untouched(model), pytest.raises(AdapterError, match="while the adapters are merged"):
        randlora.combine(model, {"b": 1}, name="c")
    with pytest.raises(AdapterError, match=r"has no values \(meta or fake\)"):
        randlora.combine(meta(), {"a": 1}, name="c")
    with pytest.raises(AdapterError, match=r"'b' adapts 0.in_proj_weight as 3 x 12 x 12, and one like 'a' as 36 x 12"):
        randlora.combine(attention("split"), {"a": 1, "b": 1}, name="c")


def test_bases_that_cannot_be_drawn_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(2, 2))
    randlora.inject(model, r=2, targets=["0"], basis="sparse", name="a")
    with untouched(model), pytest.raises(ConfigError, match="have a standard deviation of 0"):
        randlora.inject(model, r=1, targets=["1"], basis="sparse", name="c")
    randlora.inject(model, r=1, targets=["1"], name="b")
    with untouched(model), pytest.raises(ConfigError, match="have a standard deviation of 0"):
        randlora.combine(model, {"a": 1.0, "b": 0.0}, name="c")

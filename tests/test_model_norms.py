"""The norm of an update that is not formed, in a loss and with a limit, for every kind of layer and of bases."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import randlora
from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec, CompactMatrix, count_bases
from randlora.config import BasisKind, Stream
from randlora.errors import AdapterError, ConfigError
from tests.further import further
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.laws import TOLERANCES, Mixed, adapted_names, adapter_layer, diagonals
from tests.layer_kinds import LayerKind, every_kind
from tests.read_kinds import ReadKind, every_read_kind
from tests.strategies import KINDS_AND_STREAMS, specs

every_basis = pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)


def with_one_term(lam: Tensor) -> None:
    """Leave one entry of Λ, or of each matrix of a stack, so that the update is one term, whose norm is known."""
    with torch.no_grad():
        kept = lam[..., -1, :1].clone()
        lam.zero_()
        lam[..., -1, :1] = kept


def assert_is_norm(model: nn.Module, fqn: str, dtype: torch.dtype) -> None:
    norm, update = randlora.update_norms(model)[fqn], randlora.delta_weight(model, fqn)
    assert norm > 0
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), update.double().norm(), rtol=TOLERANCES[dtype], atol=0)


@every_kind
@pytest.mark.parametrize("sides", [(9, 14), (14, 9)])
def test_the_norm_of_one_term_is_exact(kind: LayerKind, sides: tuple[int, int]) -> None:
    model = nn.Sequential(kind.build(*sides, True, kind.exact))
    randlora.inject(model, r=3, alpha=7)
    fill(model)
    for part in ("randlora_lambda", "randlora_gamma"):
        model.get_submodule(f"0.{part}").to(kind.exact)
    with_one_term(diagonals(model.get_submodule("0"))[0])
    assert_is_norm(model, "0", kind.exact)


@every_read_kind
def test_the_norm_of_one_term_of_each_matrix_is_exact_for_weights_that_are_read(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = kind.adapted(dtype).to(dtype)
    with_one_term(kind.diagonals(model)[0])
    assert_is_norm(model, kind.target, dtype)


def of_one_layer(
    basis: BasisKind, stream: Stream, sides: tuple[int, int], *, r: int = 8, seed: int = 0
) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(*sides, dtype=torch.float64))
    randlora.inject(model, r=r, basis=basis, stream=stream, seed=seed, targets=["0"])
    model.double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in randlora.trainable_parameters(model):
        nn.init.normal_(parameter, generator=generator)
    return model


@every_basis
@pytest.mark.parametrize("sides", [(160, 96), (96, 160), (128, 128)])
def test_the_norm_is_near_for_random_values(basis: BasisKind, stream: Stream, sides: tuple[int, int]) -> None:
    for seed in range(3):
        model = of_one_layer(basis, stream, sides, seed=seed)
        torch.testing.assert_close(
            randlora.update_norms(model)["0"], randlora.delta_weight(model, "0").norm(), rtol=0.05, atol=0
        )


@every_basis
def test_its_value_and_gradients_are_those_of_the_norms_of_the_terms(basis: BasisKind, stream: Stream) -> None:
    model = of_one_layer(basis, stream, (20, 14), r=4)
    part = adapter_layer(model[0]).adapters["default"]
    basis_A, basis_B = part.basis.slices(20, 14, device="cpu", dtype=torch.float64)
    lam, gamma = diagonals(model[0])
    r, n = lam.shape
    columns = basis_B.flatten(1)
    terms = [
        lam[k, j] * torch.outer(columns[:, k * n + j], basis_A[k, 0] * gamma[j]) for k in range(r) for j in range(n)
    ]
    expected = part.scaling * torch.stack(terms).norm()
    found = randlora.update_norms(model)["0"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, (lam, gamma))
    found.backward()
    for parameter, gradient in zip((lam, gamma), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_nothing_else_gets_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    for name in ("a", "b"):
        randlora.inject(model, r=2, targets=["0", "2"], train_also=["1"], name=name)
        fill(model, name)
    randlora.set_trainable(model, ["a", "b"])
    model.requires_grad_(True)
    sum(randlora.update_norms(model, name="a").values(), torch.zeros(())).backward()
    given = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert given == {f"{fqn}.randlora_{part}.a" for fqn in "02" for part in ("lambda", "gamma")}


@pytest.mark.parametrize("zero", ["lambda", "gamma", "both"])
@pytest.mark.parametrize("penalty", [lambda norm: norm, lambda norm: norm**2, lambda norm: (norm - 1).relu()])
def test_where_the_update_is_zero_the_gradient_is_too(zero: str, penalty: Callable[[Tensor], Tensor]) -> None:
    model = fill(randlora_of(Mixed()))
    for fqn, value in adapter_values(model).items():
        if zero in ("both", fqn.rsplit("_", 1)[1]):
            nn.init.zeros_(value)
    norms = randlora.update_norms(model)
    assert {norm.item() for norm in norms.values()} == {0.0}
    sum(map(penalty, norms.values()), torch.zeros(())).backward()
    assert all(not value.grad.any() for value in adapter_values(model).values() if value.grad is not None)
    assert all(value.grad is not None for value in adapter_values(model).values())


def randlora_of(model: nn.Module, **options: Any) -> nn.Module:
    randlora.inject(model, r=3, targets=["q", "up", "down"], **options)
    return model


@pytest.mark.parametrize("factor", [2.0**-30, -0.5, -1.0, 8.0, 2.0**30])
@pytest.mark.parametrize("of_lambda", [True, False])
def test_it_is_homogeneous_in_either_factor(factor: float, *, of_lambda: bool) -> None:
    model = fill(randlora_of(Mixed()))
    before = randlora.update_norms(model)
    for fqn, value in adapter_values(model).items():
        if fqn.endswith("lambda") is of_lambda:
            value.data *= factor
    after = randlora.update_norms(model)
    assert {fqn: norm.item() for fqn, norm in after.items()} == {
        fqn: norm.item() * abs(factor) for fqn, norm in before.items()
    }


def test_it_is_of_the_adapter_itself_whatever_is_active_or_merged() -> None:
    model = fill(randlora_of(Mixed(), name="a"), "a")
    expected = randlora.update_norms(model)
    randlora.inject(model, r=2, targets=["q"], name="b")
    assert {fqn: norm.item() for fqn, norm in randlora.update_norms(model, name="a").items()} == {
        fqn: norm.item() for fqn, norm in expected.items()
    }
    assert randlora.update_norms(model, name="b").keys() == {"q"}
    for change in (
        lambda: randlora.activate(model, {"a": 0.5, "b": 1.0}),
        lambda: randlora.activate(model, "b"),
        lambda: randlora.activate(model, "a"),
        lambda: randlora.merge(model, reversible=True),
    ):
        change()
        norms = randlora.update_norms(model, name="a")
        assert [norm.item() for norm in norms.values()] == [norm.item() for norm in expected.values()]
    with pytest.raises(AdapterError, match=r"several adapters \(a, b\): give name="):
        randlora.update_norms(model)


def test_modes_of_the_caller_change_neither_values_nor_later_gradients() -> None:
    model = fill(randlora_of(Mixed()))
    with torch.inference_mode():
        first = randlora.update_norms(model)
    assert not any(norm.requires_grad for norm in first.values())
    with torch.autocast("cpu", torch.bfloat16):
        second = randlora.update_norms(model)
    assert [norm.item() for norm in second.values()] == [norm.item() for norm in first.values()]
    sum(second.values(), torch.zeros(())).backward()
    assert all(value.grad is not None and value.grad.any() for value in adapter_values(model).values())


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(each.numel() for each in tree_leaves(result) if isinstance(each, Tensor))])
        return result


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_no_tensor_is_larger_than_gamma(basis: BasisKind) -> None:
    model = nn.Sequential(nn.Linear(96, 64))
    randlora.inject(model, r=8, basis=basis, targets=["0"])
    fill(model)
    with Largest() as largest:
        randlora.update_norms(model)["0"].backward()
        randlora.limit_norms(model, 1e-3)
    assert largest.entries == diagonals(model[0])[1].numel() == 8 * 64


@given(specs(), st.data())
def test_the_squares_are_those_of_the_dense_slices(spec: BasisSpec, data: st.DataObject) -> None:
    basis = Basis(spec)
    basis.extend(spec.max_dim, spec.min_dim)
    if data.draw(st.booleans()):
        stored = (
            CompactMatrix.from_dense(3 * each.to_dense(device="cpu", dtype=torch.float32)) for each in basis.matrices()
        )
        first, second = stored
        basis = Basis(spec, basis.extent, (first, second))
    min_dim = data.draw(st.integers(1, spec.min_dim))
    max_dim = data.draw(st.integers(min_dim, spec.max_dim))
    basis_A, basis_B = basis.slices(max_dim, min_dim, device="cpu", dtype=torch.float64)
    found = basis.squares(max_dim, min_dim, device=torch.device("cpu"), dtype=torch.float64)
    torch.testing.assert_close(found.A, basis_A.squeeze(1).square())
    by_term = basis_B.flatten(1).square().sum(0).view(spec.r, count_bases(min_dim, spec.r))
    torch.testing.assert_close(found.B, by_term)


@every_read_kind
def test_a_limit_scales_down_whole_layers(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = kind.adapted(dtype).to(dtype)
    norm, update = randlora.update_norms(model)[kind.target].item(), randlora.delta_weight(model, kind.target)
    before = all_bits(adapter_values(model))
    assert randlora.limit_norms(model, norm * 1.01)[kind.target].item() == norm
    assert all_bits(adapter_values(model)) == before
    randlora.limit_norms(model, norm / 4)
    torch.testing.assert_close(randlora.update_norms(model)[kind.target].item(), norm / 4, rtol=1e-6, atol=0)
    torch.testing.assert_close(randlora.delta_weight(model, kind.target), update / 4, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_limit_changes_lambda_of_the_layers_above_it_alone(context: Callable[[], Any]) -> None:
    model = fill(fill(randlora_of(randlora_of(Mixed(), name="a", trainable=True), name="b"), "a"), "b")
    norms = {fqn: norm.item() for fqn, norm in randlora.update_norms(model, name="a").items()}
    before = all_bits(model.state_dict())
    least = min(norms, key=lambda fqn: norms[fqn])
    with context():
        randlora.limit_norms(model, {least: math.inf, ".*": norms[least] / 2}, name="a")
    after = all_bits(model.state_dict())
    others = adapted_names(model) - {least}
    assert {name for name in before if before[name] != after[name]} == {f"{fqn}.randlora_lambda.a" for fqn in others}
    for fqn, norm in randlora.update_norms(model, name="a").items():
        assert norm.item() == pytest.approx(norms[least] / (1 if fqn == least else 2), rel=1e-6)
    randlora.update_norms(model, name="a")["q"].backward()  # which parameters that became inference tensors refuse


def test_a_limit_of_zero_ends_in_zero_and_values_that_are_not_finite_stay() -> None:
    model = fill(randlora_of(Mixed()))
    adapter_values(model)["q.randlora_lambda"].data[0, 0] = math.inf
    adapter_values(model)["up.randlora_lambda"].data[0, 0] = math.nan
    before = all_bits(adapter_values(model))
    for _ in range(2):
        randlora.limit_norms(model, 0)
    assert not adapter_values(model)["down.randlora_lambda"].any()
    changed = {name for name, value in all_bits(adapter_values(model)).items() if value != before[name]}
    assert changed == {"down.randlora_lambda"}


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (-1.0, "must be a number of at least 0, got -1.0"),
        (math.nan, "must be a number of at least 0, got nan"),
        (True, "must be a number of at least 0, got True"),
        ({"q": 1.0}, r"limit= has no pattern for .*add '\.\*'"),
        ({"nowhere": 1.0, ".*": 1.0}, "'nowhere'.*matches no target"),
        ({"q": "1"}, "the limit of 'q' must be a number of at least 0, got '1'"),
    ],
)
def test_a_limit_that_is_none_is_refused(limit: Any, message: str) -> None:
    model = fill(randlora_of(Mixed()))
    with untouched(model), pytest.raises(ConfigError, match=message):
        randlora.limit_norms(model, limit)


def test_merged_adapters_are_not_limited() -> None:
    model = fill(randlora_of(Mixed()))
    randlora.merge(model, reversible=True)
    with pytest.raises(AdapterError, match=r"limit the norms .* call randlora\.unmerge\(model\) first"):
        randlora.limit_norms(model, 1e-3)


def test_a_norm_without_gradients_is_refused_where_they_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fill(randlora_of(Mixed()))
    monkeypatch.setattr("randlora.layers.base.whole", lambda parameter: parameter.detach())  # as of ZeRO-3
    with pytest.raises(AdapterError, match=r"the update of q would give no gradients .* under torch\.no_grad"):
        randlora.update_norms(model)
    with torch.no_grad():
        assert all(norm > 0 for norm in randlora.update_norms(model).values())
    model.requires_grad_(False)
    assert all(norm > 0 for norm in randlora.update_norms(model).values())


@pytest.mark.medium
@pytest.mark.parametrize(
    ("r", "within", "basis"),
    [
        *((4, 0.26, basis) for basis in ("dense", "block", "very_sparse")),
        (32, 0.04, "dense"),
        *(further(4, 0.26, "sparse"), *(further(8, 0.13, basis) for basis in get_args(BasisKind))),
        *(further(32, 0.04, basis) for basis in get_args(BasisKind)[1:]),
    ],
)
def test_after_training_it_is_as_near_as_the_page_on_training_says(basis: BasisKind, r: int, within: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 160))
    randlora.inject(model, r=r, basis=basis, targets=["0"])
    target = torch.randn(160, 4) @ torch.randn(4, 128) / 20
    optimizer = torch.optim.Adam(randlora.trainable_parameters(model), lr=1e-3)
    for _ in range(100):
        update = randlora.delta_weight(model, "0")
        torch.testing.assert_close(randlora.update_norms(model)["0"], update.norm(), rtol=within, atol=1e-9)
        optimizer.zero_grad()
        (update - target).square().sum().backward()
        optimizer.step()
    assert (update - target).norm() < 0.99 * target.norm()

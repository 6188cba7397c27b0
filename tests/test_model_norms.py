"""The norm of an update that is not formed, in a loss and with a limit, for every kind of layer and of bases."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import randlora
from randlora.config import BasisKind, Stream
from randlora.errors import AdapterError, ConfigError
from tests.kit import adapter_values, all_bits, fill, untouched
from tests.laws import TOLERANCES, Mixed, adapted_names, adapter_layer, diagonals
from tests.read_kinds import ReadKind, every_read_kind
from tests.strategies import KINDS_AND_STREAMS


@every_read_kind
def test_a_limit_scales_whole_layers_and_the_norm_of_one_term_of_each_matrix_is_exact(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = kind.adapted(dtype).to(dtype)
    norm, update = randlora.update_norms(model)[kind.target].item(), randlora.delta_weight(model, kind.target)
    before = all_bits(adapter_values(model))
    assert randlora.limit_norms(model, norm * 1.01)[kind.target].item() == norm
    assert all_bits(adapter_values(model)) == before
    randlora.limit_norms(model, norm / 4)
    torch.testing.assert_close(randlora.update_norms(model)[kind.target].item(), norm / 4, rtol=1e-6, atol=0)
    torch.testing.assert_close(randlora.delta_weight(model, kind.target), update / 4, rtol=1e-5, atol=1e-7)
    with torch.no_grad():  # one term, or one of each matrix of a stack, whose norm is known
        lam = kind.diagonals(model)[0]
        lam.copy_(nn.functional.pad(lam[..., -1:, :1].clone(), (0, lam.shape[-1] - 1, lam.shape[-2] - 1, 0)))
    found, update = randlora.update_norms(model)[kind.target], randlora.delta_weight(model, kind.target)
    assert found > 0
    assert found.shape == ()
    torch.testing.assert_close(found.double(), update.double().norm(), rtol=TOLERANCES[dtype], atol=0)


@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
def test_its_value_and_gradients_are_those_of_the_norms_of_the_terms(basis: BasisKind, stream: Stream) -> None:
    """Of a layer that has slices of the bases."""
    model = nn.Sequential(nn.Linear(20, 14, dtype=torch.float64), nn.Linear(25, 16, dtype=torch.float64))
    randlora.inject(model, r=4, basis=basis, stream=stream, targets=["0", "1"])
    fill(model.double(), spread=1)
    part = adapter_layer(model[0]).adapters["default"]
    basis_A, basis_B = part.basis.slices(20, 14, device="cpu", dtype=torch.float64)
    lam, gamma = diagonals(model[0])
    columns = basis_B.flatten(1).unflatten(1, lam.shape)
    expected = part.scaling * torch.einsum("kj,okj,ki,ji->kjoi", lam, columns, basis_A[:, 0], gamma).norm()
    found = randlora.update_norms(model)["0"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, (lam, gamma))
    for gradient, own in zip(torch.autograd.grad(found, (lam, gamma)), wanted, strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-10, atol=1e-12)


def adapted(**options: Any) -> Mixed:
    model = Mixed()
    randlora.inject(model, r=3, targets=["q", "up", "down"], **options)
    return fill(model, options.get("name", "default"))


@pytest.mark.parametrize("zero", ["lambda", "gamma", "both"])
def test_where_the_update_is_zero_the_gradient_is_too_and_none_is_lost(
    zero: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    for fqn, value in adapter_values(model).items():
        if zero in ("both", fqn.rsplit("_", 1)[1]):
            nn.init.zeros_(value)
    norms = randlora.update_norms(model)
    assert {norm.item() for norm in norms.values()} == {0.0}
    sum(norms.values(), torch.zeros(())).backward()
    assert all(value.grad is not None and not value.grad.any() for value in adapter_values(model).values())
    monkeypatch.setattr("randlora.layers.base.whole", lambda parameter: parameter.detach())  # as of ZeRO-3
    with pytest.raises(AdapterError, match=r"the update of q would give no gradients .* under torch\.no_grad"):
        randlora.update_norms(model)
    with torch.no_grad():
        assert randlora.update_norms(model).keys() == norms.keys()


def test_it_is_of_the_adapter_itself_whatever_is_active_or_merged_and_in_any_mode() -> None:
    model = adapted(name="a")
    expected = [norm.item() for norm in randlora.update_norms(model).values()]
    randlora.inject(model, r=2, targets=["q"], name="b")
    assert randlora.update_norms(model, name="b").keys() == {"q"}
    for active in ({"a": 0.5, "b": 1.0}, "b", "a", None):
        randlora.merge(model, reversible=True) if active is None else randlora.activate(model, active)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            norms = randlora.update_norms(model, name="a")
        assert [norm.item() for norm in norms.values()] == expected
        assert not any(norm.requires_grad for norm in norms.values())
    with pytest.raises(AdapterError, match=r"several adapters \(a, b\): give name="):
        randlora.update_norms(model)
    with pytest.raises(AdapterError, match=r"limit the norms .* call randlora\.unmerge\(model\) first"):
        randlora.limit_norms(model, 1e-3, name="a")


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(each.numel() for each in tree_leaves(result) if isinstance(each, Tensor))])
        return result


@pytest.mark.parametrize("basis", ["dense", "block"])
def test_no_tensor_is_larger_than_gamma(basis: BasisKind) -> None:
    model = nn.Sequential(nn.Linear(96, 64))
    randlora.inject(model, r=8, basis=basis, targets=["0"])
    fill(model)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        randlora.update_norms(model)["0"].backward()
        randlora.limit_norms(model, 1e-3)
    assert largest.entries == diagonals(model[0])[1].numel() == 8 * 64


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_limit_changes_lambda_of_the_layers_above_it_alone(context: Callable[[], Any]) -> None:
    model = adapted(name="a", trainable=True)
    randlora.inject(model, r=3, targets=["q"], name="b")
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


REFUSED: list[tuple[Any, str]] = [
    *((number, f"must be a number of at least 0, got {number}") for number in (-1.0, math.nan, True)),
    ({"q": 1.0}, r"limit= has no pattern for .*add '\.\*'"),
    ({"nowhere": 1.0, ".*": 1.0}, "'nowhere'.*matches no target"),
    ({"q": "1"}, "the limit of 'q' must be a number of at least 0, got '1'"),
]


def test_a_limit_of_zero_ends_in_zero_values_that_are_not_finite_stay_and_one_that_is_none_is_refused() -> None:
    model = adapted()
    for limit, message in REFUSED:
        with untouched(model), pytest.raises(ConfigError, match=message):
            randlora.limit_norms(model, limit)
    adapter_values(model)["q.randlora_lambda"].data[0, 0] = math.inf
    adapter_values(model)["up.randlora_lambda"].data[0, 0] = math.nan
    before = all_bits(adapter_values(model))
    for _ in range(2):
        randlora.limit_norms(model, 0)
    assert not adapter_values(model)["down.randlora_lambda"].any()
    changed = {name for name, value in all_bits(adapter_values(model)).items() if value != before[name]}
    assert changed == {"down.randlora_lambda"}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("r", "within", "basis"),
    [(4, 0.26, "dense"), (4, 0.26, "very_sparse"), (32, 0.04, "block")],
)
def test_after_training_it_is_as_near_as_the_page_on_training_says(basis: BasisKind, r: int, within: float) -> None:
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

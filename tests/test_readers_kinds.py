"""The laws of weights that other code reads, for every row of the table: outputs, gradients, verbs, refusals."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.config import Init
from randlora.errors import MergeError, RandLoRAError, TargetError
from randlora.functional import Compute
from randlora.layers import registry
from randlora.layers.base import AdapterLayer
from randlora.targets.census import Census
from tests.kit import assert_unchanged, fill, read, same_bits, snapshot, untouched
from tests.laws import TOLERANCES, assert_close
from tests.read_kinds import (
    READ_KINDS,
    ReadKind,
    every_family,
    every_read_kind,
    every_read_kind_and_dtype,
    every_read_kind_dtype_and_basis,
    output_of,
    weighted,
)


def test_the_table_has_a_row_for_every_weight_of_torchs_modules() -> None:
    served = {
        (type(kind.layer(kind.adapted())), registry.qualified_name(parent))
        for kind in READ_KINDS
        for parent in type(kind.owner(kind.model())).__mro__
    }
    readers = {(layer, name) for name, layers in registry._readers.items() for layer in layers.values()}
    layers = {(layer, name) for name, layer in registry._layers.items() if not isinstance(layer, str)}
    registered: set[tuple[type[AdapterLayer], str]] = readers | {each for each in layers if each[0].kind != "linear"}
    registered = {(layer, name) for layer, name in registered if name.startswith("torch.")}
    assert len(registered) > 10
    assert registered <= served


# Outputs


@every_read_kind_and_dtype
def test_a_fresh_adapter_leaves_every_bit_of_the_output(kind: ReadKind, dtype: torch.dtype) -> None:
    for init, basis in zip(get_args(Init), ("dense", "block"), strict=True):
        model, base = kind.adapted(dtype, filled=False, basis=basis, init=init), kind.model(dtype).requires_grad_(False)
        kind.weight(base).requires_grad_()  # by which torch decides how it computes a linear layer
        assert same_bits(kind.run(model, dtype), kind.run(base, dtype))
        model.eval()
        base.eval().requires_grad_(False)
        with torch.no_grad():
            assert same_bits(kind.run(model, dtype), kind.run(base, dtype))


def assert_contract(kind: ReadKind, dtype: torch.dtype, basis: str, r: int) -> None:
    model, base = kind.adapted(dtype, r=r, basis=basis), kind.model(dtype)
    (site,) = Census.of(model).adapted
    assert (site.fqn, site.layer_class.kind) == (kind.target, kind.kind)
    update = kind.oracle_update(model)
    changed = kind.changed(base, update)
    given = tuple(part.double() if part.is_floating_point() else part for part in kind.arguments(dtype))
    expected = output_of(changed.get_submodule("0")(*given))
    assert (expected - output_of(base.double()[0](*given))).abs().max() > 0.01
    found = kind.run(model, dtype)
    assert found.dtype == dtype
    assert_close(found, expected, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert_close(randlora.delta_weight(model, kind.target), update, wide)
    assert_close(read(model, kind.parameter_fqn), kind.weight(changed), dtype)
    assert getattr(kind.owner(model), kind.attribute) is kind.weight(model)
    model.eval()
    with torch.no_grad():
        assert_close(kind.run(model, dtype), expected, dtype)


@every_read_kind_dtype_and_basis
def test_the_output_is_that_of_the_weight_and_the_oracles_update(
    kind: ReadKind, dtype: torch.dtype, basis: str
) -> None:
    assert_contract(kind, dtype, basis, r=3)


@every_family
@pytest.mark.parametrize(("r", "basis"), [(1, "dense"), (8, "block")])
def test_the_output_is_that_of_the_oracle_for_a_rank_of_one_and_one_of_many(kind: ReadKind, basis: str, r: int) -> None:
    assert_contract(kind, torch.float64, basis, r)


@every_family
@torch.no_grad()
def test_a_model_computes_in_the_dtype_it_is_converted_to_and_under_autocast_in_its_own(kind: ReadKind) -> None:
    model, base = kind.adapted(), kind.model()
    expected = kind.run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, own = kind.run(model), kind.run(base)
    assert found.dtype == own.dtype
    assert_close(found, expected, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float64):
        found = kind.run(model.to(dtype), dtype)
        assert found.dtype == dtype
        assert_close(found, expected, torch.bfloat16)
        assert_close(randlora.delta_weight(model, kind.target), kind.oracle_update(model), torch.float32)
        with randlora.disabled(model):
            assert same_bits(kind.run(model, dtype), kind.run(kind.model().bfloat16().to(dtype), dtype))


# Gradients


@every_read_kind
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_gradients_are_those_of_an_update_formed_by_plain_autograd(kind: ReadKind, basis: str) -> None:
    model, plain = kind.adapted(torch.float64, basis=basis), kind.model(torch.float64)
    part = kind.layer(model).adapters["default"]
    lam, gamma = (value.detach().double().requires_grad_() for value in kind.diagonals(model))
    sides = max(part.shape[-2:]), min(part.shape[-2:])
    A, B = part.basis.slices(*sides, device="cpu", dtype=torch.float64)
    UA = (lam[..., None] * A.squeeze(1)[:, None] * gamma[..., None, :, :]).flatten(-3, -2)
    update = part.scaling * B.flatten(1) @ UA
    update = update if part.shape[-1] == sides[1] else update.mT
    weight = kind.weight(plain)
    changed = {kind.parameter_fqn.removeprefix("0."): weight + kind.in_layout(update, weight)}
    output = output_of(torch.func.functional_call(plain[0], changed, kind.arguments(torch.float64)))
    expected = torch.autograd.grad(weighted(output), (lam, gamma))
    for found, own in zip(kind.gradients(model, torch.float64), expected, strict=True):
        assert own.abs().max() > 0
        assert_close(found, own, torch.float32)


@every_family
def test_every_way_to_compute_gives_the_same_output_and_gradients_to_the_adapter_alone(kind: ReadKind) -> None:
    model = kind.adapted(torch.float64)
    fqns, trained = kind.diagonal_fqns(model), tuple(randlora.trainable_parameters(model))
    expected, gradients = kind.run(model, torch.float64), kind.gradients(model, torch.float64)
    start = torch.ones((), requires_grad=True)  # without it a reentrant segment of indices gets no gradient

    def segment(start: Tensor) -> Tensor:
        return kind.run(model, torch.float64) * start

    def loss(values: dict[str, Tensor]) -> Tensor:
        changed = {fqn.removeprefix("0."): value for fqn, value in values.items()}
        return weighted(output_of(torch.func.functional_call(model[0], changed, kind.arguments(torch.float64))))

    ways: list[Callable[[], tuple[Tensor, ...]]] = [
        lambda: tuple(torch.func.grad(loss)({fqn: model.get_parameter(fqn) for fqn in fqns}).values()),
        lambda: kind.gradients(model, torch.float64),
    ]
    for reentrant in (True, False):
        weighted(checkpoint(segment, start, use_reentrant=reentrant)).backward()
        assert {fqn for fqn, value in model.named_parameters() if value.grad is not None} == {*fqns}
        for value, own in zip(trained, gradients, strict=True):
            assert_close(value.grad, own, torch.float32)  # type: ignore[arg-type]
        model.zero_grad()
    for compute in get_args(Compute):
        randlora.set_compute(model, compute)
        assert_close(kind.run(model, torch.float64), expected, torch.float64)
        for way in ways:
            for found, own in zip(way(), gradients, strict=True):
                assert_close(found, own, torch.float32)


# Verbs: tests/state_machine has their orders


@every_read_kind_and_dtype
@torch.no_grad()  # with gradients torch computes a linear layer in another way
def test_a_merged_weight_is_the_exact_sum_rounded_once_and_unmerging_restores_every_bit(
    kind: ReadKind, dtype: torch.dtype
) -> None:
    model, base = kind.adapted(dtype), kind.model(dtype)
    before, adapted = snapshot(model), kind.run(model, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    delta = randlora.delta_weight(model, kind.target)
    weight = kind.weight(base)
    expected = (weight.to(wide) + kind.in_layout(delta, weight)).to(dtype)
    with randlora.merged(model):
        assert same_bits(kind.weight(model), expected)
        assert kind.weight(model).stride() == weight.stride() or 1 in weight.shape
        atol = 2 * TOLERANCES[dtype] * max(1.0, float(adapted.abs().max()))
        torch.testing.assert_close(kind.run(model, dtype), adapted, rtol=0, atol=atol)
        if kind.is_whole_read:
            assert same_bits(kind.run(model, dtype), adapted)
        assert same_bits(model.state_dict()[kind.parameter_fqn], weight)
    assert_unchanged(model, before)
    assert same_bits(kind.run(model, dtype), adapted)
    randlora.merge(model)
    assert type(kind.owner(model)) is type(kind.owner(base))
    assert same_bits(kind.weight(model), expected)
    assert model.state_dict().keys() == base.state_dict().keys()


@every_family
def test_adapters_are_independent_and_add_up(kind: ReadKind) -> None:
    model, base = kind.adapted(), kind.model(torch.float64)
    alone = kind.run(model)
    options = {**kind.adapter_options, "r": 2, "alpha": 4, "basis": "block", **kind.other}
    randlora.inject(model, **options, name="other")
    if kind.other:
        ranks = {kind.diagonals(model, name)[0].dim() for name in ("default", "other")}
        assert ranks == {2, 3}
    fill(model, "other", seed=1, spread=0.2)
    assert same_bits(kind.run(model), alone)
    randlora.activate(model, {"default": 0.5, "other": -1.0})
    changed = kind.changed(base, 0.5 * kind.oracle_update(model), -kind.oracle_update(model, "other"))
    assert_close(kind.run(model), kind.run(changed, torch.float64), torch.float32)
    with randlora.merged(model):
        assert_close(kind.weight(model), kind.weight(changed), torch.float32)
    randlora.activate(model, "other")
    second = kind.run(model)
    fill(model, "default", seed=2)
    assert same_bits(kind.run(model), second)
    randlora.remove(model, "default")
    assert same_bits(kind.run(model), second)
    with randlora.disabled(model):
        assert same_bits(kind.run(model), kind.run(kind.model().requires_grad_(False)))
        assert read(model, kind.parameter_fqn) is kind.weight(model)


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@every_family
def test_copies_and_pickles_compute_the_same_and_are_their_own_and_ejecting_gives_back_every_object(
    kind: ReadKind,
) -> None:
    model = kind.model()
    owner, before = kind.owner(model), snapshot(model)
    randlora.inject(model, **kind.adapter_options)
    assert kind.owner(model) is owner
    assert isinstance(owner, type(kind.owner(kind.model())))
    expected = kind.run(fill(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_torch_save(model)):
        assert same_bits(kind.run(twin), expected)
        with torch.no_grad():
            kind.diagonals(twin)[0].zero_()
        assert not torch.equal(kind.run(twin), expected)
        randlora.eject(twin)
        assert type(kind.owner(twin)) is type(kind.owner(kind.model()))
        assert same_bits(kind.run(twin), kind.run(kind.model()))
    assert same_bits(kind.run(model), expected)
    assert randlora.eject(model) == (kind.target,)
    assert_unchanged(model, before)


# Calls that raise leave the model as it was


@every_family
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    kind: ReadKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapted = kind.model(), kind.adapted()
    layer = type(kind.layer(adapted))
    randlora.save(adapted, tmp_path)

    def refused(error: type[BaseException], match: str, call: Callable[..., Any], model: nn.Module, *given: Any,
                **options: Any) -> None:  # fmt: skip
        with untouched(model), pytest.raises(error, match=match):
            call(model, *given, **options)

    dropped = {**kind.adapter_options, "dropout": 0.1}
    refused(TargetError, rf"{kind.target} is a weight that .* dropout", randlora.inject, model, **dropped)
    refused(RandLoRAError, rf"\b{kind.target}\b", randlora.load, nn.Sequential(nn.Linear(3, 5)), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "features", staticmethod(lambda _: (7, 9)))
        refused(RandLoRAError, rf"{kind.target} is .*7.* here, .* trained on", randlora.load, model, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "fresh_diagonals", lambda *_, **__: 1 / 0)
        refused(ZeroDivisionError, "division", randlora.inject, model, **kind.adapter_options)
    with torch.no_grad():
        kind.diagonals(adapted)[0].fill_(float("nan"))
    refused(MergeError, "would not be finite", randlora.merge, adapted)


def test_a_callable_is_asked_once_for_a_module_whose_weight_is_read() -> None:
    asked: list[str] = []
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(6, 6))
    assert randlora.plan(model, r=2, targets=lambda fqn, _: not asked.append(fqn)).targets == ("0", "1")  # type: ignore[func-returns-value]
    assert asked == ["0", "1"]

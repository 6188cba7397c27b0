"""The laws of weights that other code reads, over the table: outputs, gradients, verbs, refusals, beside libraries."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.config import Init
from randlora.errors import AdapterError, MergeError, RandLoRAError, TargetError
from randlora.functional import Compute
from randlora.layers import registry
from randlora.layers.base import AdapterLayer
from randlora.targets.census import Census
from tests.kit import adapt, in_call, read, same_bits, untouched
from tests.laws import TOLERANCES, assert_close, needs_compiler
from tests.read_kinds import (
    ATTENTION,
    READ_KINDS,
    ReadKind,
    every_family,
    every_read_kind,
    every_read_kind_and_dtype,
    of,
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
    layers = {(layer, name) for name, layer in registry._layers.items() if not isinstance(layer, registry.Refusal)}
    registered: set[tuple[type[AdapterLayer], str]] = readers | {each for each in layers if each[0].kind != "linear"}
    registered = {(layer, name) for layer, name in registered if name.startswith("torch.")}
    assert len(registered) > 10
    assert registered <= served


# Outputs


@pytest.mark.product
@every_read_kind_and_dtype
def test_a_fresh_adapter_leaves_every_bit_of_the_output(kind: ReadKind, dtype: torch.dtype) -> None:
    for init in get_args(Init):
        model, base = kind.adapted(dtype, filled=False, init=init), kind.model(dtype).requires_grad_(False)
        kind.weight(base).requires_grad_()  # by which torch decides how it computes a linear layer
        assert same_bits(kind.run(model, dtype), kind.run(base, dtype))
        model.eval()
        base.eval().requires_grad_(False)
        with torch.no_grad():
            assert same_bits(kind.run(model, dtype), kind.run(base, dtype))


@pytest.mark.product
@every_read_kind_and_dtype
def test_the_output_is_that_of_the_weight_and_the_oracles_update(kind: ReadKind, dtype: torch.dtype) -> None:
    rows = [("dense" if dtype in (torch.float32, torch.float64) else "block", 3)]
    rows += [("dense", 1), ("block", 8)] if dtype == torch.float64 else []
    for basis, r in rows:
        model, base = kind.adapted(dtype, r=r, basis=basis), kind.model(dtype)
        (site,) = Census.of(model).adapted
        assert (site.fqn, site.layer_class.kind) == (kind.target, kind.kind)
        update = kind.oracle_update(model)
        changed = kind.changed(base, update)
        given = tuple(part.double() if part.is_floating_point() else part for part in kind.arguments(dtype))
        expected = output_of(changed.get_submodule("0")(*given))
        assert (expected - output_of(copy.deepcopy(base).double()[0](*given))).abs().max() > 0.01
        found = kind.run(model, dtype)
        assert found.dtype == dtype
        assert_close(found, expected, dtype)
        assert_close(randlora.delta_weight(model, kind.target), update, torch.promote_types(dtype, torch.float32))
        assert_close(read(model, kind.parameter_fqn), kind.weight(changed), dtype)
        assert getattr(kind.owner(model), kind.attribute) is kind.weight(model)
        model.eval()
        with torch.no_grad():
            assert_close(kind.run(model, dtype), expected, dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found, own = kind.run(model, dtype), kind.run(base, dtype)
        assert found.dtype == own.dtype
        assert_close(found, expected, torch.bfloat16)


# Gradients


@pytest.mark.product
@every_read_kind
@pytest.mark.parametrize("basis", ["dense", "block"])
def test_gradients_are_those_of_plain_autograd_in_every_way_to_compute(kind: ReadKind, basis: str) -> None:
    model, plain = kind.adapted(torch.float64, basis=basis), kind.model().double()
    arguments = kind.arguments(torch.float64)
    part = kind.layer(model).adapters["default"]
    lam, gamma = (value.detach().double().requires_grad_() for value in kind.diagonals(model))
    sides = max(part.shape[-2:]), min(part.shape[-2:])
    A, B = part.basis.slices(*sides, device="cpu", dtype=torch.float64)
    UA = (lam[..., None] * A.squeeze(1)[:, None] * gamma[..., None, :, :]).flatten(-3, -2)
    update = part.scaling * B.flatten(1) @ UA
    update = update if part.shape[-1] == sides[1] else update.mT
    weight = kind.weight(plain)
    changed = {kind.parameter_fqn.removeprefix("0."): weight + kind.in_layout(update, weight)}
    output = output_of(torch.func.functional_call(plain[0], changed, arguments))
    expected = torch.autograd.grad(weighted(output), (lam, gamma))
    trained: dict[str, Tensor] = {fqn: value for fqn, value in model.named_parameters() if value.requires_grad}
    assert [*trained.values()] == [*randlora.trainable_parameters(model)] == [*kind.diagonals(model)]

    def assert_gradients(found: Iterable[Tensor | None]) -> None:
        for each, own in zip(found, expected, strict=True):
            assert own.abs().max() > 0
            assert each is not None
            assert_close(each, own, torch.float32)

    def loss(values: dict[str, Tensor]) -> Tensor:
        named = {fqn.removeprefix("0."): value for fqn, value in values.items()}
        return weighted(output_of(torch.func.functional_call(model[0], named, arguments)))

    start = torch.ones((), requires_grad=True)  # without it a reentrant segment of indices gets no gradient
    for reentrant in (True, False):
        again = checkpoint(lambda start: kind.run(model, torch.float64) * start, start, use_reentrant=reentrant)
        weighted(again).backward()
        assert {fqn for fqn, value in model.named_parameters() if value.grad is not None} == trained.keys()
        assert_gradients(value.grad for value in trained.values())
        model.zero_grad()
    for compute in get_args(Compute):
        randlora.set_compute(model, compute)
        assert_close(kind.run(model, torch.float64), output, torch.float64)
        assert_gradients(kind.gradients(model, torch.float64))
        assert_gradients(torch.func.grad(loss)(trained).values())
        if kind.name != "Embedding-scaled":  # whose gradients are no derivatives
            along = {fqn: value.detach().cos() for fqn, value in trained.items()}
            slope = sum((own * each).sum() for own, each in zip(expected, along.values(), strict=True))
            assert_close(torch.func.jvp(loss, (trained,), (along,))[1], torch.as_tensor(slope), torch.float32)


# Verbs: tests/state_machine has their orders, several adapters, copies, and casts


@pytest.mark.product
@every_read_kind_and_dtype
@torch.no_grad()  # with gradients torch computes a linear layer in another way
def test_merging_gives_the_exact_sum_rounded_once(kind: ReadKind, dtype: torch.dtype) -> None:
    """And undoing every bit: tests/test_model_merge.py."""
    model, weight = kind.adapted(dtype), kind.weight(kind.model(dtype))
    adapted, wide = kind.run(model, dtype), torch.promote_types(dtype, torch.float32)
    expected = (weight.to(wide) + kind.in_layout(randlora.delta_weight(model, kind.target), weight)).to(dtype)
    with randlora.merged(model):
        assert same_bits(kind.weight(model), expected)
        assert kind.weight(model).stride() == weight.stride() or 1 in weight.shape
        atol = 2 * TOLERANCES[dtype] * max(1.0, float(adapted.abs().max()))
        torch.testing.assert_close(kind.run(model, dtype), adapted, rtol=0, atol=atol)
        if kind.is_whole_read:
            assert same_bits(kind.run(model, dtype), adapted)
        assert same_bits(model.state_dict()[kind.parameter_fqn], weight)
    randlora.merge(model)
    assert same_bits(kind.weight(model), expected)


@every_family
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    kind: ReadKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapted = kind.model(), kind.adapted()
    randlora.save(adapted, tmp_path)
    with untouched(model), pytest.raises(TargetError, match=rf"{kind.target} is a weight that .* dropout"):
        randlora.inject(model, **kind.adapter_options, dropout=0.1)
    with torch.no_grad():
        kind.diagonals(adapted)[0].fill_(float("nan"))
    with untouched(adapted), pytest.raises(MergeError, match="would not be finite"):
        randlora.merge(adapted)
    monkeypatch.setattr(type(kind.layer(adapted)), "features", staticmethod(lambda _: (7, 9)))
    with untouched(model), pytest.raises(RandLoRAError, match=rf"{kind.target} is .*7.* here, .* trained on"):
        randlora.load(model, tmp_path)


# Beside accelerate, compilers, parametrizations, and what is assigned


@every_family
@pytest.mark.parametrize("is_before", [False, True])
@torch.no_grad()
def test_offloading_gives_the_same_at_each_point(kind: ReadKind, is_before: bool) -> None:
    model = kind.model().requires_grad_(False)
    expected, plain = kind.run(kind.adapted()), kind.run(model)
    at_once = ["MultiheadAttention", "AdaptedMultiheadAttention"]  # it needs all its weights
    offload = partial(accelerate.cpu_offload, model, torch.device("cpu"), preload_module_classes=at_once)
    if is_before:
        offload()
    if is_before and kind in ATTENTION:
        problem = rf"{kind.target} is offloaded by accelerate together with everything in MultiheadAttention.* after"
        with untouched(model), pytest.raises(TargetError, match=problem):
            randlora.inject(model, **kind.adapter_options)
        return
    adapt(model, **kind.adapter_options)
    if not is_before:
        offload()
    assert kind.weight(model).is_meta
    assert torch.equal(kind.run(model), expected)
    with torch.enable_grad(), in_call():  # what accelerate loads for each call stays frozen
        for _ in range(2):
            assert_close(kind.run(model), expected, torch.float32)
    if not kind.place:  # else its hook is that of the module around it
        assert not any(value.requires_grad for fqn, value in model.named_parameters() if "randlora" not in fqn)
    with randlora.disabled(model):
        assert torch.equal(kind.run(model), plain)
    if kind in ATTENTION:
        with untouched(model), pytest.raises(AdapterError, match=r"together with .*: remove accelerate's hooks first"):
            randlora.eject(model)
    if is_before:
        randlora.eject(model)
        assert torch.equal(kind.run(model), plain)
    remove_hook_from_submodules(model)
    if not is_before:
        assert torch.equal(kind.run(model), expected)
        randlora.eject(model)
    assert torch.equal(kind.run(model), plain)
    for fqn, module in kind.model().named_modules():
        assert type(model.get_submodule(fqn)) is type(module)
        assert model.get_submodule(fqn).forward.__func__ is type(module).forward  # type: ignore[attr-defined]


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
@needs_compiler
@of("Embedding", "attention-in_proj-split", "experts-gate_up-shared", "experts-down-square-batched")
def test_compiled_and_exported_it_computes_the_same_in_one_graph_where_no_value_decides(kind: ReadKind) -> None:
    model = kind.adapted()
    torch._dynamo.reset()
    compiled = torch.compile(model[0], fullgraph=kind.is_one_graph, backend="aot_eager")
    found = output_of(compiled(*kind.arguments()))
    assert_close(found, kind.run(model), torch.float32)
    again = torch.autograd.grad(weighted(found), tuple(randlora.trainable_parameters(model)))
    for first, second in zip(again, kind.gradients(model), strict=True):
        assert_close(first, second, torch.float32)
    if kind.is_one_graph:
        program = torch.export.export(model[0], kind.arguments())
        assert_close(output_of(program.module()(*kind.arguments())), kind.run(model), torch.float32)


REWRITES: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm-old": torch.nn.utils.weight_norm,
    "spectral_norm-old": torch.nn.utils.spectral_norm,
    "prune": prune.identity,
    "parametrize": lambda owner, name: parametrize.register_parametrization(owner, name, nn.Identity()),
}


@every_family
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_that_is_computed_is_refused_also_one_that_is_computed_since(kind: ReadKind) -> None:
    biased, rows = kind.model(), list[tuple[nn.Module, str]]()
    if "bias" in dict(kind.owner(biased).named_parameters()):
        parametrize.register_parametrization(kind.owner(biased), "bias", nn.Identity())
        rows.append((biased, rf"{kind.target} computes other parameters by a param"))
    for name, rewrite in REWRITES.items():
        plain, model = kind.model(), kind.adapted()
        rewrite(kind.owner(plain), kind.attribute)
        rows.append((plain, rf"{kind.target} computes its weight from other param"))
        before, owner = kind.run(model), kind.owner(model)
        rewrite(owner, kind.attribute)
        if kind.place != "out_proj":  # no forward of it runs: docs/limits.md
            with pytest.raises(AdapterError, match=rf"{kind.attribute} of an adapted \w+ is no longer a parameter"):
                kind.run(model)
        if name == "parametrize":
            parametrize.remove_parametrizations(owner, kind.attribute)
            assert same_bits(kind.run(model), before)
            randlora.eject(model)
    for refused, problem in rows:
        with untouched(refused), pytest.raises(TargetError, match=problem):
            randlora.inject(refused, **kind.adapter_options)


@every_family
def test_a_weight_that_is_read_can_be_written_assigned_and_loaded_and_is_the_base_of_the_update(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    owner, own = kind.owner(model), kind.weight(model)
    with torch.no_grad():
        kind.weight(other).mul_(2)
    expected, state = kind.run(other), {name: value.clone() for name, value in other.state_dict().items()}
    own.data.mul_(2)
    assert same_bits(kind.run(model), expected)
    value = nn.Parameter(own.detach().clone(), requires_grad=False)
    setattr(owner, kind.attribute, value)
    own.data.zero_()
    assert getattr(owner, kind.attribute) is value
    assert same_bits(kind.run(model), expected)
    model.load_state_dict(state, assign=True)
    value.data.zero_()
    assert same_bits(kind.run(model), expected)
    randlora.eject(model)
    assert getattr(owner, kind.attribute).data_ptr() == state[kind.parameter_fqn].data_ptr()

"""The laws of adapter layers whose weight is read, for every row of the table."""

import copy
import pickle
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import MergeError, TargetError
from randlora.layers import registry
from randlora.targets.walk import Census
from tests.in_place_models import register
from tests.kit import all_bits, assert_unchanged, same_bits, snapshot, untouched
from tests.laws import assert_close, needs_export
from tests.read_kinds import (
    CONVOLUTIONS,
    EMBEDDINGS,
    READ_KINDS,
    ReadKind,
    every_read_kind,
    every_read_kind_and_dtype,
)

SHAPED = pytest.mark.parametrize("basis", ["dense", "block"])


def gradients(kind: ReadKind, model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    output = kind.run(model, dtype)
    factors = torch.linspace(0.5, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * factors).sum(), tuple(randlora.trainable_parameters(model)))


def test_the_table_has_a_row_for_every_weight_of_torchs_modules() -> None:
    served = {
        (type(kind.layer(kind.adapted())), parent) for kind in READ_KINDS for parent in type(kind.build()).__mro__
    }
    registered = {
        (layer, name)
        for name, layers in registry._readers.items()
        for layer in layers.values()
        if name.startswith("torch.")
    }
    assert registered
    assert registered <= {(layer, registry._name(parent)) for layer, parent in served}


@every_read_kind
def test_the_kind_and_the_name_are_those_of_the_row(kind: ReadKind) -> None:
    model = kind.adapted()
    (site,) = Census.of(model).adapted
    assert (site.fqn, site.layer_class.kind) == (kind.target, kind.kind)


# Identity and the contract


@every_read_kind_and_dtype
@SHAPED
def test_a_fresh_adapter_leaves_every_bit_of_the_output(kind: ReadKind, dtype: torch.dtype, basis: str) -> None:
    model = kind.adapted(dtype, filled=False, basis=basis)
    assert same_bits(kind.run(model, dtype), kind.run(kind.model(dtype), dtype))


@every_read_kind_and_dtype
@SHAPED
@pytest.mark.parametrize("r", [1, 3, 8])
def test_the_output_is_that_of_the_weight_and_the_oracles_update(
    kind: ReadKind, dtype: torch.dtype, basis: str, r: int
) -> None:
    model, base = kind.adapted(dtype, r=r, basis=basis), kind.model(dtype)
    update = kind.oracle_update(model)
    changed = kind.changed(base, update)
    given = tuple(part.double() if part.is_floating_point() else part for part in kind.arguments(dtype))
    expected = changed.get_submodule("0")(*given)
    assert (expected - base.double()[0](*given)).abs().max() > 0.01
    found = kind.run(model, dtype)
    assert found.dtype == dtype
    assert_close(found, expected, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert_close(randlora.delta_weight(model, kind.target), update, wide)
    assert_close(getattr(model[0], kind.attribute), kind.weight(changed), dtype)


@every_read_kind
@SHAPED
def test_gradients_are_those_of_an_update_formed_by_plain_autograd(kind: ReadKind, basis: str) -> None:
    model, plain = kind.adapted(torch.float64, basis=basis), kind.model(torch.float64)
    layer = kind.layer(model)
    part = layer.adapters["default"]
    lam, gamma = (value.detach().double().requires_grad_() for value in layer.diagonals_of(model[0], "default"))
    sides = max(part.shape[-2:]), min(part.shape[-2:])
    A, B = part.basis.slices(*sides, device="cpu", dtype=torch.float64)
    UA = (lam[..., None] * A.squeeze(1)[:, None] * gamma[..., None, :, :]).flatten(-3, -2)
    update = part.scaling * B.flatten(1) @ UA
    update = update if part.shape[-1] == sides[1] else update.mT
    weight = kind.weight(plain)
    names = {f"0.{kind.attribute}": weight + kind.in_layout(update, weight)}
    output = torch.func.functional_call(plain, names, kind.arguments(torch.float64))
    factors = torch.linspace(0.5, 2, output.numel(), dtype=output.dtype).view(output.shape)
    expected = torch.autograd.grad((output * factors).sum(), (lam, gamma))
    for found, own in zip(gradients(kind, model, torch.float64), expected, strict=True):
        assert own.abs().max() > 0
        assert_close(found, own, torch.float32)


@every_read_kind
def test_transforms_compute_the_same_gradients(kind: ReadKind) -> None:
    model = kind.adapted()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = gradients(kind, model)

    def loss(values: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, kind.arguments())
        return (output * torch.linspace(0.5, 2, output.numel()).view(output.shape)).sum()

    found = torch.func.grad(loss)({name: model.get_parameter(name) for name in names})
    for name, own in zip(names, expected, strict=True):
        assert_close(found[name], own, torch.float32)


@every_read_kind
def test_only_the_adapter_gets_gradients_and_the_bias_none(kind: ReadKind) -> None:
    model = kind.adapted()
    kind.run(model).square().sum().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_grad == {f"0.{name}.default" for name in kind.layer(model).parameter_names()}


@every_read_kind
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(kind: ReadKind, reentrant: bool) -> None:
    model = kind.adapted()
    kind.run(model).square().sum().backward()
    expected = [parameter.grad for parameter in randlora.trainable_parameters(model)]
    model.zero_grad()
    start = torch.ones((), requires_grad=True)  # without it a reentrant segment of indices gets no gradient

    def segment(start: Tensor) -> Tensor:
        return kind.run(model) * start

    checkpoint(segment, start, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip(randlora.trainable_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@every_read_kind
def test_autocast_computes_the_same(kind: ReadKind) -> None:
    model, base = kind.adapted(), kind.model()
    expected = kind.run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, own = kind.run(model), kind.run(base)
    assert found.dtype == own.dtype
    assert_close(found, expected, own.dtype)


# Merging and ejecting


@every_read_kind_and_dtype
def test_a_merged_weight_is_the_exact_sum_rounded_once_and_unmerging_restores_every_bit(
    kind: ReadKind, dtype: torch.dtype
) -> None:
    model, base = kind.adapted(dtype), kind.model(dtype)
    before, adapted = snapshot(model), kind.run(model, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    delta = randlora.delta_weight(model, kind.target).detach()
    weight = kind.weight(base)
    expected = (weight.to(wide) + kind.in_layout(delta, weight)).to(dtype)
    with randlora.merged(model):
        assert same_bits(kind.weight(model), expected)
        assert kind.weight(model).stride() == weight.stride() or 1 in weight.shape
        assert_close(kind.run(model, dtype), adapted, dtype)
        if kind.is_whole_read:
            assert same_bits(kind.run(model, dtype), adapted)
    assert_unchanged(model, before)
    assert same_bits(kind.run(model, dtype), adapted)
    randlora.merge(model)
    assert type(model[0]) is type(base[0])
    assert same_bits(kind.weight(model), expected)
    assert model.state_dict().keys() == base.state_dict().keys()


@every_read_kind
def test_ejecting_gives_back_every_object_and_every_bit(kind: ReadKind) -> None:
    model = kind.model()
    owner, before = model[0], snapshot(model)
    strides = kind.weight(model).stride()
    randlora.inject(model, r=3, targets=[kind.target])
    assert model[0] is owner
    assert isinstance(owner, type(kind.model()[0]))
    with randlora.merged(model):
        pass
    assert randlora.eject(model) == (kind.target,)
    assert_unchanged(model, before)
    assert type(owner) is type(kind.model()[0])
    assert kind.weight(model).stride() == strides


@every_read_kind
def test_merging_in_a_state_dict_of_a_merged_model_counts_no_adapter_twice(kind: ReadKind) -> None:
    model = kind.adapted()
    with randlora.merged(model):
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert same_bits(saved[f"0.{kind.attribute}"], kind.weight(kind.model()))


@every_read_kind
def test_a_merge_that_would_not_be_finite_changes_nothing(kind: ReadKind) -> None:
    model = kind.adapted()
    with torch.no_grad():
        kind.layer(model).diagonals_of(model[0], "default")[0].fill_(float("nan"))
    with untouched(model), pytest.raises(MergeError, match="would not be finite"):
        randlora.merge(model)


# Files, copies and several adapters


@every_read_kind
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_saved_adapter_loads_into_a_model_of_any_dtype(
    kind: ReadKind, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    own, other = dtypes
    model = kind.adapted(own)
    report = randlora.save(model, tmp_path)
    assert any(note.startswith("PEFT cannot load this adapter") for note in report.notes)
    same, again = kind.model(own), kind.model(other)
    randlora.load(same, tmp_path)
    assert same_bits(kind.run(same, own), kind.run(model, own))
    randlora.load(again, tmp_path)
    for first, second in zip(
        kind.layer(model).diagonals_of(model[0], "default"),
        kind.layer(again).diagonals_of(again[0], "default"),
        strict=True,
    ):
        assert same_bits(first, second)
    assert_close(kind.run(again, other), kind.run(model, own), torch.bfloat16)


@every_read_kind
def test_a_checkpoint_of_the_base_loads_before_and_after(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.model()
    expected = all_bits({name: tensor + 1 for name, tensor in other.state_dict().items()})
    missing, unexpected = model.load_state_dict(
        {name: tensor + 1 for name, tensor in other.state_dict().items()}, strict=False
    )
    assert not unexpected
    assert set(missing) == {f"0.{name}.default" for name in kind.layer(model).parameter_names()}
    randlora.eject(model)
    assert all_bits(model.state_dict()) == expected


@every_read_kind
def test_adapters_are_independent_and_add_up(kind: ReadKind) -> None:
    model, base = kind.adapted(), kind.model(torch.float64)
    alone = kind.run(model)
    randlora.inject(model, r=2, alpha=4, targets=[kind.target], name="other", basis="block", stream="portable")
    with torch.no_grad():
        for value in kind.layer(model).diagonals_of(model[0], "other"):
            value.add_(0.2)
    assert same_bits(kind.run(model), alone)
    randlora.activate(model, {"default": 0.5, "other": -1.0})
    changed = kind.changed(base, 0.5 * kind.oracle_update(model), -kind.oracle_update(model, "other"))
    assert_close(kind.run(model), kind.run(changed, torch.float64), torch.float32)
    randlora.activate(model, "default")
    randlora.remove(model, "other")
    assert same_bits(kind.run(model), alone)
    with randlora.disabled(model):
        assert same_bits(kind.run(model), kind.run(kind.model()))
        assert getattr(model[0], kind.attribute) is kind.weight(model)


@every_read_kind
def test_copies_and_pickles_compute_the_same_and_are_their_own(kind: ReadKind) -> None:
    model = kind.adapted()
    expected = kind.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(kind.run(twin), expected)
        with torch.no_grad():
            kind.layer(twin).diagonals_of(twin[0], "default")[0].zero_()
        assert not torch.equal(kind.run(twin), expected)
        randlora.eject(twin)
        assert same_bits(kind.run(twin), kind.run(kind.model()))
    assert same_bits(kind.run(model), expected)


# Hooks, devices and compilers


@every_read_kind
def test_hooks_run_once_and_see_the_adapted_output(kind: ReadKind) -> None:
    model = kind.adapted()
    seen: list[Any] = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    output = model[0](*kind.arguments())
    assert len(seen) == 2
    assert seen[1] is output


@every_read_kind
def test_the_input_may_be_given_by_name(kind: ReadKind) -> None:
    model = kind.adapted()
    assert same_bits(model[0](input=kind.arguments()[0]), kind.run(model))


@every_read_kind
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading_gives_the_same_at_each_point(kind: ReadKind, when: str, tmp_path: Path) -> None:
    expected, plain = kind.run(kind.adapted()).detach(), kind.run(kind.model()).detach()
    randlora.save(kind.adapted(), tmp_path)
    model = kind.model()
    steps = [
        lambda: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
        lambda: randlora.load(model, tmp_path),
    ]
    for step in steps if when == "before" else reversed(steps):
        step()
    assert kind.weight(model).is_meta
    with torch.no_grad():
        assert torch.equal(kind.run(model), expected)
        with randlora.disabled(model):
            assert torch.equal(kind.run(model), plain)
        remove_hook_from_submodules(model)
        assert torch.equal(kind.run(model), expected)
    randlora.eject(model)
    assert torch.equal(kind.run(model), plain)
    assert model[0].forward.__func__ is type(kind.model()[0]).forward  # type: ignore[attr-defined]


@every_read_kind
def test_a_model_on_meta_is_planned_adapted_and_given_values_later(kind: ReadKind) -> None:
    with torch.device("meta"):
        model = nn.Sequential(kind.build())
    planned = randlora.plan(model, r=3, alpha=6, targets=[kind.target], stream="portable")
    randlora.inject(model, r=3, alpha=6, targets=[kind.target], stream="portable")
    assert all(parameter.is_meta for parameter in model.parameters())
    given = tuple(part.to("meta") for part in kind.arguments())
    assert model[0](*given).shape == kind.run(kind.model()).shape
    assert planned.trainable_parameters == sum(p.numel() for p in randlora.trainable_parameters(model))
    model.to_empty(device="cpu")
    model.load_state_dict(kind.adapted().state_dict())
    assert same_bits(kind.run(model), kind.run(kind.adapted()))


@pytest.mark.medium
@every_read_kind
def test_compiling_gives_one_graph_and_the_same_values(kind: ReadKind) -> None:
    model = kind.adapted()
    expected, own = kind.run(model), gradients(kind, model)
    compiled = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    found = compiled(*kind.arguments())
    assert_close(found, expected, torch.float32)
    factors = torch.linspace(0.5, 2, found.numel()).view(found.shape)
    again = torch.autograd.grad((found * factors).sum(), tuple(randlora.trainable_parameters(model)))
    for first, second in zip(again, own, strict=True):
        assert_close(first, second, torch.float32)


@pytest.mark.medium
@needs_export
@every_read_kind
def test_an_exported_program_computes_the_same(kind: ReadKind) -> None:
    model = kind.adapted()
    program = torch.export.export(model, kind.arguments(), strict=True)
    assert_close(program.module()(*kind.arguments()), kind.run(model), torch.float32)


# What is refused, and what stands beside


@every_read_kind
def test_dropout_is_refused_before_anything_changes(kind: ReadKind) -> None:
    model = kind.model()
    with untouched(model), pytest.raises(TargetError, match=rf"{kind.target} is a weight that .* dropout"):
        randlora.inject(model, r=3, targets=[kind.target], dropout=0.1)


@every_read_kind
def test_a_problem_elsewhere_leaves_the_module_as_it_was(kind: ReadKind) -> None:
    model = nn.Sequential(kind.model()[0], nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int32), requires_grad=False)
    with untouched(model), pytest.raises(TargetError, match=r"1 has a weight of torch\.int32"):
        randlora.inject(model, r=3, targets=[kind.target, "1"])


@every_read_kind
def test_a_weight_computed_by_a_parametrization_is_refused_and_one_of_another_parameter_is_not(kind: ReadKind) -> None:
    model = kind.model()
    parametrizations.weight_norm(model[0], kind.attribute)
    with untouched(model), pytest.raises(TargetError, match="computes its weight from other parameters"):
        randlora.inject(model, r=3, targets=[kind.target])


@every_read_kind
def test_a_weight_that_is_tied_is_refused(kind: ReadKind) -> None:
    model = nn.Sequential(kind.model()[0], kind.model()[0])
    setattr(model[1], kind.attribute, getattr(model[0], kind.attribute))
    with untouched(model), pytest.raises(TargetError, match=r"is tied to 1\."):
        randlora.inject(model, r=3, targets=[kind.target])


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *EMBEDDINGS], ids=lambda kind: kind.name)
def test_the_update_has_a_row_for_each_first_index_of_the_weight(kind: ReadKind) -> None:
    model = kind.adapted()
    rows = kind.weight(model).flatten(1)
    assert randlora.delta_weight(model, kind.target).shape == kind.layer(model).shape == rows.shape


def test_a_callable_is_asked_once_for_a_module_whose_weight_is_read() -> None:
    asked: list[str] = []

    def wanted(fqn: str, _: nn.Module) -> bool:
        asked.append(fqn)
        return True

    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(6, 6))
    assert randlora.plan(model, r=2, targets=wanted).targets == ("0", "1")
    assert asked == ["0", "1"]


def test_all_linear_leaves_convolutions_and_embeddings_out(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    model = nn.Sequential(nn.Embedding(8, 6), nn.Conv1d(8, 8, 1), nn.Linear(6, 6), nn.Linear(6, 2))
    assert randlora.plan(model, r=2, targets="all-linear").targets == ("2", "3")
    assert randlora.plan(model, r=2, targets=r"\d").targets == ("0", "1", "2", "3")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_convolution_is_refused_as_a_target_and_is_no_matter_elsewhere() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(TargetError, match="0 has no shape yet: run one forward pass first"):
        randlora.inject(model, r=2, targets=["0", "1"])
    assert randlora.inject(model, r=2, targets=["1"]).targets == ("1",)
    randlora.eject(model)
    model(torch.randn(1, 3, 8, 8))
    assert randlora.inject(model, r=2, targets=["0"]).rows[0].in_features == 27


def test_a_layer_made_without_values_is_adapted() -> None:
    layer = nn.utils.skip_init(nn.Conv2d, 3, 4, 3)
    nn.init.ones_(layer.weight)
    model, image = nn.Sequential(layer), torch.randn(1, 3, 5, 5)
    expected = model(image)
    randlora.inject(model, r=2, targets=["0"])
    assert same_bits(model(image), expected)

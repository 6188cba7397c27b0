"""Weights that other code reads beside hooks, offloading, compilers, parametrizations, and what is assigned."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import randlora
from randlora.errors import AdapterError, TargetError
from tests.kit import all_bits, fill, same_bits, untouched
from tests.laws import assert_close, needs_compiler, needs_export
from tests.read_kinds import (
    ATTENTION,
    COMPILED,
    FAMILIES,
    READ_KINDS,
    ReadKind,
    every_family,
    every_read_kind_of_one_graph,
    or_medium,
    output_of,
    weighted,
)

# Hooks


@every_family
def test_hooks_run_once_and_see_the_adapted_output(kind: ReadKind) -> None:
    model = kind.adapted()
    seen: list[Any] = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    output = model[0](*kind.arguments())
    assert len(seen) == 2
    assert seen[1] is output
    randlora.eject(model)
    model[0](*kind.arguments())
    assert len(seen) == 4


@pytest.mark.parametrize(
    "kind",
    [kind for kind in READ_KINDS if kind.name in FAMILIES and "transposed" not in kind.name],  # has other names
    ids=lambda kind: kind.name,
)
def test_arguments_may_be_given_by_name(kind: ReadKind) -> None:
    model = kind.adapted()
    names = inspect.signature(type(kind.model()[0]).forward).parameters
    given = dict(zip(list(names)[1:], kind.arguments(), strict=False))
    assert same_bits(output_of(model[0](**given)), kind.run(model))


# accelerate


def offload(model: nn.Module) -> None:
    """Offload a model; attention needs all its weights at once."""
    at_once = ["MultiheadAttention", "AdaptedMultiheadAttention"]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=at_once)


@pytest.mark.parametrize(
    ("kind", "when", "is_ejected_first"),
    [
        or_medium(is_ejected_first == (when == "after"), kind, when, is_ejected_first)
        for kind in READ_KINDS
        if kind.name in FAMILIES
        for when in ("before", "after")
        for is_ejected_first in (False, True)
        if not (kind in ATTENTION and when == "before")
    ],
    ids=lambda value: value.name if isinstance(value, ReadKind) else str(value),
)
@torch.no_grad()
def test_offloading_gives_the_same_at_each_point(
    kind: ReadKind, when: str, is_ejected_first: bool, tmp_path: Path
) -> None:
    model = kind.model().requires_grad_(False)
    expected, plain = kind.run(kind.adapted()), kind.run(model)
    randlora.save(kind.adapted(), tmp_path)
    if when == "before":
        offload(model)
    randlora.load(model, tmp_path)
    if when == "after":
        offload(model)
    assert kind.weight(model).is_meta
    assert torch.equal(kind.run(model), expected)
    with randlora.disabled(model):
        assert torch.equal(kind.run(model), plain)
    if is_ejected_first and kind in ATTENTION:
        with untouched(model), pytest.raises(AdapterError, match=r"together with .*: remove accelerate's hooks first"):
            randlora.eject(model)
    elif is_ejected_first:
        randlora.eject(model)
        assert torch.equal(kind.run(model), plain)
    remove_hook_from_submodules(model)
    if randlora.adapters(model):
        assert torch.equal(kind.run(model), expected)
        randlora.eject(model)
    assert torch.equal(kind.run(model), plain)
    for fqn, module in kind.model().named_modules():
        assert type(model.get_submodule(fqn)) is type(module)
        assert model.get_submodule(fqn).forward.__func__ is type(module).forward  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ATTENTION, ids=lambda kind: kind.name)
def test_what_is_offloaded_as_a_whole_cannot_be_adapted_in_part(kind: ReadKind, tmp_path: Path) -> None:
    randlora.save(kind.adapted(), tmp_path)
    model = kind.model()
    offload(model)
    problem = rf"{kind.target} is offloaded by accelerate together with everything in MultiheadAttention.* after"
    with untouched(model), pytest.raises(TargetError, match=problem):
        randlora.inject(model, **kind.adapter_options)
    with untouched(model), pytest.raises(randlora.errors.RandLoRAError, match=problem):
        randlora.load(model, tmp_path)


# Models without values


@every_family
def test_a_model_on_meta_is_planned_adapted_and_given_values_later(kind: ReadKind) -> None:
    with torch.device("meta"):
        model = nn.Sequential(kind.build())
    planned = randlora.plan(model, **kind.adapter_options)
    randlora.inject(model, **kind.adapter_options)
    assert all(parameter.is_meta for parameter in model.parameters())
    if kind.is_one_graph:
        given = tuple(part.to("meta") for part in kind.arguments())
        assert output_of(model[0](*given)).shape == kind.run(kind.model()).shape
    assert planned.trainable_parameters == sum(p.numel() for p in randlora.trainable_parameters(model))
    model.to_empty(device="cpu")
    model.load_state_dict(kind.adapted().state_dict())
    assert same_bits(kind.run(model), kind.run(kind.adapted()))


@every_family
def test_a_module_made_without_values_as_by_skip_init_is_adapted(kind: ReadKind) -> None:
    with torch.device("meta"):
        model = nn.Sequential(kind.build())
    model.to_empty(device="cpu")  # which is what skip_init does
    randlora.inject(model, **kind.adapter_options)
    model.load_state_dict(kind.model().state_dict(), strict=False)
    assert same_bits(kind.run(fill(model)), kind.run(kind.adapted()))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_convolution_is_refused_as_a_target_and_is_no_matter_elsewhere() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(TargetError, match="0 has no shape yet: run one forward pass first"):
        randlora.inject(model, r=2, targets=["0", "1"])
    assert randlora.inject(model, r=2, targets=["1"]).targets == ("1",)
    randlora.eject(model)
    model(torch.randn(1, 3, 8, 8))
    assert randlora.inject(model, r=2, targets=["0"]).rows[0].in_features == 27


# Compilers


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
@needs_compiler
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind.name in (*COMPILED, "experts-down") else [pytest.mark.slow])
        for kind in READ_KINDS
        if kind.is_one_graph or kind.name in ("experts-gate_up-shared", "experts-down")
    ],
    ids=lambda kind: kind.name,
)
def test_compiling_gives_the_same_values_and_one_graph_where_no_value_decides(kind: ReadKind) -> None:
    model = kind.adapted()
    expected, own = kind.run(model), kind.gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model[0], fullgraph=kind.is_one_graph, backend="aot_eager")
    found = output_of(compiled(*kind.arguments()))
    assert_close(found, expected, torch.float32)
    again = torch.autograd.grad(weighted(found), tuple(randlora.trainable_parameters(model)))
    for first, second in zip(again, own, strict=True):
        assert_close(first, second, torch.float32)


@pytest.mark.medium
@needs_export
@every_read_kind_of_one_graph
def test_an_exported_program_computes_the_same(kind: ReadKind) -> None:
    model = kind.adapted()
    program = torch.export.export(model[0], kind.arguments(), strict=True)
    assert_close(output_of(program.module()(*kind.arguments())), kind.run(model), torch.float32)


# Parametrizations and ties


@every_family
def test_a_weight_computed_by_a_parametrization_is_refused(kind: ReadKind) -> None:
    model = kind.model()
    parametrizations.weight_norm(kind.owner(model), kind.attribute)
    with untouched(model), pytest.raises(TargetError, match=rf"{kind.target} computes its weight from other param"):
        randlora.inject(model, **kind.adapter_options)


@every_family
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_computed_by_weight_norm_of_old_is_refused(kind: ReadKind) -> None:
    model = kind.model()
    torch.nn.utils.weight_norm(kind.owner(model), kind.attribute)
    with untouched(model), pytest.raises(TargetError, match=rf"{kind.target} computes its weight from other param"):
        randlora.inject(model, **kind.adapter_options)


@every_family
@torch.no_grad()
def test_weight_norm_of_another_module_stands_beside(kind: ReadKind) -> None:
    model = nn.Sequential(kind.model()[0], parametrizations.weight_norm(nn.Linear(3, 3)))
    x = torch.randn(2, 3)
    normed, before = model[1](x), all_bits(model.state_dict())
    randlora.inject(model, **kind.adapter_options)
    assert same_bits(kind.run(fill(model)), kind.run(kind.adapted()))
    assert same_bits(model[1](x), normed)
    randlora.eject(model)
    assert all_bits(model.state_dict()) == before


@every_family
def test_a_weight_that_is_tied_is_refused(kind: ReadKind) -> None:
    model = nn.Sequential(kind.model()[0], kind.model()[0])
    setattr(model.get_submodule(kind.owner_fqn.replace("0", "1")), kind.attribute, kind.weight(model))
    with untouched(model), pytest.raises(TargetError, match=rf"the weight of {kind.target} is tied to 1\."):
        randlora.inject(model, **kind.adapter_options)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in READ_KINDS
        if kind.name in FAMILIES and "bias" in dict(kind.owner(kind.model()).named_parameters())
    ],
    ids=lambda kind: kind.name,
)
def test_a_parametrization_of_the_bias_is_refused_too(kind: ReadKind) -> None:
    model = kind.model()
    parametrize.register_parametrization(kind.owner(model), "bias", nn.Identity())
    with untouched(model), pytest.raises(TargetError, match=rf"{kind.target} computes other parameters by a param"):
        randlora.inject(model, **kind.adapter_options)


@every_family
def test_a_weight_that_is_read_can_be_assigned_and_is_the_base_of_the_update(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    owner, own = kind.owner(model), kind.weight(model)
    assert getattr(owner, kind.attribute) is own
    value = nn.Parameter(own.detach() * 2, requires_grad=False)
    setattr(owner, kind.attribute, value)
    assert getattr(owner, kind.attribute) is value
    with torch.no_grad():
        kind.weight(other).mul_(2)
    assert same_bits(kind.run(model), kind.run(other))
    randlora.eject(model)
    assert getattr(owner, kind.attribute) is value


@every_family
def test_what_code_writes_into_a_weight_outside_of_a_forward_is_kept(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    getattr(kind.owner(model), kind.attribute).data.mul_(2)
    with torch.no_grad():
        kind.owner(other).get_parameter(kind.attribute).mul_(2)
    assert same_bits(kind.run(model), kind.run(other))


@every_family
def test_loading_may_assign_weights(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    with torch.no_grad():
        kind.owner(other).get_parameter(kind.attribute).mul_(2)
    state = {name: value.clone() for name, value in other.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert same_bits(kind.run(model), kind.run(other))
    assert kind.owner(model).get_parameter(kind.attribute).data_ptr() == state[kind.parameter_fqn].data_ptr()


REWRITES: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm-old": torch.nn.utils.weight_norm,
    "spectral_norm-old": torch.nn.utils.spectral_norm,
    "prune": prune.identity,
    "parametrize": lambda owner, name: parametrize.register_parametrization(owner, name, nn.Identity()),
}


@every_family
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_a_weight_that_is_computed_since_is_an_error_of_the_forward_that_would_lose_the_update(
    kind: ReadKind, rewrite: Callable[[nn.Module, str], Any]
) -> None:
    if kind.place == "out_proj":
        pytest.skip("no forward of it runs: docs/limits.md")
    model = kind.adapted()
    rewrite(kind.owner(model), kind.attribute)
    with pytest.raises(AdapterError, match=rf"{kind.attribute} of an adapted \w+ is no longer a parameter"):
        kind.run(model)


@every_family
def test_a_parametrization_can_be_removed_again(kind: ReadKind) -> None:
    model = kind.adapted()
    before, owner = kind.run(model), kind.owner(model)
    parametrize.register_parametrization(owner, kind.attribute, nn.Identity())
    parametrize.remove_parametrizations(owner, kind.attribute)
    assert same_bits(kind.run(model), before)
    randlora.eject(model)


def test_a_merged_layer_can_be_fused() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)).eval()
    randlora.inject(model, r=3, targets=["0"])
    with torch.no_grad():
        for parameter in randlora.trainable_parameters(model):
            parameter.fill_(0.3)
    x = torch.randn(2, 8, 5)
    expected, merged = model(x), copy.deepcopy(model)
    randlora.merge(merged)
    assert_close(fusion.fuse_conv_bn_eval(*merged)(x), expected, torch.float32)

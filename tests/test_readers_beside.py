"""Weights that other code reads beside hooks, offloading, compilers, parametrizations, and what is assigned."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import randlora
from randlora.errors import AdapterError, TargetError
from tests.kit import same_bits, untouched
from tests.laws import assert_close, needs_compiler, needs_export
from tests.read_kinds import ATTENTION, READ_KINDS, ReadKind, every_family, output_of, weighted


@every_family
def test_hooks_run_once_and_see_the_adapted_output_and_arguments_may_be_given_by_name(kind: ReadKind) -> None:
    model = kind.adapted()
    seen: list[Any] = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    output = model[0](*kind.arguments())
    assert len(seen) == 2
    assert seen[1] is output
    if "transposed" not in kind.name:  # which has other names
        names = list(inspect.signature(type(kind.model()[0]).forward).parameters)[1:]
        assert same_bits(output_of(model[0](**dict(zip(names, kind.arguments(), strict=False)))), output_of(output))
    randlora.eject(model)
    del seen[:]
    model[0](*kind.arguments())
    assert len(seen) == 2


# accelerate


def offload(model: nn.Module) -> None:
    """Offload a model; attention needs all its weights at once."""
    at_once = ["MultiheadAttention", "AdaptedMultiheadAttention"]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=at_once)


@every_family
@pytest.mark.parametrize("is_before", [False, True])
@torch.no_grad()
def test_offloading_gives_the_same_at_each_point(kind: ReadKind, is_before: bool, tmp_path: Path) -> None:
    model = kind.model().requires_grad_(False)
    expected, plain = kind.run(kind.adapted()), kind.run(model)
    randlora.save(kind.adapted(), tmp_path)
    if is_before:
        offload(model)
    if is_before and kind in ATTENTION:
        problem = rf"{kind.target} is offloaded by accelerate together with everything in MultiheadAttention.* after"
        with untouched(model), pytest.raises(TargetError, match=problem):
            randlora.inject(model, **kind.adapter_options)
        with untouched(model), pytest.raises(randlora.errors.RandLoRAError, match=problem):
            randlora.load(model, tmp_path)
        return
    randlora.load(model, tmp_path)
    if not is_before:
        offload(model)
    assert kind.weight(model).is_meta
    assert torch.equal(kind.run(model), expected)
    with randlora.disabled(model):
        assert torch.equal(kind.run(model), plain)
    if kind in ATTENTION:
        with untouched(model), pytest.raises(AdapterError, match=r"together with .*: remove accelerate's hooks first"):
            randlora.eject(model)
    elif is_before:
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
        output = output_of(model[0](*given))
        output.sum().backward()
        assert output.shape == kind.run(kind.model()).shape
        assert all(each.grad is not None for each in randlora.trainable_parameters(model))
    assert planned.trainable_parameters == sum(p.numel() for p in randlora.trainable_parameters(model))
    model.to_empty(device="cpu")
    model.load_state_dict(kind.adapted().state_dict())
    assert same_bits(kind.run(model), kind.run(kind.adapted()))


# Compilers: tests/test_compiled_switching.py has blocks of layers


def of_one_graph(*quick: str) -> pytest.MarkDecorator:
    """Parametrize over what compiles to one graph, and experts: `make slow` alone runs all but the quick."""
    kinds = [kind for kind in READ_KINDS if kind.is_one_graph or kind.name in quick]
    rows = [pytest.param(kind, marks=[] if kind.name in quick else [pytest.mark.slow]) for kind in kinds]
    return pytest.mark.parametrize("kind", rows, ids=lambda kind: kind.name)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
@needs_compiler
@of_one_graph("Embedding", "experts-down")
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
@of_one_graph("attention-in_proj-split", "experts-down-square-batched")
def test_an_exported_program_computes_the_same(kind: ReadKind) -> None:
    model = kind.adapted()
    for strict in (True, False):
        program = torch.export.export(model[0], kind.arguments(), strict=strict)
        assert_close(output_of(program.module()(*kind.arguments())), kind.run(model), torch.float32)


# Parametrizations and ties


@every_family
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_that_is_tied_or_computed_by_a_parametrization_is_refused(kind: ReadKind) -> None:
    def refused(model: nn.Module, problem: str) -> None:
        with untouched(model), pytest.raises(TargetError, match=problem):
            randlora.inject(model, **kind.adapter_options)

    for normed in (parametrizations.weight_norm, torch.nn.utils.weight_norm):
        model = kind.model()
        normed(kind.owner(model), kind.attribute)
        refused(model, rf"{kind.target} computes its weight from other param")
    model = kind.model()
    if "bias" in dict(kind.owner(model).named_parameters()):
        parametrize.register_parametrization(kind.owner(model), "bias", nn.Identity())
        refused(model, rf"{kind.target} computes other parameters by a param")
    model = nn.Sequential(kind.model()[0], kind.model()[0])
    setattr(model.get_submodule(kind.owner_fqn.replace("0", "1")), kind.attribute, kind.weight(model))
    refused(model, rf"the weight of {kind.target} is tied to 1\.")


@every_family
def test_a_weight_that_is_read_can_be_written_assigned_and_loaded_and_is_the_base_of_the_update(kind: ReadKind) -> None:
    model, other = kind.adapted(), kind.adapted()
    owner, own = kind.owner(model), kind.weight(model)
    assert getattr(owner, kind.attribute) is own
    with torch.no_grad():
        kind.owner(other).get_parameter(kind.attribute).mul_(2)
    expected, state = kind.run(other), {name: value.clone() for name, value in other.state_dict().items()}
    own.data.mul_(2)
    assert same_bits(kind.run(model), expected)
    value = nn.Parameter(own.detach().clone(), requires_grad=False)
    own.data.zero_()
    setattr(owner, kind.attribute, value)
    assert getattr(owner, kind.attribute) is value
    assert same_bits(kind.run(model), expected)
    value.data.zero_()
    model.load_state_dict(state, assign=True)
    assert same_bits(kind.run(model), expected)
    assert owner.get_parameter(kind.attribute).data_ptr() == state[kind.parameter_fqn].data_ptr()
    randlora.eject(model)
    assert getattr(owner, kind.attribute).data_ptr() == state[kind.parameter_fqn].data_ptr()


REWRITES: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm-old": torch.nn.utils.spectral_norm,
    "prune": prune.identity,
    "parametrize": lambda owner, name: parametrize.register_parametrization(owner, name, nn.Identity()),
}


@every_family
@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_a_weight_that_is_computed_since_is_an_error_of_the_forward_until_that_is_undone(
    kind: ReadKind, rewrite: Callable[[nn.Module, str], Any]
) -> None:
    model = kind.adapted()
    before, owner = kind.run(model), kind.owner(model)
    rewrite(owner, kind.attribute)
    if kind.place != "out_proj":  # no forward of it runs: docs/limits.md
        with pytest.raises(AdapterError, match=rf"{kind.attribute} of an adapted \w+ is no longer a parameter"):
            kind.run(model)
    if rewrite is REWRITES["parametrize"]:
        parametrize.remove_parametrizations(owner, kind.attribute)
        assert same_bits(kind.run(model), before)
        randlora.eject(model)

"""What must hold of a model at any time, given the truth about it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import randlora
from randlora.state import ATTRIBUTE
from tests.kit import bits
from tests.state_machine.truth import Truth

OUTPUT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Of outputs, relative to the largest: what some layers one after the other make of the roundings of a dtype."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of a merged weight, relative to each value, which is rounded once; and to the update, summed in float32."""


def assert_is(model: nn.Module, truth: Truth, held: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Hold a model against the truth; return the Λ and Γ that must be the same objects the next time."""
    assert_adapters_are(model, truth)
    assert_classes_are(model, truth)
    parameters = dict(model.named_parameters())
    assert_values_are(model.state_dict(), truth.state())
    assert_values_are({name: parameters[name] for name in truth.own}, truth.live())
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    assert flags == truth.requires_grad(), "requires_grad"
    replaced = [name for name, parameter in held.items() if parameters.get(name, parameter) is not parameter]
    assert not replaced, f"other objects, which an optimizer does not know: {replaced}"
    if not truth.is_random:
        assert_output_is(model, truth)
    return {name: parameter for name, parameter in parameters.items() if name not in truth.own}


def assert_adapters_are(model: nn.Module, truth: Truth) -> None:
    """Compare what `randlora.adapters` says, and the mode."""
    found = {
        info.name: (info.weight, info.is_trainable, info.is_merged, set(info.train_also), set(info.targets))
        for info in randlora.adapters(model)
    }
    expected = {
        name: (
            adapter.factor,
            adapter.trains,
            name in truth.merged_names,
            set(adapter.copies),
            set(adapter.values),
        )
        for name, adapter in truth.adapters.items()
    }
    assert list(found) == list(expected)
    assert found == expected
    assert all(module.training == truth.training for module in model.modules())


def assert_classes_are(model: nn.Module, truth: Truth) -> None:
    """Check that the owners of adapted weights, and no other modules, are of another class than without adapters."""
    adapted = {weight.name.rpartition(".")[0] for each in truth.adapters.values() for weight in truth.weights_of(each)}
    for fqn, plain in truth.twin.named_modules():
        module = model.get_submodule(fqn)
        assert (type(module) is not type(plain)) == (fqn in adapted), f"{fqn} is a {type(module).__name__}"
        assert isinstance(module, type(plain))
        if fqn not in adapted:
            more = vars(module).keys() ^ vars(plain).keys()
            assert more == ({ATTRIBUTE} if truth.adapters and not fqn else set()), f"{fqn} has {more}"


def assert_values_are(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names and bits."""
    assert found.keys() == expected.keys(), f"names: {sorted(found.keys() ^ expected.keys())}"
    changed = [name for name, value in found.items() if bits(value) != bits(expected[name])]
    assert not changed, f"other bits: {changed}"


def assert_output_is(model: nn.Module, truth: Truth) -> None:
    """Compare the output with that of the twin."""
    with torch.no_grad():
        found: Tensor = model(*truth.arguments())
        assert found.dtype == truth.dtype
        assert_near(found, truth.output(), truth.dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, *, least: float = 1.0, loss: float = 1.0) -> None:
    """Compare relative to the largest value, or to ``least`` if that is larger."""
    scale = max(least, expected.abs().max().item())
    error = (found.double() - expected).abs().max().item()
    assert error <= OUTPUT[dtype] * loss * scale, f"off by {error:.3g} of {scale:.3g}"


def assert_weights_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Compare merged weights, each value within a rounding."""
    for name, value in expected.items():
        error = (found[name].double() - value).abs()
        allowed = ROUNDING[dtype] * value.abs() + min(ROUNDING[dtype], 1e-5) * max(1.0, value.abs().max().item())
        assert found[name].dtype == dtype, name
        assert bool((error <= allowed).all()), f"{name} is off by {error.max().item():.3g} after merging"

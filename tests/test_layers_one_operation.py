"""Where base layer and adapter are computed as one operation, and where the base layer is called as it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import randlora
from randlora import AdapterLayer
from randlora.functional import Compute
from tests.laws import assert_close, fill
from tests.layer_kinds import LayerKind, every_dense_kind, every_kind


def adapted(base: nn.Module, **options: Any) -> tuple[nn.Module, AdapterLayer]:
    model = nn.Sequential(base)
    randlora.inject(model, r=3, alpha=6, targets="all-linear", **options)
    fill(model)
    layer = model[0]
    assert isinstance(layer, AdapterLayer)
    return model, layer


@contextmanager
def never_called(layer: AdapterLayer) -> Iterator[None]:
    """Fail where the base layer runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer.base_layer), "__call__", lambda *_args: pytest.fail("the base layer was called"))
        yield


def expected(layer: AdapterLayer, x: Tensor) -> Tensor:
    output: Tensor = layer.base_layer(x)
    return output + x @ layer.delta_weight({"default": 1.0}).T


@every_kind
@pytest.mark.parametrize("tokens", [1, 40], ids=["few", "many"])
def test_a_plain_layer_is_one_operation(kind: LayerKind, tokens: int) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float32))
    x = torch.randn(tokens, 6)
    wanted = expected(layer, x)
    with never_called(layer) if kind.is_one_operation else nullcontext():
        assert_close(layer(x), wanted, torch.float32)


def test_a_second_adapter_is_added_to_it() -> None:
    model, layer = adapted(nn.Linear(6, 9))
    randlora.inject(model, r=2, targets="all-linear", name="other", new_bases=True)
    fill(model, "other")
    randlora.activate(model, {"default": 0.5, "other": 2.0})
    x = torch.randn(4, 6)
    wanted = layer.base_layer(x) + x @ layer.delta_weight({"default": 0.5, "other": 2.0}).T
    with never_called(layer):
        assert_close(layer(x), wanted, torch.float32)


@every_kind
@pytest.mark.parametrize("compute", get_args(Compute))
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)], ids=str)
def test_what_comes_after_may_change_the_output_in_place(
    kind: LayerKind, compute: Compute, shape: tuple[int, ...]
) -> None:
    """As an activation with ``inplace=True`` does."""
    model, layer = adapted(kind.build(6, 9, True, torch.float32))
    randlora.set_compute(model, compute)
    lam = layer.randlora_lambda["default"]
    x = torch.randn(shape)
    (found,) = torch.autograd.grad(layer(x).relu_().sum(), lam)
    (wanted,) = torch.autograd.grad(expected(layer, x).relu().sum(), lam)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Double the output."""
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A linear layer in all but name."""


def _with_instance_forward(layer: nn.Linear) -> None:
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign, assignment]


def _with_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda _module, _args, output: 2 * output)


def _with_pre_hook(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


@pytest.mark.parametrize("change", [_with_instance_forward, _with_hook, _with_pre_hook])
def test_a_layer_that_does_more_is_called_as_it_is(change: Callable[[nn.Linear], None]) -> None:
    base = nn.Linear(6, 9)
    change(base)
    _, layer = adapted(base)
    x = torch.randn(4, 6)
    assert_close(layer(x), expected(layer, x), torch.float32)


def test_a_forward_of_its_own_runs_and_one_that_is_inherited_need_not() -> None:
    x = torch.randn(4, 6)
    _, doubled = adapted(Doubled(6, 9))
    assert_close(doubled(x), expected(doubled, x), torch.float32)
    _, renamed = adapted(Renamed(6, 9))
    wanted = expected(renamed, x)
    with never_called(renamed):
        assert_close(renamed(x), wanted, torch.float32)


def test_what_is_done_to_all_linear_layers_at_once_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain = torch.randn(4, 6), nn.Linear.forward
    _, layer = adapted(nn.Linear(6, 9))
    monkeypatch.setattr(nn.Linear, "forward", lambda *args: 2 * plain(*args))
    assert_close(layer(x), expected(layer, x), torch.float32)


def test_a_hook_on_all_modules_sees_the_base_layer() -> None:
    x = torch.randn(4, 6)
    seen: list[nn.Module] = []
    _, layer = adapted(nn.Linear(6, 9))
    handle = register_module_forward_hook(lambda module, _args, _output: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.base_layer in seen


def test_a_weight_that_is_computed_later_on_is_read_through_its_layer() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    _, layer = adapted(nn.Linear(6, 9))
    x = torch.randn(4, 6)
    update = layer.delta_weight({"default": 1.0})
    parametrize.register_parametrization(layer.base_layer, "weight", Halved())
    assert_close(layer(x), layer.base_layer(x) + x @ update.T, torch.float32)


def test_a_backward_hook_of_the_base_layer_fires() -> None:
    base = nn.Linear(6, 9)
    seen: list[nn.Module] = []
    base.register_full_backward_hook(lambda module, _inputs, _outputs: seen.append(module))
    _, layer = adapted(base)
    layer(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert seen == [base]


@every_dense_kind
def test_a_weight_and_a_bias_that_somebody_trains_get_their_gradients(kind: LayerKind) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float64))
    layer.double()
    x = torch.randn(40, 6, dtype=torch.float64)
    trained = [parameter.requires_grad_() for parameter in layer.parameters()]
    found = torch.autograd.grad(layer(x).square().sum(), trained)
    wanted = torch.autograd.grad(expected(layer, x).square().sum(), trained)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_dense_kind
def test_an_input_of_another_dtype_fails_as_it_does_on_the_base_layer(kind: LayerKind) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float32))
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError) as own:
        layer.base_layer(x)
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == str(own.value)


@every_kind
@pytest.mark.parametrize("width", [5, 7])
def test_an_input_of_another_width_fails_as_it_does_on_the_base_layer(kind: LayerKind, width: int) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float32))
    x = torch.randn(4, width)
    with pytest.raises(RuntimeError) as own:
        layer.base_layer(x)
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == str(own.value)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_computes_as_it_does_on_the_base_layer(kind: LayerKind, dtype: torch.dtype) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float64 if dtype == torch.float64 else torch.float32))
    x = torch.randn(4, 6).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        assert output.dtype == layer.base_layer(x).dtype
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("basis", ["dense", "block", "very_sparse"])
@pytest.mark.parametrize("compute", get_args(Compute))
def test_autocast_that_is_on_in_backward_alone_changes_no_dtype(basis: str, compute: Compute) -> None:
    """Plain layers allow it."""
    model, layer = adapted(nn.Linear(70, 90), basis=basis)
    randlora.set_compute(model, compute)
    x = torch.randn(4, 70, requires_grad=True)
    leaves = (x, layer.randlora_lambda["default"], layer.randlora_gamma["default"])
    wanted = torch.autograd.grad(layer(x).sum(), leaves)
    output = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output.sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("basis", ["dense", "block", "very_sparse"])
def test_a_base_layer_whose_output_stays_float32_under_autocast_is_added_to_in_float32(basis: str) -> None:
    base = nn.Linear(70, 90)
    base.register_forward_hook(lambda _module, _args, output: output.float())
    _, layer = adapted(base, basis=basis)
    x = torch.randn(4, 70, requires_grad=True)
    update = layer.delta_weight({"default": 1.0})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, own = layer(x), base(x)
    assert output.dtype == torch.float32
    assert_close(output - own, x @ update.T, torch.float32)
    output.sum().backward()
    assert x.grad is not None

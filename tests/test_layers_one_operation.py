"""Where layer and adapter are computed as one operation, and where the layer's own forward runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import randlora
from randlora.functional import Compute
from randlora.layers import AdapterLayer, registry
from randlora.layers.linear import LinearAdapter
from tests.kit import fill
from tests.laws import adapter_layer, assert_close, plain, update_of
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_dense_kind, every_kind


def adapted(layer: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Adapt a layer; return the model that holds it, and the layer."""
    model = nn.Sequential(layer)
    randlora.inject(model, r=3, alpha=6, targets="all-linear", **options)
    fill(model)
    return model, layer


@contextmanager
def never_called() -> Iterator[None]:
    """Fail where a layer's own forward runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLayer, "base_output", lambda *_args: pytest.fail("the layer's own forward was called"))
        yield


def expected(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = plain(layer)(x)
    return output + x @ update_of(layer).T


@every_kind
@pytest.mark.parametrize("tokens", [1, 40], ids=["few", "many"])
def test_a_plain_layer_is_one_operation(kind: LayerKind, tokens: int) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float32))
    x = torch.randn(tokens, 6)
    wanted = expected(layer, x)
    with never_called() if kind.is_one_operation else nullcontext():
        assert_close(layer(x), wanted, torch.float32)


def test_a_second_adapter_is_added_to_it() -> None:
    model, layer = adapted(nn.Linear(6, 9))
    randlora.inject(model, r=2, targets="all-linear", name="other")
    fill(model, "other")
    randlora.activate(model, {"default": 0.5, "other": 2.0})
    x = torch.randn(4, 6)
    wanted = plain(layer)(x) + x @ adapter_layer(layer).delta_weight(layer, {"default": 0.5, "other": 2.0}).T
    with never_called():
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
    lam = layer.get_parameter("randlora_lambda.default")
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


def _with_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _module, _args, output: 2 * output)


def _with_pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


def test_a_forward_of_the_instance_runs_and_comes_back() -> None:
    layer = nn.Linear(6, 9)
    _with_instance_forward(layer)
    own, x = layer.forward, torch.randn(4, 6)
    before = layer(x)
    model, _ = adapted(layer)
    assert_close(layer(x), before + x @ update_of(layer).T, torch.float32)
    randlora.eject(model)
    assert layer.__dict__["forward"] is own


@every_kind
@pytest.mark.parametrize("hook", [_with_hook, _with_pre_hook])
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_hooks_run_around_layer_and_adapter_as_one(
    kind: LayerKind, hook: Callable[[nn.Module], None], is_first: bool
) -> None:
    layer, x = kind.build(6, 9, True, torch.float32), torch.randn(4, 6)
    if is_first:
        hook(layer)
    adapted(layer)
    bare = plain(layer)
    bare._forward_hooks.clear()
    bare._forward_pre_hooks.clear()
    if not is_first:
        hook(layer)
    given = x + 1 if hook is _with_pre_hook else x
    wanted = bare(given) + given @ update_of(layer).T
    assert_close(layer(x), 2 * wanted if hook is _with_hook else wanted, torch.float32)


def test_a_forward_of_its_own_runs_and_one_that_is_inherited_need_not() -> None:
    x = torch.randn(4, 6)
    _, doubled = adapted(Doubled(6, 9))
    assert_close(doubled(x), plain(doubled)(x) + 2 * x @ update_of(doubled).T, torch.float32)
    _, renamed = adapted(Renamed(6, 9))
    wanted = expected(renamed, x)
    with never_called():
        assert_close(renamed(x), wanted, torch.float32)


def test_what_is_done_to_all_linear_layers_at_once_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain = torch.randn(4, 6), nn.Linear.forward
    _, layer = adapted(nn.Linear(6, 9))
    monkeypatch.setattr(nn.Linear, "forward", lambda *args: 2 * plain(*args))
    assert_close(layer(x), expected(layer, x), torch.float32)


def test_a_hook_on_all_modules_sees_the_layer() -> None:
    x = torch.randn(4, 6)
    seen: list[nn.Module] = []
    _, layer = adapted(nn.Linear(6, 9))
    handle = register_module_forward_hook(lambda module, _args, _output: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert seen == [layer]


def test_a_weight_that_is_computed_later_on_is_read_through_its_layer() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    _, layer = adapted(nn.Linear(6, 9))
    x = torch.randn(4, 6)
    update, base = update_of(layer), plain(layer)
    parametrize.register_parametrization(layer, "weight", Halved())
    parametrize.register_parametrization(base, "weight", Halved())
    assert_close(layer(x), base(x) + x @ update.T, torch.float32)


def test_a_backward_hook_of_the_layer_fires() -> None:
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
    weight = adapter_layer(layer).in_storage_layout(layer.get_parameter("weight"))
    output = nn.functional.linear(x, weight + update_of(layer), layer.get_parameter("bias"))
    wanted = torch.autograd.grad(output.square().sum(), trained)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_dense_kind
def test_an_input_of_another_dtype_fails_as_it_does_on_the_plain_layer(kind: LayerKind) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float32))
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError) as own:
        plain(layer)(x)
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == str(own.value)


@every_kind
@pytest.mark.parametrize("width", [5, 7])
def test_an_input_of_another_width_fails_as_it_does_on_the_plain_layer(kind: LayerKind, width: int) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float32))
    x = torch.randn(4, width)
    with pytest.raises(RuntimeError) as own:
        plain(layer)(x)
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == str(own.value)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind in LAYER_KINDS
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        if kind.converts or dtype != torch.float64
    ],
    ids=lambda value: value.name if isinstance(value, LayerKind) else str(value),
)
def test_autocast_computes_as_it_does_on_the_plain_layer(kind: LayerKind, dtype: torch.dtype) -> None:
    _, layer = adapted(kind.build(6, 9, True, torch.float64 if dtype == torch.float64 else torch.float32))
    x = torch.randn(4, 6).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        assert output.dtype == plain(layer)(x).dtype
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
    leaves = (x, layer.get_parameter("randlora_lambda.default"), layer.get_parameter("randlora_gamma.default"))
    wanted = torch.autograd.grad(layer(x).sum(), leaves)
    output = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output.sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


class Widened(nn.Linear):
    """A linear layer that returns float32 whatever it computes in."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the output in float32."""
        return super().forward(input).float()


@pytest.fixture
def _widened_returns_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))
    randlora.layers.register_layer(Widened)(LinearAdapter)


@pytest.mark.usefixtures("_widened_returns_the_product")
@pytest.mark.parametrize("basis", ["dense", "block", "very_sparse"])
def test_a_layer_whose_output_stays_float32_under_autocast_is_added_to_in_float32(basis: str) -> None:
    _, layer = adapted(Widened(70, 90), basis=basis)
    x = torch.randn(4, 70, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, own = layer(x), plain(layer)(x)
    assert output.dtype == torch.float32
    assert_close(output - own, x @ update_of(layer).T, torch.float32)
    output.sum().backward()
    assert x.grad is not None


class Masked(nn.Linear):
    """A linear layer with a further tensor argument."""

    def forward(self, input: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]  # noqa: A002
        """Return the output where the mask is set."""
        return super().forward(input) * mask


def test_the_input_is_known_by_its_name_whatever_the_order() -> None:
    _, layer = adapted(Masked(6, 9))
    x, mask = torch.randn(4, 6), (torch.rand(4, 1) > 0.5).float()
    wanted = layer(x, mask)
    assert torch.equal(layer(input=x, mask=mask), wanted)
    assert torch.equal(layer(mask=mask, input=x), wanted)


def test_an_argument_of_another_name_fails_as_it_does_on_the_plain_layer() -> None:
    _, layer = adapted(nn.Linear(6, 9))
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        layer(foo=torch.randn(4, 6))


def test_a_forward_that_was_taken_from_an_adapted_layer_still_runs_when_it_is_ejected() -> None:
    model, layer = adapted(nn.Linear(6, 9))
    taken, x = layer.forward, torch.randn(4, 6)
    assert torch.equal(taken(x), layer(x))
    randlora.eject(model)
    assert torch.equal(taken(x), layer(x))


def test_a_replica_of_data_parallel_computes_the_same() -> None:
    _, layer = adapted(nn.Linear(6, 9))
    x = torch.randn(4, 6)

    def replica_of(module: nn.Module) -> nn.Module:
        """Make what DataParallel makes on each device: parameters become attributes."""
        twin: nn.Module = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            assert child is not None
            twin._modules[name] = replica_of(child)
        for name, parameter in module._parameters.items():
            assert parameter is not None
            twin.__dict__[name] = parameter.detach().clone()
        return twin

    with torch.no_grad():
        torch.testing.assert_close(replica_of(layer)(x), layer(x))

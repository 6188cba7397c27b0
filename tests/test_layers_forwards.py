"""Where layer and adapter are one operation, where a layer's own forward runs, and what compilers and hooks see."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import pytest
import torch
from sentence_transformers.cross_encoder.model import _Float32Linear
from timm.layers.linear import Linear as ConvertibleLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear

import randlora
from randlora.errors import TargetError
from randlora.functional import Compute
from randlora.layers import AdapterLayer, registry
from randlora.layers.linear import LinearAdapter
from tests.kit import fill, same_bits
from tests.laws import assert_close, plain, update_of
from tests.layer_kinds import LayerKind, every_kind
from tests.read_kinds import or_medium

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def in_model(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Adapt a layer; return the model that holds it, and the layer."""
    model = nn.Sequential(layer)
    randlora.inject(model, r=3, alpha=6, targets="all-linear")
    return fill(model), layer


def expected_of(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = plain(layer)(x)
    return output + x @ update_of(layer).T


@contextmanager
def never_called() -> Iterator[None]:
    """Fail where a layer's own forward runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLayer, "base_output", lambda *_args: pytest.fail("the layer's own forward was called"))
        yield


@every_kind
@pytest.mark.parametrize("compute", get_args(Compute))
def test_a_plain_layer_is_one_operation_and_its_output_may_be_changed_in_place(
    kind: LayerKind, compute: Compute
) -> None:
    model, layer = in_model(kind.build(6, 9, True, torch.float32))
    randlora.set_compute(model, compute)
    lam = layer.get_parameter("randlora_lambda.default")
    for shape in ((6,), (1, 6), (40, 6), (2, 3, 6)):
        x = torch.randn(shape)
        wanted = expected_of(layer, x)
        with never_called() if kind.is_one_operation and len(shape) > 1 else nullcontext():
            assert_close(layer(x), wanted, torch.float32)
            (found,) = torch.autograd.grad(layer(x).relu_().sum(), lam)
        torch.testing.assert_close(found, torch.autograd.grad(wanted.relu().sum(), lam)[0], rtol=1e-4, atol=1e-4)
    base = plain(layer)
    for dtype, width in ((torch.float32, 5), (torch.float32, 7), *([] if kind.is_quantized else [(torch.float64, 6)])):
        x = torch.randn(4, width, dtype=dtype)
        with pytest.raises(RuntimeError) as own:
            base(x)
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(own.value))}$"):
            layer(x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        layer(foo=torch.randn(4, 6))


class Doubled(nn.Linear):
    """A linear layer with a different forward, which takes further arguments."""

    def forward(self, input: Tensor, factor: float | Tensor = 2.0, *, shift: float = 0.0) -> Tensor:  # noqa: A002
        """Return a multiple of the output."""
        return super().forward(input) * factor + shift


class Renamed(nn.Linear):
    """A linear layer in all but name, and the name of its method that writes a state dict."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what any layer does."""
        return super().state_dict(*args, **kwargs)


def test_a_forward_of_its_own_runs_and_one_that_is_inherited_need_not() -> None:
    model, renamed = in_model(Renamed(6, 9))
    assert type(renamed).__name__ == "AdaptedRenamed"
    state = model.state_dict(keep_vars=True)  # without copies
    assert all(held is state[name] for name, held in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    wanted = expected_of(renamed, X)
    randlora.inject(model, r=2, targets="all-linear", name="other")
    fill(model, "other")
    randlora.activate(model, {"default": 1.0, "other": 2.0})
    with never_called():
        assert_close(renamed(X), wanted + 2 * X @ update_of(renamed, "other").T, torch.float32)
    _, doubled = in_model(Doubled(6, 9))
    update, base, mask = update_of(doubled), plain(doubled), (torch.rand(4, 1) > 0.5).float()
    assert_close(doubled(X), base(X) + 2 * X @ update.T, torch.float32)
    wanted = base(X, mask, shift=1.0) + (X @ update.T) * mask
    for found in (doubled(X, mask, shift=1.0), doubled(shift=1.0, factor=mask, input=X)):
        assert_close(found, wanted, torch.float32)


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_hooks_and_forwards_set_on_a_layer_run_around_it_and_come_back(is_first: bool) -> None:
    layer, seen = nn.Linear(6, 9), []
    forward = layer.forward

    def hook() -> None:
        layer.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
        layer.register_forward_hook(lambda _module, _args, output: 2 * output)
        layer.register_full_backward_hook(lambda module, _inputs, _outputs: seen.append(module))

    if is_first:
        hook()
        own = layer.forward = lambda x: 3 * forward(x)  # type: ignore[method-assign, assignment]
    model, _ = in_model(layer)
    if not is_first:
        hook()
    handle = register_module_forward_hook(lambda module, _args, _output: seen.append(module))
    found = layer(X.clone().requires_grad_())
    handle.remove()
    found.sum().backward()
    assert seen == [layer, layer]
    bare = nn.functional.linear(X + 1, layer.weight, layer.bias) * (3 if is_first else 1)
    assert_close(found, 2 * (bare + (X + 1) @ update_of(layer).T), torch.float32)
    taken = layer.forward
    assert torch.equal(2 * taken(X + 1), layer(X))
    randlora.eject(model)
    if is_first:
        assert layer.__dict__["forward"] is own
    else:
        assert torch.equal(2 * taken(X + 1), layer(X))


def test_what_is_done_to_all_linear_layers_to_the_weight_or_to_a_replica_later_on_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    def replica_of(module: nn.Module) -> nn.Module:
        """Make what DataParallel makes on each device: parameters become attributes."""
        twin: nn.Module = module._replicate_for_data_parallel()
        twin._modules |= {name: replica_of(child) for name, child in module.named_children()}
        twin.__dict__ |= {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
        return twin

    _, layer = in_model(nn.Linear(6, 9))
    update, base = update_of(layer), plain(layer)
    with torch.no_grad():
        replica, expected = replica_of(layer), layer(X)
        layer.get_parameter("randlora_lambda.default").add_(1)
        torch.testing.assert_close(replica(X), expected)  # of its own copies
        layer.get_parameter("randlora_lambda.default").sub_(1)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda layer, x: 2 * F.linear(x, layer.weight, layer.bias))
        assert_close(layer(X), base(X) + X @ update.T, torch.float32)
    for each in (layer, base):
        parametrize.register_parametrization(each, "weight", Halved())
    assert_close(layer(X), base(X) + X @ update.T, torch.float32)


# Subclasses of nn.Linear with another forward are adapted so that it reads weight + update, as once merged


def bit(*, online: bool) -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear  # which imports the compiler

    layer: nn.Module = AutoBitLinear(8, 12, online_quant=online, use_rms_norm=online)
    if not online:
        layer.get_buffer("weight_scale").fill_(0.7)
    return layer


READ: dict[str, Callable[[], nn.Module]] = {
    "bit": lambda: bit(online=False),
    "bit online": lambda: bit(online=True),
    "Idefics's head": lambda: IdeficsDecoupledLinear(8, 12, 3),
    "in float32": lambda: _Float32Linear(8, 12),
}
PRODUCTS: dict[str, Callable[[], nn.Module]] = {
    "Falcon": lambda: FalconLinear(8, 12),
    "timm": lambda: ConvertibleLinear(8, 12),
}


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [or_medium(not name.startswith("bit"), name) for name in READ])
def test_another_forward_computes_with_the_update_as_if_it_were_merged(name: str, training: bool) -> None:
    model, x = nn.Sequential(READ[name]()).train(training), torch.randn(4, 8)
    randlora.inject(model, r=2, targets="0")
    fill(model, spread=0.3)
    with torch.compiler.set_stance("force_eager"):  # AutoBitLinear compiles how it rounds
        output = model(x)
        output.sum().backward()
        with torch.no_grad():
            with randlora.merged(model):
                assert same_bits(model(x), output.detach())
            with randlora.disabled(model):
                assert not torch.allclose(model(x), output, atol=0.01)
    trained = [*randlora.trainable_parameters(model)]
    assert len(trained) == 2
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_forward_that_is_known_to_be_the_product_is_added_to_and_dropout_reaches_no_other(name: str) -> None:
    model, x = nn.Sequential(PRODUCTS[name]()), torch.randn(4, 8)
    assert registry.find_layer(model[0]) is LinearAdapter
    randlora.inject(model, r=2, targets="0", dropout=0.1)
    fill(model.eval(), spread=0.3)
    with torch.no_grad(), randlora.merged(model):
        merged = model(x)
    torch.testing.assert_close(model(x), merged, rtol=1e-4, atol=1e-4)
    with pytest.raises(TargetError, match=r"0 is a weight that other code reads, and dropout=0.1 cannot reach"):
        randlora.inject(nn.Sequential(READ["in float32"]()), r=2, targets="0", dropout=0.1)


# The list of the active parameters, which compiled code reads, follows every change of their dictionary

CHANGES: dict[str, Callable[[Any, nn.Parameter], object]] = {  # by the names of the methods
    "__delitem__": lambda values, _: values.__delitem__("b"),
    "__ior__": lambda values, new: values.__ior__({"b": new}),
    "__setitem__": lambda values, new: values.__setitem__("b", new),
    "clear": lambda values, _: values.clear(),
    "pop": lambda values, _: values.pop("b"),
    "popitem": lambda values, _: [values.popitem() for _ in range(2)],
    "setdefault": lambda values, new: (dict.pop(values, "b"), values.setdefault("b", new)),
    "update": lambda values, new: values.update(b=new),
}


@pytest.mark.parametrize("method", CHANGES)
def test_the_list_of_parameters_follows_its_dictionary(method: str) -> None:
    reading = {"copy", "fromkeys", "get", "items", "keys", "values", "__contains__", "__getitem__", "__iter__"}
    reading |= {"__len__", "__reversed__", "__or__", "__ror__", "__class_getitem__"}
    assert set(vars(dict)) - set(vars(object)) - reading == set(CHANGES), "every method is known"
    model = nn.Sequential(nn.Linear(8, 12))
    for name in "bac":
        randlora.inject(model, r=4, targets=["0"], name=name)
    held: Any = model[0]._modules["randlora_lambda"]
    held.randlora_seat(["c", "b"])
    slots, values, before = held.randlora_slots, held._parameters, list(held.randlora_slots)
    CHANGES[method](values, nn.Parameter(torch.randn(4, 2)))
    assert held.randlora_slots is slots
    assert all(slot is values.get(name) for slot, name in zip(slots, ["c", "b"], strict=True))
    assert any(slot is not old for slot, old in zip(slots, before, strict=True))

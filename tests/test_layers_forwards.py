"""Which entry adapts a layer, where its own forward runs, what compilers and hooks see, and what is merged into it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import MergeError, TargetError
from randlora.functional import Compute
from randlora.layers import AdapterLayer, register_layer, registry
from randlora.layers.linear import Conv1DAdapter, LinearAdapter
from randlora.quantized.libraries import CodesAdapter, EetqAdapter, HQQAdapter, TorchaoPackedAdapter
from randlora.readers.read_weight import ReadLinear, ReadWeight
from tests.kit import adapt, fill, same_bits, untouched
from tests.laws import adapter_layer, assert_close, plain, update_of
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_kind
from tests.models import library, reproducible
from tests.read_kinds import or_medium

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))


def other(forward: Callable[..., Any], kind: Any = nn.Linear) -> Any:
    return type("Own", (kind,), {"forward": forward})(*(12, 16) if kind is Conv1D else (16, 12))


def in_model(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(layer)
    return adapt(model, r=3, alpha=6, targets="all-linear"), layer


def expected_of(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = plain(layer)(x)
    return output + x @ update_of(layer).T


@contextmanager
def never_called() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLayer, "base_output", lambda *_args: pytest.fail("the layer's own forward was called"))
        yield


@pytest.mark.product
@every_kind
@pytest.mark.parametrize("compute", get_args(Compute))
def test_a_layer_is_one_operation_whose_output_may_be_changed_in_place(kind: LayerKind, compute: Compute) -> None:
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
    def forward(self, input: Tensor, factor: float | Tensor = 2.0, *, shift: float = 0.0) -> Tensor:  # noqa: A002
        return super().forward(input) * factor + shift


class Renamed(nn.Linear):
    """A linear layer in all but name, and its method that writes its own entries of a state dict and no others."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        written: Any = super().state_dict(*args, **kwargs)
        for name in [name for name in written if "randlora" in name]:
            del written[name]
        return written


def test_a_forward_of_its_own_runs_and_one_that_is_inherited_need_not() -> None:
    model, renamed = in_model(Renamed(6, 9))
    assert type(renamed).__name__ == "AdaptedRenamed"
    state = model.state_dict(keep_vars=True)  # without copies
    assert all(held is state[name] for name, held in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    wanted = expected_of(renamed, X)
    adapt(model, r=2, targets="all-linear", name="other")
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


def test_what_is_done_to_the_weight_or_to_a_replica_later_on_is_done() -> None:
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
    for each in (layer, base):
        parametrize.register_parametrization(each, "weight", nn.Hardtanh(-0.1, 0.1))
    assert_close(layer(X), base(X) + X @ update.T, torch.float32)


def of_models(name: str) -> Any:
    return library(f"transformers.models.{name}.modeling_{name}")


FORWARDS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "bit": (
        lambda: library("transformers.integrations.bitnet").AutoBitLinear(8, 12, online_quant=True, use_rms_norm=True),
        ReadLinear,
    ),
    "Idefics's head": (lambda: of_models("idefics").IdeficsDecoupledLinear(8, 12, 3), ReadLinear),
    "Falcon's product": (lambda: of_models("falcon").FalconLinear(8, 12), LinearAdapter),
    "timm's product": (lambda: library("timm.layers.linear").Linear(8, 12), LinearAdapter),
}


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("name", [or_medium(name != "bit", name) for name in FORWARDS])
def test_another_forward_computes_with_the_update_as_if_it_were_merged(name: str) -> None:
    build, entry = FORWARDS[name]
    model, x, is_read = nn.Sequential(build()), torch.randn(4, 8), entry is ReadLinear
    assert registry.find_layer(model[0]) is entry
    randlora.inject(model, r=2, targets="0", dropout=0.0 if is_read else 0.1)
    fill(model.eval(), spread=0.3)
    with torch.compiler.set_stance("force_eager"):  # AutoBitLinear compiles how it rounds
        output = model(x)
        output.sum().backward()
        with torch.no_grad():
            with randlora.merged(model):
                merged = model(x)
            assert same_bits(merged, output.detach()) or not is_read
            torch.testing.assert_close(merged, output, rtol=1e-4, atol=1e-4)
            with randlora.disabled(model):
                assert not torch.allclose(model(x), output, atol=0.01)
    gradients = [value.grad for value in randlora.trainable_parameters(model)]
    assert [grad is not None and grad.abs().sum().item() > 0 for grad in gradients] == [True, True]


class Swapped(nn.Linear):
    """A linear layer that swaps its inputs' halves: a kind of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input.flip(-1))


class Half(AdapterLayer):
    features = staticmethod(LinearAdapter.features)


class SwappedAdapter(Half):
    in_storage_layout = staticmethod(LinearAdapter.in_storage_layout)


def test_the_table_has_a_row_for_every_registered_kind() -> None:
    models = [nn.Sequential(kind.build(4, 4, True, torch.float32)) for kind in LAYER_KINDS]
    served = {type(adapter_layer(model[0])) for model in models if randlora.inject(model, r=3, targets="all")}
    registered = {entry for name, entry in registry._layers.items() if not name.startswith("tests.")}
    elsewhere = (ReadWeight, CodesAdapter, EetqAdapter, HQQAdapter)  # see tests/test_quantized_libraries.py
    rows = {entry for entry in registered if not (isinstance(entry, registry.Refusal) or issubclass(entry, elsewhere))}
    known = {*registry.BY_WEIGHT.values()} - {TorchaoPackedAdapter}  # see tests/test_quantized_libraries.py
    rows |= known if any(kind.library == "torchao" for kind in LAYER_KINDS) else set()
    assert {layer for layer in served if not layer.__module__.startswith("tests.")} == rows


@pytest.mark.parametrize("entry", [Swapped, f"{__name__}.Swapped"], ids=["type", "name"])
def test_an_entry_of_its_own_comes_before_its_parents(entry: Any) -> None:
    with pytest.raises(TypeError, match="Half cannot be registered without in_storage_layout"):
        register_layer(entry)(Half)
    register_layer(entry)(SwappedAdapter)
    model, x = nn.Sequential(Swapped(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = model(x)
    randlora.inject(model, r=2, targets="all-linear")
    assert [type(adapter_layer(layer)) for layer in model] == [SwappedAdapter, LinearAdapter]
    assert torch.equal(model(x), expected)


def test_a_class_with_a_method_that_would_not_be_called_any_more_is_told_its_new_name() -> None:
    own = classmethod(lambda _, owner: owner.codes)
    with pytest.raises(TypeError, match="Coded overrides weight_of, which would not be called: name it find_weight"):
        type("Coded", (LinearAdapter,), {"weight_of": own})


def test_a_refused_kind_is_refused_by_name_and_skipped_by_all_linear() -> None:
    registry.refuse_layer(Renamed, "it is of no use: exclude it")
    own = of_models("deepseek_v4").DeepseekV4GroupedLinear(8, 16, 4)
    layers = {"refused": Renamed(8, 8), "linear": nn.Linear(8, 8), "own": own}
    model = nn.ModuleDict(layers)
    report = randlora.plan(model, r=2, targets="all-linear")
    assert (report.targets, report.skipped["refused"]) == (("linear",), "it is of no use: exclude it")
    for fqn, message in (("refused", r"\(Renamed\) .*: it is of no use"), ("own", "Grouped.*: its forward multiplies")):
        with pytest.raises(TargetError, match=f"{fqn} .*{message}"):
            randlora.inject(model, r=2, targets=[fqn])


class Marked(Tensor):
    """A kind of weights that is registered."""


class Nearer(Marked):
    """One that has no entry of its own."""


class MarkedAdapter(LinearAdapter):
    """Adapts linear layers with such weights."""


def marked(layer: Any, kind: type[Tensor] = Marked) -> Any:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(kind), requires_grad=False)
    return layer


def test_an_entry_goes_by_the_type_of_the_weight_else_by_the_nearest_class_whose_forward_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(registry.BY_WEIGHT, registry.qualified_name(Marked), MarkedAdapter)
    computed = parametrize.register_parametrization(marked(nn.Linear(2, 2)), "weight", nn.Identity())
    found = [
        (nn.Linear(2, 2), LinearAdapter),
        (Renamed(2, 2), LinearAdapter),
        (Swapped(2, 2), ReadLinear),
        (marked(nn.Linear(2, 2)), MarkedAdapter),
        (marked(nn.Linear(2, 2), Nearer), MarkedAdapter),
        (marked(Renamed(2, 2)), MarkedAdapter),
        (marked(Swapped(2, 2)), MarkedAdapter),
        (computed, MarkedAdapter),
        (marked(Conv1D(2, 2)), Conv1DAdapter),
        (marked(nn.LayerNorm(2)), None),
    ]
    assert [registry.find_layer(layer) for layer, _ in found] == [entry for _, entry in found]
    registry.refuse_layer(Renamed, "it is of no use: exclude it")
    assert registry.find_layer(marked(Renamed(2, 2))) == registry.Refusal("it is of no use: exclude it")


@pytest.mark.parametrize(("what", "got"), [("pair", "got tuple"), ("half", r"got a tensor of shape \(3, 2\)")])
def test_a_forward_that_returns_no_product_is_an_error(what: str, got: str) -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Any:  # noqa: A002
            output = super().forward(input)
            return (output, output) if what == "pair" else output[:, :2]

    register_layer(Odd)(LinearAdapter)
    randlora.inject(model := nn.Sequential(Odd(4, 4)), r=2, targets=["0"])
    message = r"the forward of an adapted Odd must return a tensor of shape \(\.\.\., 4\), .*" + got
    with pytest.raises(TypeError, match=message + ".*randlora.layers.register_layer"):
        model(torch.randn(3, 4))


def product(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def on_instance() -> nn.Module:
    layer = nn.Linear(16, 12)
    own = layer.forward
    layer.forward = lambda x: 1.1 * own(x)  # type: ignore[method-assign, assignment]
    return layer


def rounding(dtype: torch.dtype) -> Any:
    return other(lambda self, x: F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).to(x.dtype))


def counter() -> Any:
    """Make a layer that counts calls, on a buffer and on an attribute, and draws random numbers."""

    def counting(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps = getattr(self, "steps", 0) + 1
        return product(self, x) + torch.randn(())

    layer = other(counting)
    layer.register_buffer("calls", torch.zeros(()))
    return layer


RESPONDS, UNTRIED = (
    r"1 has its own forward \(\w+\), which responds to .*, by \d+% of it\. Leave",
    "which could not be tried: 1;",
)
ADDED: dict[str, tuple[str, Callable[[], Any]]] = {
    "scaled": (RESPONDS, lambda: other(lambda self, x: 1.05 * product(self, x))),
    "rectified": (RESPONDS, lambda: other(lambda self, x: product(self, x).relu())),
    "normed input": (RESPONDS, lambda: other(lambda self, x: product(self, F.rms_norm(x, x.shape[-1:]) * 2))),
    "normed weight": (RESPONDS, lambda: other(lambda self, x: F.linear(x, F.normalize(self.weight), self.bias))),
    "on the instance": (RESPONDS, on_instance),
    "Conv1D, scaled": (RESPONDS, lambda: other(lambda self, x: Conv1D.forward(self, x) * 0.5, Conv1D)),
    "not a number": (UNTRIED, lambda: other(lambda self, x: product(self, x) * torch.nan)),
    "of more arguments": (UNTRIED, lambda: other(lambda self, x, scale: product(self, x) * scale)),
    "in float16": ("", lambda: rounding(torch.float16)),
    "in float64": ("", lambda: rounding(torch.float64)),
    "held in bfloat16": ("", lambda: rounding(torch.float32).to(torch.bfloat16)),
    "dropout": ("", lambda: other(lambda self, x: F.dropout(product(self, x) + 5, 0.5, self.training))),
    "counting": ("", counter),
}
"""Forwards that an adapter is added to, whether or not they read the weight, and what is said when it is merged."""


@pytest.mark.parametrize("name", ADDED)
def test_a_forward_is_merged_into_if_it_is_the_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearAdapter, "as_read", None)
    said, build = ADDED[name]
    model = reproducible(lambda: nn.Sequential(nn.Linear(16, 16), build())).train()
    layer, state = adapt(model, r=4, targets=["0", "1"]).get_submodule("1"), torch.get_rng_state()
    with untouched(model):
        if said == RESPONDS:
            for call in (randlora.merge, randlora.merged_tensors):
                with pytest.raises(MergeError, match=said):
                    call(model)
        else:
            assert [said in note for note in randlora.merge(model, reversible=True).notes] == [True] * bool(said)
            randlora.unmerge(model)
            assert "steps" not in vars(layer)
    assert torch.equal(torch.get_rng_state(), state)


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

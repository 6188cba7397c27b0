"""Which entry adapts a layer, by its type or name, and what is merged into one with its own forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import MergeError, TargetError
from randlora.layers import AdapterLayer, register_layer, registry
from randlora.layers.linear import Conv1DAdapter, LinearAdapter
from randlora.quantized.hqq import HQQAdapter
from randlora.quantized.layer import CodesAdapter, EetqAdapter
from randlora.quantized.torchao import TorchaoPackedAdapter
from randlora.readers.read_weight import ReadLinear, ReadWeight
from tests.kit import fill, untouched
from tests.laws import adapter_layer
from tests.layer_kinds import LAYER_KINDS
from tests.models import reproducible


@pytest.fixture(autouse=True)
def _own_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_layers", dict(registry._layers))


class Swapped(nn.Linear):
    """A linear layer that swaps its inputs' halves: a kind of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input.flip(-1))


class Half(AdapterLayer):
    @staticmethod
    def features(owner: nn.Module) -> tuple[int, int]:
        assert isinstance(owner, Swapped)
        return owner.in_features, owner.out_features


class SwappedAdapter(Half):
    @staticmethod
    def in_storage_layout(delta: Tensor) -> Tensor:
        return delta


class Renamed(nn.Linear):
    """A linear layer in all but name."""


def test_the_table_has_a_row_for_every_registered_kind() -> None:
    models = [nn.Sequential(kind.build(4, 4, True, torch.float32)) for kind in LAYER_KINDS]
    served = {type(adapter_layer(model[0])) for model in models if randlora.inject(model, r=3, targets="all")}
    registered = {entry for name, entry in registry._layers.items() if not name.startswith("tests.")}
    elsewhere = (ReadWeight, CodesAdapter, EetqAdapter, HQQAdapter)  # see tests/test_quantized_libraries.py
    rows = {entry for entry in registered if not (isinstance(entry, str) or issubclass(entry, elsewhere))}
    known = {*registry._weights.values()} - {TorchaoPackedAdapter}  # see tests/test_quantized_libraries.py
    rows |= known if any(kind.library == "torchao" for kind in LAYER_KINDS) else set()
    assert {layer for layer in served if not layer.__module__.startswith("tests.")} == rows


def test_a_subclass_is_served_by_its_parents_entry_as_read_if_it_has_another_forward() -> None:
    layers = [nn.Linear(2, 2), Conv1D(2, 2), nn.LayerNorm(2), Renamed(2, 2), Swapped(2, 2)]
    found = [LinearAdapter, Conv1DAdapter, None, LinearAdapter, ReadLinear]
    assert [registry.find_layer(layer) for layer in layers] == found
    randlora.inject(model := nn.Sequential(*layers), r=1, targets="all-linear")
    assert [registry.find_layer(layer) for layer in model] == found


@pytest.mark.parametrize("entry", [Swapped, f"{__name__}.Swapped"], ids=["type", "name"])
def test_an_entry_of_its_own_comes_before_its_parents(entry: Any) -> None:
    with pytest.raises(TypeError, match="Half cannot be registered without in_storage_layout"):
        register_layer(entry)(Half)
    assert registry.find_layer(Swapped(2, 2)) is ReadLinear
    register_layer(entry)(SwappedAdapter)
    model, x = nn.Sequential(Swapped(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = model(x)
    randlora.inject(model, r=2, targets="all-linear")
    assert [type(adapter_layer(layer)) for layer in model] == [SwappedAdapter, LinearAdapter]
    assert torch.equal(model(x), expected)


def test_a_refused_kind_is_refused_by_name_and_skipped_by_all_linear() -> None:
    registry.refuse_layer(Renamed, "it is of no use: exclude it")
    model = nn.ModuleDict({
        "refused": Renamed(8, 8),
        "linear": nn.Linear(8, 8),
        "own": DeepseekV4GroupedLinear(8, 16, 4),
    })
    report = randlora.plan(model, r=2, targets="all-linear")
    assert (report.targets, report.skipped["refused"]) == (("linear",), "it is of no use: exclude it")
    for fqn, message in (("refused", r"\(Renamed\) .*: it is of no use"), ("own", "Grouped.*: its forward multiplies")):
        with pytest.raises(TargetError, match=f"{fqn} .*{message}"):
            randlora.inject(model, r=2, targets=[fqn])


def test_routers_that_choose_experts_are_skipped() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 20, "head_dim": 8}
    config = transformers.Llama4TextConfig(**sizes, interleave_moe_layer_step=1)
    model = transformers.Llama4TextModel(config).eval()
    for rule in ("all", "all-linear"):
        skipped = randlora.plan(model, r=2, targets=rule).skipped
        assert [why for fqn, why in skipped.items() if fqn.endswith("router") and "returns the experts" in why]
    randlora.inject(model, r=2, targets="all")
    model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(("what", "got"), [("pair", "got tuple"), ("half", r"got a tensor of shape \(3, 2\)")])
def test_a_forward_that_returns_no_product_is_an_error(what: str, got: str) -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Any:  # noqa: A002
            output = super().forward(input)
            return (output, output) if what == "pair" else output[:, :2]

    register_layer(Odd)(LinearAdapter)
    model = nn.Sequential(Odd(4, 4))
    randlora.inject(model, r=2, targets=["0"])
    message = r"the forward of an adapted Odd must return a tensor of shape \(\.\.\., 4\), .*" + got
    with pytest.raises(TypeError, match=message + ".*randlora.layers.register_layer"):
        model(torch.randn(3, 4))


def other(forward: Callable[..., Any], kind: Any = nn.Linear) -> Any:
    """Make a layer of 16 x 12 with another forward."""
    return type("Own", (kind,), {"forward": forward})(*(12, 16) if kind is Conv1D else (16, 12))


def plain(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def hidden(self: Any, x: Tensor) -> Tensor:
    """Compute the same without the attribute."""
    return F.linear(x, self._parameters["weight"], self.bias)


def on_instance() -> nn.Module:
    layer = nn.Linear(16, 12)
    own = layer.forward
    layer.forward = lambda x: 1.1 * own(x)  # type: ignore[method-assign, assignment]
    return layer


def rounding(dtype: torch.dtype) -> Any:
    """Make a linear layer that computes in another dtype than that of the weight."""
    return other(lambda self, x: F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).to(x.dtype))


def counter() -> Any:
    """Make a layer that counts calls, on a buffer and on an attribute, and draws random numbers."""

    def counting(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps = getattr(self, "steps", 0) + 1
        return plain(self, x) + torch.randn(())

    layer = other(counting)
    layer.register_buffer("calls", torch.zeros(()))
    return layer


OTHER: dict[str, Callable[[], Any]] = {
    "scaled": lambda: other(lambda self, x: 1.05 * plain(self, x)),
    "rectified": lambda: other(lambda self, x: plain(self, x).relu()),
    "normed input": lambda: other(lambda self, x: plain(self, F.rms_norm(x, x.shape[-1:]) * 2)),
    "normed weight": lambda: other(lambda self, x: F.linear(x, F.normalize(self.weight), self.bias)),
    "on the instance": on_instance,
    "Conv1D": lambda: other(lambda self, x: Conv1D.forward(self, x) * 0.5, Conv1D),
}
SAME: dict[str, Callable[[], Any]] = {
    "in float16": lambda: rounding(torch.float16),
    "in float64": lambda: rounding(torch.float64),
    "held in bfloat16": lambda: rounding(torch.float32).to(torch.bfloat16),
    "dropout of a shifted output": lambda: other(lambda self, x: F.dropout(plain(self, x) + 5, 0.5, self.training)),
    "Conv1D": lambda: other(lambda self, x: Conv1D.forward(self, x) + 1, Conv1D),
    "counting": counter,
}


@pytest.mark.parametrize("name", [*OTHER, *(f"{name}, the same" for name in SAME)])
def test_a_forward_is_merged_into_if_it_is_the_product_up_to_rounding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every forward is adapted here by adding to its output, whether or not it reads the weight."""
    monkeypatch.setattr(LinearAdapter, "as_read", None)
    build = OTHER.get(name) or SAME[name.removesuffix(", the same")]
    model = reproducible(lambda: nn.Sequential(nn.Linear(16, 16), build())).train()
    randlora.inject(model, r=4, targets=["0", "1"])
    layer, state = fill(model).get_submodule("1"), torch.get_rng_state()
    with untouched(model):
        if name in OTHER:
            message = r"1 has its own forward \(\w+\), which responds to .*, by \d+% of it\. Leave"
            for call in (randlora.merge, randlora.merged_tensors):
                with pytest.raises(MergeError, match=message):
                    call(model)
        else:
            assert randlora.merge(model, reversible=True).notes == ()
            randlora.unmerge(model)
            assert "steps" not in vars(layer)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_cannot_be_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_be_tried(layer: nn.Module) -> bool:
        randlora.inject(model := nn.Sequential(layer, nn.Linear(12, 4)), r=2)
        notes = randlora.merge(fill(model)).notes
        return any(note.startswith("layers with their own forward, which could not be tried: 0;") for note in notes)

    infinite = [lambda self, x, value=value: plain(self, x) * value for value in (torch.inf, torch.nan)]
    assert [cannot_be_tried(other(forward)) for forward in infinite] == [False, False]
    monkeypatch.setattr(LinearAdapter, "as_read", None)
    assert [cannot_be_tried(other(forward)) for forward in infinite] == [True, True]
    assert cannot_be_tried(other(lambda self, x, scale: plain(self, x) * scale))


ENDINGS: dict[str, Callable[[Tensor], Any]] = {
    "rectified": lambda y: y.relu(),
    "small": lambda y: 0.001 * y,
    "parted": lambda y: y.unflatten(-1, (2, 6)),
    "a tuple": lambda y: (y, y.sum()),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_forward_that_takes_the_weight_from_elsewhere_is_not_merged_into(ending: str) -> None:
    def model_of(linear: Callable[[Any, Tensor], Tensor]) -> nn.Module:
        model = nn.Sequential(other(lambda self, x: ENDINGS[ending](linear(self, x))))
        randlora.inject(model, r=2, targets=["0"])
        return fill(model)

    x, read, elsewhere = torch.randn(3, 16), model_of(plain), model_of(hidden)
    before = read(x)
    assert randlora.merge(read).notes == ()
    torch.testing.assert_close(read(x), before)
    message = r"0 has its own forward \(Own\), which does not read the weight from the attribute weight"
    for call in (randlora.merge, randlora.merged_tensors):
        with untouched(elsewhere), pytest.raises(MergeError, match=message):
            call(elsewhere)

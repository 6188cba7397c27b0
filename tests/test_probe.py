"""A merge is refused where a forward does not make of a merged update what the adapter adds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import randlora
from randlora.errors import MergeError
from randlora.layers import registry
from randlora.layers.linear import LinearAdapter
from randlora.readers.read_weight import ReadLinear
from tests.kit import fill, untouched
from tests.laws import needs_compiler
from tests.models import library, reproducible


def replaced(kind: type[nn.Module], **methods: Callable[..., Any]) -> type[Any]:
    """Return a subclass with other methods."""
    return type("Own", (kind,), methods)


def bit_linear() -> nn.Module:
    """Build BitNet's layer with a scale as of a checkpoint."""
    layer: nn.Module = library("transformers.integrations.bitnet").AutoBitLinear(16, 12)
    layer.get_buffer("weight_scale").fill_(0.1)
    return layer


def bit_linear_online() -> nn.Module:
    layer: nn.Module = library("transformers.integrations.bitnet").AutoBitLinear(16, 12, online_quant=True)
    return layer


def dory_head() -> nn.Module:
    """Build a head whose logits are scaled, as after training."""
    dory = library("transformers.models.dory.modeling_dory")
    layer: nn.Module = dory.DoryLMHead(dory.DoryConfig(hidden_size=16, vocab_size=12))
    nn.init.uniform_(layer.get_parameter("logit_scale"))
    return layer


def on_instance() -> nn.Module:
    layer = nn.Linear(16, 12)
    plain = layer.forward
    layer.forward = lambda x: 1.1 * plain(x)  # type: ignore[method-assign, assignment]
    return layer


def rounding(dtype: torch.dtype) -> type[nn.Module]:
    """Make a class of linear layers that compute in another dtype than that of the weight."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).to(x.dtype)

    return replaced(nn.Linear, forward=forward)


def counting(self: Any, x: Tensor) -> Tensor:
    """Count calls, on a buffer and on an attribute, and draw random numbers."""
    self.calls += 1
    self.steps = getattr(self, "steps", 0) + 1
    return F.linear(x, self.weight, self.bias) + torch.randn(())


def counter() -> nn.Module:
    layer = replaced(nn.Linear, forward=counting)(16, 12)
    layer.register_buffer("calls", torch.zeros(()))
    return layer  # type: ignore[no-any-return]


OTHER: dict[str, Callable[[], nn.Module]] = {
    "BitNet": bit_linear,
    "BitNet, online": bit_linear_online,
    "Dory's head": dory_head,
    "scaled": lambda: replaced(nn.Linear, forward=lambda self, x: 1.05 * nn.Linear.forward(self, x))(16, 12),
    "rectified": lambda: replaced(nn.Linear, forward=lambda self, x: nn.Linear.forward(self, x).relu())(16, 12),
    "normed input": lambda: replaced(
        nn.Linear, forward=lambda self, x: nn.Linear.forward(self, F.rms_norm(x, x.shape[-1:]) * 2)
    )(16, 12),
    "normed weight": lambda: replaced(
        nn.Linear, forward=lambda self, x: F.linear(x, F.normalize(self.weight), self.bias)
    )(16, 12),
    "on the instance": on_instance,
    "Conv1D": lambda: replaced(Conv1D, forward=lambda self, x: Conv1D.forward(self, x) * 0.5)(12, 16),
}
SAME: dict[str, Callable[[], nn.Module]] = {
    "in float16": lambda: rounding(torch.float16)(16, 12),
    "in bfloat16": lambda: rounding(torch.bfloat16)(16, 12),
    "in float64": lambda: rounding(torch.float64)(16, 12),
    "held in bfloat16": lambda: rounding(torch.float32)(16, 12).to(torch.bfloat16),
    "shifted": lambda: replaced(nn.Linear, forward=lambda self, x: nn.Linear.forward(self, x) + 5)(16, 12),
    "with dropout of the output": lambda: replaced(
        nn.Linear, forward=lambda self, x: F.dropout(nn.Linear.forward(self, x), 0.5, self.training)
    )(16, 12),
    "Conv1D": lambda: replaced(Conv1D, forward=lambda self, x: Conv1D.forward(self, x) + 1)(12, 16),
    "counting": counter,
}


@pytest.fixture(autouse=True)
def _unrefused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any class be adapted, also one that is known not to be the product."""
    known = {name: entry for name, entry in registry._layers.items() if not isinstance(entry, str)}
    monkeypatch.setattr(registry, "_layers", known)
    monkeypatch.setattr(LinearAdapter, "as_read", None)


def adapted(build: Callable[[], nn.Module]) -> nn.Module:
    model = reproducible(lambda: nn.Sequential(nn.Linear(16, 16), build())).train()
    randlora.inject(model, r=4, targets=["0", "1"])
    return fill(model)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_compiler] * name.startswith("BitNet")) for name in OTHER]
)
def test_a_forward_that_is_not_the_product_is_not_merged_into(name: str) -> None:
    model = adapted(OTHER[name])
    message = r"1 has its own forward \(\w+\), which responds to .*, by \d+% of it\. Leave"
    for call in (
        lambda: randlora.merge(model),
        lambda: randlora.merge(model, reversible=True),
        lambda: randlora.merged_tensors(model),
    ):
        state = torch.get_rng_state()
        with untouched(model), pytest.raises(MergeError, match=message):
            call()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAME)
def test_a_forward_that_is_the_product_up_to_rounding_is_merged_into(name: str) -> None:
    model = adapted(SAME[name])
    state = torch.get_rng_state()
    assert randlora.merge(model).notes == ()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_trial_leaves_no_trace() -> None:
    model = adapted(counter)
    randlora.merge(model, reversible=True)
    randlora.unmerge(model)
    assert model.get_buffer("1.calls") == 0
    assert "steps" not in vars(model[1])  # type: ignore[index]
    assert model.get_submodule("1").training


def test_a_forward_that_cannot_be_tried_is_said() -> None:
    layer = replaced(nn.Linear, forward=lambda self, x, scale: nn.Linear.forward(self, x) * scale)
    model = nn.Sequential(layer(4, 4), nn.Linear(4, 4))
    randlora.inject(model, r=2)
    (note,) = randlora.merge(fill(model)).notes
    assert note.startswith("layers with their own forward, which could not be tried: 0;")


ENDINGS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda y: y,
    "rectified": lambda y: y.relu(),
    "small": lambda y: 0.001 * y,
    "parted": lambda y: y.unflatten(-1, (2, 2)),
    "a tuple": lambda y: (y, y.sum()),
}


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_forward_that_takes_the_weight_from_elsewhere_is_not_merged_into(
    monkeypatch: pytest.MonkeyPatch, ending: str, is_read: bool
) -> None:
    monkeypatch.setattr(LinearAdapter, "as_read", ReadLinear)

    def forward(self: Any, x: Tensor) -> Any:
        return ENDINGS[ending](F.linear(x, self.weight if is_read else self._parameters["weight"], self.bias))

    model = nn.Sequential(replaced(nn.Linear, forward=forward)(4, 4))
    randlora.inject(model, r=2, targets=["0"])
    fill(model)
    if is_read:
        x = torch.randn(3, 4)
        before = model(x)
        assert randlora.merge(model).notes == ()
        torch.testing.assert_close(model(x), before)
        return
    message = r"0 has its own forward \(Own\), which does not read the weight from the attribute weight"
    for call in (randlora.merge, randlora.merged_tensors):
        with untouched(model), pytest.raises(MergeError, match=message):
            call(model)


@pytest.mark.parametrize("as_read", [None, ReadLinear])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_cannot_be_tried(monkeypatch: pytest.MonkeyPatch, value: float, as_read: Any) -> None:
    monkeypatch.setattr(LinearAdapter, "as_read", as_read)
    layer = replaced(nn.Linear, forward=lambda self, x: F.linear(x, self.weight, self.bias) * value)
    model = nn.Sequential(layer(4, 4), nn.Linear(4, 4))
    randlora.inject(model, r=2)
    notes = randlora.merge(fill(model)).notes
    assert [note.startswith("layers with their own forward, which could not be tried: 0;") for note in notes] == (
        [True] if as_read is None else []
    )

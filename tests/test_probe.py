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
from tests.models import reproducible


def other(forward: Callable[..., Any], kind: Any = nn.Linear) -> Any:
    """Make a layer of 16 x 12 with another forward."""
    sizes = (12, 16) if kind is Conv1D else (16, 12)
    return type("Own", (kind,), {"forward": forward})(*sizes)


def plain(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def on_instance() -> nn.Module:
    layer = nn.Linear(16, 12)
    own = layer.forward
    layer.forward = lambda x: 1.1 * own(x)  # type: ignore[method-assign, assignment]
    return layer


def rounding(dtype: torch.dtype) -> nn.Module:
    """Make a linear layer that computes in another dtype than that of the weight."""
    return other(lambda self, x: F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).to(x.dtype))  # type: ignore[no-any-return]


def counter() -> nn.Module:
    """Make a layer that counts calls, on a buffer and on an attribute, and draws random numbers."""

    def counting(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps = getattr(self, "steps", 0) + 1
        return plain(self, x) + torch.randn(())

    layer = other(counting)
    layer.register_buffer("calls", torch.zeros(()))
    return layer  # type: ignore[no-any-return]


OTHER: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: other(lambda self, x: 1.05 * plain(self, x)),
    "rectified": lambda: other(lambda self, x: plain(self, x).relu()),
    "normed input": lambda: other(lambda self, x: plain(self, F.rms_norm(x, x.shape[-1:]) * 2)),
    "normed weight": lambda: other(lambda self, x: F.linear(x, F.normalize(self.weight), self.bias)),
    "on the instance": on_instance,
    "Conv1D": lambda: other(lambda self, x: Conv1D.forward(self, x) * 0.5, Conv1D),
}
SAME: dict[str, Callable[[], nn.Module]] = {
    "in float16": lambda: rounding(torch.float16),
    "in float64": lambda: rounding(torch.float64),
    "held in bfloat16": lambda: rounding(torch.float32).to(torch.bfloat16),
    "with dropout of a shifted output": lambda: other(
        lambda self, x: F.dropout(plain(self, x) + 5, 0.5, self.training)
    ),
    "Conv1D": lambda: other(lambda self, x: Conv1D.forward(self, x) + 1, Conv1D),
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


@pytest.mark.parametrize("name", OTHER)
def test_a_forward_that_is_not_the_product_is_not_merged_into(name: str) -> None:
    model, state = adapted(OTHER[name]), torch.get_rng_state()
    message = r"1 has its own forward \(\w+\), which responds to .*, by \d+% of it\. Leave"
    for call in (randlora.merge, randlora.merged_tensors):
        with untouched(model), pytest.raises(MergeError, match=message):
            call(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAME)
def test_a_forward_that_is_the_product_up_to_rounding_is_merged_into_without_a_trace(name: str) -> None:
    model, state = adapted(SAME[name]), torch.get_rng_state()
    assert randlora.merge(model, reversible=True).notes == ()
    assert torch.equal(torch.get_rng_state(), state)
    randlora.unmerge(model)
    layer = model.get_submodule("1")
    assert (layer.training, "steps" in vars(layer)) == (True, False)
    assert all(count == 0 for count in layer.buffers())


def cannot_be_tried(layer: nn.Module) -> bool:
    model = nn.Sequential(layer, nn.Linear(12, 4))
    randlora.inject(model, r=2)
    notes = randlora.merge(fill(model)).notes
    return any(note.startswith("layers with their own forward, which could not be tried: 0;") for note in notes)


def test_a_forward_that_cannot_be_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cannot_be_tried(other(lambda self, x, scale: plain(self, x) * scale))
    for value in (torch.inf, torch.nan):
        assert cannot_be_tried(other(lambda self, x, value=value: plain(self, x) * value))
        with monkeypatch.context() as patch:
            patch.setattr(LinearAdapter, "as_read", ReadLinear)
            assert not cannot_be_tried(other(lambda self, x, value=value: plain(self, x) * value))


ENDINGS: dict[str, Callable[[Tensor], Any]] = {
    "rectified": lambda y: y.relu(),
    "small": lambda y: 0.001 * y,
    "parted": lambda y: y.unflatten(-1, (2, 6)),
    "a tuple": lambda y: (y, y.sum()),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_forward_that_takes_the_weight_from_elsewhere_is_not_merged_into(
    monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(LinearAdapter, "as_read", ReadLinear)
    x = torch.randn(3, 16)
    read = nn.Sequential(other(lambda self, x: ENDINGS[ending](plain(self, x))))
    elsewhere = nn.Sequential(
        other(lambda self, x: ENDINGS[ending](F.linear(x, self._parameters["weight"], self.bias)))
    )
    for model in (read, elsewhere):
        randlora.inject(model, r=2, targets=["0"])
        fill(model)
    before = read(x)
    assert randlora.merge(read).notes == ()
    torch.testing.assert_close(read(x), before)
    message = r"0 has its own forward \(Own\), which does not read the weight from the attribute weight"
    for call in (randlora.merge, randlora.merged_tensors):
        with untouched(elsewhere), pytest.raises(MergeError, match=message):
            call(elsewhere)

"""A weight that code reads has its updates in a call of its module or of one around it, and is held as it is."""

import copy
import threading
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError, TargetError
from randlora.layers.scopes import in_call, is_in_call
from tests.in_place_models import Reading, TableReader, Tables, X, register
from tests.kit import fill, read, same_bits, untouched
from tests.laws import assert_close, needs_compiler

WEIGHTS = ("read.table", "read.turned", "called.table", "called.turned")


def test_weights_of_one_owner_have_their_updates_until_they_are_given_up_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch)
    model = Reading()
    base = copy.deepcopy(model)
    randlora.inject(model, r=3, alpha=6, targets=[*WEIGHTS, "linear"], stream="portable")
    with randlora.merged(fill(model)):
        expected = model(X)
    assert_close(model(X), expected, torch.float32)
    for fqn in WEIGHTS:
        assert read(model, fqn) is not dict(model.named_parameters())[fqn]
        assert dict(model.named_parameters())[fqn] is model.get_parameter(fqn)
    randlora.activate(model, [])
    assert all(read(model, fqn) is model.get_parameter(fqn) for fqn in WEIGHTS)
    assert torch.equal(model(X), base(X))
    randlora.eject(model)
    for order in (("table", "turned"), ("turned", "table")):
        for name in order:
            randlora.inject(model, r=3, targets=[f"read.{name}"], name=name)
            fill(model, name, seed=len(name))
        randlora.activate(model, [*order])
        kept = read(model, f"read.{order[1]}").detach().clone()
        randlora.remove(model, order[0])
        assert same_bits(read(model, f"read.{order[0]}"), base.get_parameter(f"read.{order[0]}"))
        assert same_bits(read(model, f"read.{order[1]}"), kept)
        assert not [name for name in model.state_dict() if f"{order[0]}_randlora" in name]
        randlora.remove(model, order[1])
        assert type(model.read) is Tables
        assert torch.equal(model(X), base(X))
    randlora.inject(model, r=3, targets=["read.table"])
    model.read.__class__ = type("Sharded", (type(model.read),), {})
    with untouched(model), pytest.raises(TargetError, match=r"read\.turned changed its class to Sharded after"):
        randlora.inject(model, r=3, targets=["read.turned"], name="second")
    randlora.inject(model, r=3, targets=["read.table"], name="second")

    def broken(delta: Tensor) -> Tensor:
        raise AttributeError("of the kind")

    monkeypatch.setattr(TableReader, "in_storage_layout", staticmethod(broken))
    with pytest.raises(RuntimeError, match="cannot compute the adapted table: of the kind"):
        model(X)  # and not with the plain weight


# In calls, and nowhere else


class Head(nn.Module):
    """A model that computes its output with the table of its embedding, past any call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.inner = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())
        self.fails = False

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.inner(self.table(ids))
        if self.fails:
            raise ValueError("as it was told")
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.table.weight)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def head(model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    model = Head() if model is None else model
    randlora.inject(model, r=2, targets="all")
    return fill(model, spread=0.3)


def is_parameter(model: Any) -> bool:
    return model.table.weight is model.table._parameters["weight"]


def test_code_around_a_module_reads_the_updates_and_code_outside_and_another_thread_the_parameter() -> None:
    model, hidden, found = head(), torch.randn(2, 3, 8), []

    def look(*_: object) -> None:
        found.append(is_parameter(model))
        thread = threading.Thread(target=lambda: found.append(is_parameter(model)))
        thread.start()
        thread.join()

    with torch.no_grad(), randlora.merged(model):
        expected = model(IDS)
    with model.inner.register_forward_hook(look):
        assert_close(model(IDS), expected, torch.float32)
    assert found == [False, True]
    assert is_parameter(model)
    assert_close(model.logits(hidden), F.linear(hidden, model.get_parameter("table.weight")), torch.float32)
    with in_call():
        assert not is_parameter(model)
    part = Head()
    part.load_state_dict({name: value for name, value in model.state_dict().items() if "randlora" not in name})
    head(nn.ModuleDict({"part": part}))
    assert_close(part(IDS), expected, torch.float32)  # a call of any module around it counts
    assert not is_in_call()


def test_a_call_that_raises_ends_the_scope() -> None:
    model = head()
    model.fails = True
    with pytest.raises(ValueError, match="as it was told"):
        model(IDS)
    assert is_parameter(model)
    with (
        model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True),
        pytest.raises(ZeroDivisionError),
        in_call(),
    ):
        model(IDS)
    assert is_parameter(model)
    with pytest.raises(AdapterError, match="adapter_names"):
        model(IDS, adapter_names=["a"])
    assert not is_in_call()


def test_what_backward_computes_again_reads_the_updates() -> None:
    model, found = head(), []
    trained, plain = [*randlora.trainable_parameters(model)], model.logits
    for logits in (plain, *(partial(checkpoint, plain, use_reentrant=reentrant) for reentrant in (True, False))):
        model.logits = logits
        model(IDS).square().sum().backward()
        found.append([parameter.grad for parameter in trained])
        model.zero_grad()
        torch.testing.assert_close(found[-1], found[0], rtol=1e-4, atol=1e-4)


def test_a_plain_tensor_in_the_place_of_a_weight_lacks_the_updates_which_is_said() -> None:
    """As `nn.DataParallel` sets them on its replicas."""
    model = head()
    expected = model(IDS)
    model.table.__dict__["weight"] = model.get_parameter("table.weight").detach().clone()
    with pytest.raises(AdapterError, match="is now a plain tensor without the updates"):
        model(IDS)
    with randlora.disabled(model):
        model(IDS)
    del model.table.__dict__["weight"]
    assert torch.equal(model(IDS), expected)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.MultiheadAttention])
def test_a_forward_that_is_set_on_a_module_or_called_directly_reads_the_updates(kind: Any) -> None:
    x = torch.randn(2, 4, 4)
    given = (x,) if kind is nn.Conv1d else (x, x, x)
    for when in ("before", "after"):
        layer: Any = kind(4, 4, 1) if kind is nn.Conv1d else kind(4, 2)
        model, found = nn.Sequential(layer), []
        if when == "before":
            layer.forward = partial(kind.forward, layer)
        randlora.inject(model, r=2, targets="all")
        fill(model, spread=0.3)
        if when == "after":
            found.append(layer.forward(*given))
            layer.forward = partial(kind.forward, layer)
        found.append(model(x) if kind is nn.Conv1d else layer(*given))
        with torch.no_grad(), randlora.merged(model):
            expected = layer(*given)
        torch.testing.assert_close(found, [expected] * len(found), rtol=1e-4, atol=1e-5)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
@needs_compiler
def test_compiled_code_and_what_it_leaves_uncompiled_read_the_updates() -> None:
    class Broken(Head):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def logits(self, hidden: Tensor) -> Tensor:
            return F.linear(hidden, self.table.weight)

    model = head(Broken())
    expected = model(IDS)
    compiled: Any = torch.compile(model, backend="aot_eager")
    found = compiled(IDS)
    assert_close(found, expected, torch.float32)
    assert is_parameter(model)
    gradients = [torch.autograd.grad(each.sum(), [*randlora.trainable_parameters(model)]) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, torch.float32)

"""A weight that is read has its updates in a call of its module or of one around it, and nowhere else."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import accelerate  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError
from randlora.layers.scopes import in_call, is_in_call
from tests.kit import fill, same_bits
from tests.laws import assert_close, needs_compiler


class Head(nn.Module):
    """A model that computes its output with the table of its embedding, past any call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.inner = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU())
        self.fails = False

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``(rows, 3)`` ids to ``(rows, 3, 10)``."""
        hidden = self.inner(self.table(ids))
        if self.fails:
            raise ValueError("as it was told")
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the product with the table."""
        return F.linear(hidden, self.table.weight)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def adapted(model: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    model = Head() if model is None else model
    randlora.inject(model, r=2, targets="all")
    return fill(model, spread=0.3)


def merged_output(model: nn.Module) -> Tensor:
    with torch.no_grad(), randlora.merged(model):
        output: Tensor = model(IDS)
    return output


def is_parameter(model: Any) -> bool:
    return model.table.weight is model.table._parameters["weight"]


def test_code_around_a_module_reads_the_updates_and_code_outside_the_parameter() -> None:
    model = adapted()
    assert_close(model(IDS), merged_output(model), torch.float32)
    hidden = torch.randn(2, 3, 8)
    assert is_parameter(model)
    assert_close(model.logits(hidden), F.linear(hidden, model.get_parameter("table.weight")), torch.float32)
    with in_call():
        assert not is_parameter(model)


@pytest.mark.parametrize("wrap", [lambda model: nn.ModuleDict({"part": model}), nn.Sequential])
def test_a_call_of_any_module_around_it_counts(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    alone, part = adapted(Head()), Head()
    model = wrap(part)
    part.load_state_dict({name: value for name, value in alone.state_dict().items() if "randlora" not in name})
    randlora.inject(model, r=2, targets="all")
    fill(model, spread=0.3)
    expected = merged_output(alone)
    assert_close(part(IDS), expected, torch.float32)
    assert not is_in_call()


def test_a_call_that_raises_ends_the_scope() -> None:
    model = adapted()
    model.fails = True
    for _ in range(2):
        with pytest.raises(ValueError, match="as it was told"):
            model(IDS)
        assert is_parameter(model)
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError), in_call():
        model(IDS)
    handle.remove()
    assert is_parameter(model)
    with pytest.raises(AdapterError, match="adapter_names"):
        model(IDS, adapter_names=["a"])
    assert not is_in_call()


def test_another_thread_reads_the_parameter_meanwhile() -> None:
    model, found = adapted(), []

    def look(*_: object) -> None:
        found.append(is_parameter(model))
        thread = threading.Thread(target=lambda: found.append(is_parameter(model)))
        thread.start()
        thread.join()

    model.inner.register_forward_hook(look)
    model(IDS)
    assert found == [False, True]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_scopes_of_their_own_until_they_are_ejected(twin: Callable[[Any], Any]) -> None:
    model = adapted()
    other, plain = twin(model), Head()
    assert same_bits(other(IDS), model(IDS))
    assert is_parameter(other)
    randlora.eject(other)
    assert [(type(part), part._forward_hooks, part._forward_pre_hooks) for part in other.modules()] == [
        (type(part), {}, {}) for part in plain.modules()
    ]
    assert_close(model(IDS), merged_output(model), torch.float32)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.MultiheadAttention])
def test_a_forward_that_is_set_on_a_module_or_called_directly_reads_the_updates(kind: type, when: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4)
    given = (x,) if kind is nn.Conv1d else (x, x, x)
    layer: Any = nn.Conv1d(4, 4, 1) if kind is nn.Conv1d else nn.MultiheadAttention(4, 2)
    model = nn.Sequential(layer)

    def set_forward() -> None:
        layer.forward = lambda *args: kind.forward(layer, *args)  # type: ignore[attr-defined]

    if when == "before":
        set_forward()
    randlora.inject(model, r=2, targets="all")
    fill(model, spread=0.3)
    direct = layer.forward(*given) if when == "after" else layer(*given)
    if when == "after":
        set_forward()
    found = [direct, model(x) if when == "after" and kind is nn.Conv1d else layer(*given)]
    with torch.no_grad(), randlora.merged(model):
        expected = layer(*given)
    torch.testing.assert_close(found, [expected] * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_first", [False, True])
def test_what_accelerate_loads_for_each_call_stays_frozen(is_first: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Embedding(10, 8)), torch.randn(2, 3, 4)
    expected = adapted(copy.deepcopy(model))[0](x)
    if is_first:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model = adapted(model)
    if not is_first:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        with in_call():
            assert same_bits(model[0](x), expected)
        assert [fqn for fqn, value in model.named_parameters() if value.requires_grad and "randlora" not in fqn] == []


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
@needs_compiler
@pytest.mark.parametrize("breaks", [False, True])
def test_compiled_code_and_what_it_leaves_uncompiled_read_the_updates(breaks: bool) -> None:
    class Broken(Head):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def logits(self, hidden: Tensor) -> Tensor:
            return F.linear(hidden, self.table.weight)

    model = adapted(Broken() if breaks else Head())
    expected = model(IDS)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=not breaks)
    found = compiled(IDS)
    assert_close(found, expected, torch.float32)
    assert is_parameter(model)
    gradients = [torch.autograd.grad(each.sum(), [*randlora.trainable_parameters(model)]) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, torch.float32)

"""Weights have their updates in calls and nowhere else; what is particular to torch's attention and embeddings."""

import copy
import threading
from functools import partial
from typing import Any
from unittest.mock import patch

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError, TargetError
from randlora.layers.scopes import forward_of, is_in_call
from randlora.readers.read_weight import EmbeddingAdapter, ReadWeight
from tests.kit import adapt, fill, in_call, read, untouched
from tests.laws import assert_close, needs_compiler
from tests.models import GPT2
from tests.test_in_place import Reading, TableReader, register
from tests.test_in_place import X as ROWS

WEIGHTS = ("read.table", "read.turned", "called.table", "called.turned")


def test_several_weights_of_one_owner_have_updates_and_no_class_that_changed_since_is_adapted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch)
    model = Reading()
    base = copy.deepcopy(model)
    with randlora.merged(adapt(model, r=3, alpha=6, targets=[*WEIGHTS, "linear"], stream="portable")):
        expected = model(ROWS)
    assert_close(model(ROWS), expected, torch.float32)
    for fqn in WEIGHTS:
        assert read(model, fqn) is not dict(model.named_parameters())[fqn]
        assert dict(model.named_parameters())[fqn] is model.get_parameter(fqn)
    randlora.activate(model, [])
    assert all(read(model, fqn) is model.get_parameter(fqn) for fqn in WEIGHTS)
    assert torch.equal(model(ROWS), base(ROWS))
    randlora.eject(model)
    randlora.inject(model, r=3, targets=["read.table"])
    model.read.__class__ = type("Sharded", (type(model.read),), {})
    with untouched(model), pytest.raises(TargetError, match=r"read\.turned changed its class to Sharded after"):
        randlora.inject(model, r=3, targets=["read.turned"], name="second")
    randlora.inject(model, r=3, targets=["read.table"], name="second")

    def broken(delta: Tensor) -> Tensor:
        raise AttributeError("of the kind")

    monkeypatch.setattr(TableReader, "in_storage_layout", staticmethod(broken))
    with pytest.raises(RuntimeError, match="cannot compute the adapted table: of the kind"):
        model(ROWS)  # and not with the plain weight


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
    return adapt(model, spread=0.3, r=2, targets="all")


def is_parameter(model: Any) -> bool:
    return model.table.weight is model.table._parameters["weight"]


def test_code_around_a_module_reads_the_updates_and_code_outside_and_another_thread_the_parameter() -> None:
    model, hidden, found = head(), torch.randn(2, 3, 8), []

    def look(*_: object) -> None:
        with pytest.raises(AttributeError, match=r"not an nn\.Parameter"):
            model.get_parameter("table.weight")
        found.append(dict(model.named_parameters())["table.weight"] is not model.table._parameters["weight"])
        found.append(is_parameter(model))
        thread = threading.Thread(target=lambda: found.append(is_parameter(model)))
        thread.start()
        thread.join()

    with torch.no_grad(), randlora.merged(model):
        expected = model(IDS)
    with model.inner.register_forward_hook(look):
        assert_close(model(IDS), expected, torch.float32)
    assert found == [False, False, True]
    assert is_parameter(model)
    assert_close(model.logits(hidden), F.linear(hidden, model.get_parameter("table.weight")), torch.float32)
    assert_close(model.forward(IDS), model.logits(model.inner(model.table(IDS))), torch.float32)
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
    with model.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True), in_call():
        with pytest.raises(ZeroDivisionError):
            model(IDS)
        assert is_parameter(model), "code that goes on in a call around it reads no updates: docs/limits.md"
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
        adapt(model, spread=0.3, r=2, targets="all")
        if when == "after":
            found.append(layer.forward(*given))
            layer.forward = partial(kind.forward, layer)
        found.append(model(x) if kind is nn.Conv1d else layer(*given))
        with torch.no_grad(), randlora.merged(model):
            torch.testing.assert_close(found, [layer(*given)] * len(found), rtol=1e-4, atol=1e-5)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # asked by dynamo
@needs_compiler
def test_compiled_code_and_what_it_leaves_uncompiled_read_the_updates() -> None:
    model = head()
    expected, model.logits = model(IDS), torch.compiler.disable(model.logits)
    compiled: Any = torch.compile(model, backend="aot_eager")
    found = compiled(IDS)
    assert_close(found, expected, torch.float32)
    assert is_parameter(model)
    trained = [*randlora.trainable_parameters(model)]
    gradients = [torch.autograd.grad(each.sum(), trained) for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


# Attention


class Subclass(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Attending(nn.Module):
    def __init__(self, kind: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = kind(12, 2, batch_first=True, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attn(x, x, x, need_weights=False)[0]
        return output


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_fast_path_is_taken_and_each_update_computed_once_with_its_gradients(training: bool) -> None:
    for in_proj in ("packed", "split"):
        model = Attending().train(training)
        randlora.inject(model, r=3, in_proj=in_proj)
        with (
            torch.set_grad_enabled(training),
            patch.object(torch, "_native_multi_head_attention", wraps=torch._native_multi_head_attention) as fast,
            patch.object(ReadWeight, "value", autospec=True, side_effect=ReadWeight.value) as value,
        ):
            model(torch.randn(2, 5, 12, dtype=torch.float64))
        assert fast.call_count == (0 if training else 1)
        assert len({call.args[0] for call in value.call_args_list}) == value.call_count == 2
        with forward_of(model.attn):  # what it reads without gradients has them where it reads with them
            with torch.no_grad():
                assert not model.attn.in_proj_weight.requires_grad
            assert model.attn.in_proj_weight.requires_grad


def test_a_linear_layer_in_the_place_of_out_proj_is_adapted_as_it_is_read_and_its_type_as_it_is_called() -> None:
    layer = nn.modules.linear.NonDynamicallyQuantizableLinear(12, 8, dtype=torch.float64)
    models: list[tuple[nn.Module, str]] = [(nn.Sequential(layer), "0")]
    for kind in (nn.MultiheadAttention, Subclass):
        models.append((attending := Attending(kind), "out_proj"))
        attending.attn.out_proj = nn.Linear(12, 12, dtype=torch.float64)  # type: ignore[assignment]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    for model, name in models:
        base = model(x)
        randlora.inject(model, r=3, targets=[name])
        found = fill(model)(x)
        assert (found - base).abs().max() > 0.01
        found.sum().backward()
        assert all(each.grad is not None and each.grad.any() for each in randlora.trainable_parameters(model))
        randlora.merge(model)
        torch.testing.assert_close(model(x), found)


# Embeddings


def embedding(module: nn.Module) -> nn.Sequential:
    model = nn.Sequential(module)
    return adapt(model, r=3, alpha=6, targets=["0"], stream="portable")


def test_the_update_of_the_table_is_not_formed_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 2], [2, 29]])
    tables = nn.Embedding(30, 12), nn.Embedding(30, 12, scale_grad_by_freq=True), nn.Embedding(30, 12, sparse=True)
    models = [embedding(table) for table in tables]
    expected = read(models[0], "0.weight")[ids]
    monkeypatch.setattr(EmbeddingAdapter, "read", lambda *_: pytest.fail("the whole table was read"))
    gradients = []
    for model in models:  # options that concern the gradient of the frozen table change nothing
        model[0].load_state_dict(models[0][0].state_dict())
        found = model(ids)
        assert_close(found, expected, torch.float32)
        found.square().sum().backward()
        gradients.append([parameter.grad for parameter in randlora.trainable_parameters(model)])
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=0, atol=0)
        assert model[0].get_parameter("weight").grad is None
        with pytest.raises(IndexError, match="out of range"):
            model(torch.tensor([30]))


def test_what_cannot_be_adapted_is_refused_with_the_reason() -> None:
    odd = Attending()
    odd.attn.in_proj_weight = nn.Parameter(torch.ones(35, 12))
    normed = nn.Sequential(nn.Embedding(30, 12, max_norm=1.0))
    rows: list[tuple[nn.Module, dict[str, Any], str]] = [
        (Attending().attn, {}, r"the model itself is a layer \(MultiheadAttention\)"),
        (odd, {}, r"attn\.in_proj_weight has 35 rows, expected equally many for query, key and value"),
        (normed, {"targets": ["0"]}, r"0 has max_norm=1\.0, with which its forward changes the"),
        (GPT2.build(), {"targets": ["wte"]}, r"transformer\.wte is tied to lm_head\.weight"),
    ]
    for model, options, match in rows:
        with untouched(model), pytest.raises(TargetError, match=match):
            randlora.inject(model, r=3, **options)
    for kind in (bitsandbytes.nn.Embedding8bit, bitsandbytes.nn.EmbeddingNF4):  # which have no state dict
        for model in (nn.Sequential(kind(16, 64)), nn.Sequential(kind(16, 64)).to("cpu")):
            with pytest.raises(TargetError, match=rf"0 \({kind.__name__}\) cannot be adapted: its table is quantized"):
                randlora.inject(model, r=3, targets=["0"])

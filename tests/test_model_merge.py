"""A merged layer is the adapted one, unmerging gives every bit back, and `merged_tensors` yields the same bits."""

import asyncio
import copy
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import randlora
from randlora.errors import AdapterError, ConfigError, MergeError
from randlora.model.merged_tensors import MergedTensors
from tests.kit import adapt, all_bits, assert_unchanged, bits, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, TOLERANCES, Mixed, assert_close, needs_compiler, needs_export, update_of
from tests.layer_kinds import (
    LayerKind,
    every_dense_kind_and_dtype,
    every_mergeable_kind,
    every_mergeable_kind_and_dtype,
)
from tests.read_kinds import ReadKind, every_read_kind


def assert_within_a_step(kind: LayerKind, layer: nn.Module, x: Tensor, found: Tensor, expected: Tensor) -> None:
    """Compare outputs of a merged layer for ``x``; weights that are codes may each be a step off what was merged."""
    allowed = x.double().abs() @ kind.step(layer).double().T if kind.step else 0.0
    tolerance = 0.05 if kind.rounds_inputs else TOLERANCES[x.dtype]
    rounding = tolerance * max(1.0, expected.abs().max().item())
    assert ((found.double() - expected.double()).abs() <= allowed + rounding).all()


@every_dense_kind_and_dtype
@pytest.mark.parametrize("is_cast", [False, True])
def test_a_merged_weight_is_the_exact_sum_rounded_once(kind: LayerKind, dtype: torch.dtype, is_cast: bool) -> None:
    model = adapt(nn.Sequential(kind.build(9, 14, True, dtype)), r=3, alpha=3, stream="portable")
    own = kind.weight(model[0]).to(torch.promote_types(dtype, torch.float32))
    several, expected = copy.deepcopy(model), (own + update_of(model[0])).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        randlora.merge(model)
    assert same_bits(kind.weight(model[0]), expected)
    assert model.get_parameter("0.weight").is_contiguous()
    randlora.activate(adapt(several, r=2, name="b", values=1), {"default": 0.7, "b": -0.3})
    expected = own + 0.7 * update_of(several[0]) - 0.3 * update_of(several[0], "b")
    assert randlora.merge(several, reversible=True).adapters == {"default": 0.7, "b": -0.3}
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(kind.weight(several[0]).to(own.dtype), expected, rtol=step / 2 + 1e-6, atol=step / 32)


def in_a_task(call: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return call()

    return asyncio.run(run())


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("has_some", [False, True])
@pytest.mark.parametrize("elsewhere", [lambda call: call(), in_a_thread, in_a_task], ids=["here", "thread", "task"])
def test_one_block_of_merged_is_open_at_a_time(elsewhere: Callable[[Callable[[], Any]], Any], has_some: bool) -> None:
    model = adapt(Mixed())
    randlora.inject(model, r=2, targets=["up", "head"], name="on top", active=has_some)
    randlora.activate(fill(model, "on top", seed=1), ["default", "on top"][: 1 + has_some])
    if has_some:
        randlora.merge(model, adapters="default", reversible=True)

    def enter() -> None:
        with randlora.merged(model):
            pytest.fail("the block was entered")

    def held() -> tuple[Any, ...]:
        return all_bits(dict(model.named_parameters())), randlora.adapters(model)

    before, message = held(), r"is open already.* open one around all.* reversible=True\)"
    with randlora.merged(model) as report:
        assert report.adapters == ({"on top": 1.0} if has_some else {"default": 1.0})
        inside = model(TOKENS)
        with untouched(model), pytest.raises(MergeError, match=message):
            elsewhere(enter)
        assert same_bits(elsewhere(lambda: model(TOKENS)), inside)
        randlora.unmerge(model, [*report.adapters])
        with untouched(model), pytest.raises(MergeError, match=message):  # until it ends
            elsewhere(enter)
    assert held() == before
    with pytest.raises(pytest.fail.Exception, match="entered"):
        elsewhere(enter)
    with randlora.merged(model):
        assert held() != before
    assert held() == before


def test_what_is_merged_or_unmerged_in_inference_mode_can_be_trained() -> None:
    model, other = (adapt(Mixed()) for _ in range(2))
    with randlora.merged(model):
        assert model.state_dict(keep_vars=True)["q.bias"] is model.q.bias
    report = randlora.merge(other, reversible=True)
    with untouched(other), randlora.merged(other) as first, randlora.merged(other) as second:
        assert first is second is report, "blocks do nothing in a model that is merged"
    assert {tensor.dtype for tensor in other.double().state_dict().values()} == {torch.float64}
    with torch.inference_mode():
        randlora.merge(model)
        randlora.unmerge(other)
    other.embed.requires_grad_()
    for each in (model, other):
        each(TOKENS).sum().backward()
        assert each.embed.weight.grad is not None
    assert all(parameter.grad is not None for parameter in model.parameters())  # trained as before the adapter
    several: Any = adapt(adapt(Mixed(), name="a"), name="b", trainable=True)
    randlora.activate(several, ["a", "b"])
    randlora.merge(several, adapters="a", reversible=True)
    with torch.inference_mode(), randlora.merged(several):  # b on top, and then a alone again
        several(TOKENS)
    several(TOKENS).sum().backward()


def test_what_would_lose_something_or_go_wrong_while_merged_is_refused() -> None:
    model = adapt(Mixed())
    merge: Any = partial(randlora.merge, reversible=True)

    def refused(message: str, verb: Callable[..., Any], *args: Any, **options: Any) -> None:
        with untouched(model), pytest.raises((MergeError, AdapterError), match=message):
            verb(model, *args, **options)

    refused("the adapters are not merged", randlora.unmerge)
    with randlora.disabled(model):
        refused(r"outside of randlora\.disabled\(model\)", randlora.merge)
        refused(r"call this outside of randlora.disabled", randlora.merged_tensors)
    with randlora.serving.routed(model, ["default"]):
        refused(r"merge outside of randlora\.serving\.routed", randlora.merge)
    randlora.inject(model, r=4, targets=["up"], name="b", train_also=["q.weight"])
    randlora.inject(model, r=4, name="idle")
    refused("b, idle would be lost: save and remove inactive adapters", randlora.merge)
    randlora.activate(model, [])
    for verb in (randlora.merge, randlora.merged_tensors):
        refused("no adapter is active: activate one of default", verb)
    randlora.activate(model, ["default", "b"])
    refused(r"'b' would not be merged, but trains a copy of q\.weight", merge, adapters="default")
    refused("default, idle would be lost: save and remove other", randlora.merge, adapters="b")
    for names, message in (("x", "no adapter named 'x'"), (3, "named 3"), ([], "is empty"), ("idle", "is not active")):
        refused(message, merge, adapters=names)
    randlora.activate(model, ["default", "idle"])
    merge(model, adapters="default")
    refused("'default' is merged already", merge, adapters=["default", "idle"])
    refused("'b' is not merged: default is", randlora.unmerge, ["default", "b"])
    refused("idle is active and not merged, as others are", randlora.merged_tensors)
    refused("activate adapters with train_also", randlora.activate, ["default", "b"])
    for call in (
        lambda model: randlora.activate(model, {"default": 2.0}),
        lambda model: randlora.remove(model, "default"),
        lambda model: randlora.inject(model, r=4, name="c"),
        lambda model: randlora.disabled(model).__enter__(),
        lambda model: randlora.serving.routed(model, ["idle"]).__enter__(),
    ):
        refused(r"while the adapters are merged: call randlora\.unmerge", call)
    merge(model)
    refused(r"merged already: call randlora\.unmerge", randlora.merge)
    randlora.unmerge(model)
    randlora.remove(model, "b")
    randlora.remove(model, "idle")
    model.norm.weight = nn.Parameter(model.q.weight.data)
    refused(r"the weight of q is tied to norm\.weight", randlora.merge)
    model.norm = nn.LayerNorm(12)
    for value, dtype in ((float("nan"), torch.float32), (6e4, torch.float16)):  # PEFT merges the layers before that
        model.to(dtype).get_parameter("down.randlora_lambda.default").data.fill_(value)
        for reversible in (False, True):
            refused(f"weight of down would not be finite in {dtype}", randlora.merge, reversible=reversible)
    model.to("meta")
    refused("3 problems", randlora.merge)
    refused("q .* incomplete", randlora.merged_tensors)
    model = adapt(Mixed())
    model.norm.weight = nn.Parameter(torch.ones(12, device="meta"))
    refused("norm.weight has no values here", randlora.merged_tensors)
    model.q = nn.Linear(12, 12)
    refused("q no longer has adapter 'default'", randlora.merged_tensors)
    model = adapt(Mixed())
    randlora.merge(model)
    for gone in (randlora.merge, randlora.unmerge, randlora.merged_tensors):
        refused("a merge that is not reversible removed it", gone)


class Named(NamedTuple):
    layers: int
    states: Tensor


@dataclass(frozen=True, slots=True)
class Dataclass:
    states: Tensor


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda out: (out, None), lambda out: out[0]),
    "dict": (lambda out: {"loss": out.sum(), "states": [out]}, lambda out: out["states"][0]),
    "output": (lambda out: CausalLMOutput(loss=out.sum(), logits=out), lambda out: out.loss),
    "named tuple": (lambda out: Named(1, out), lambda out: out.states),
    "dataclass": (Dataclass, lambda out: out.states),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_pass_while_merged_is_refused_and_gradients_of_inputs_are_right(form: str) -> None:
    shaped, loss_of = FORMS[form]

    class Shaped(Mixed):
        def forward(self, tokens: Tensor) -> Any:
            return shaped(super().forward(tokens))

    model = adapt(Shaped(), train_also=["norm"])
    norm = model.norm

    def gradient() -> tuple[Tensor, Tensor]:
        out = loss_of(model(TOKENS))
        return torch.autograd.grad(out.sum(), norm.weight)[0], out.detach()

    before, expected = loss_of(model(TOKENS)).sum(), gradient()  # a graph that was made before the merge
    with randlora.merged(model):
        torch.testing.assert_close(gradient(), expected)
        assert torch.equal(torch.autograd.grad(before, norm.weight)[0], expected[0])
        with pytest.raises(MergeError, match=r"would get no gradients: call randlora\.unmerge\(model\) first"):
            loss_of(model(TOKENS)).sum().backward()
        with torch.no_grad():
            assert not loss_of(model(TOKENS)).requires_grad
        copy.deepcopy(model)
        randlora.set_trainable(model, "default", trainable=False)
        model.head.weight.requires_grad_()
        loss_of(model(TOKENS)).sum().backward()  # no adapter is trained, and the rest is right
        randlora.set_trainable(model, "default")
    loss_of(model(TOKENS)).sum().backward()
    assert all(each.grad is not None for each in randlora.trainable_parameters(model))


def test_training_while_merged_is_refused_in_our_words_where_nothing_else_requires_grad() -> None:
    model = adapt(Mixed())
    with randlora.merged(model):
        with pytest.raises(MergeError, match="would get no gradients"):
            model(TOKENS).sum().backward()
        trained = model(TOKENS)
        model.eval()
        assert not model(TOKENS).requires_grad, "what predicts may give its outputs to code without gradients"
        assert torch.equal(model(TOKENS), trained)
        model.train()
        randlora.set_trainable(model, "default", trainable=False)
        assert not model(TOKENS).requires_grad


def within(tolerance: float) -> Callable[[Tensor, Tensor], None]:
    return partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)


FACTORS = {"a": 1.0, "b": -0.7, "c": 0.4}


def with_three(model: Any, **options: Any) -> Any:
    for seed, name in enumerate(FACTORS):
        randlora.inject(model, name=name, **{"r": 3, "alpha": 4 + seed, "stream": "portable", "seed": seed, **options})
        fill(model, name, seed=seed)
    randlora.activate(model, FACTORS)
    return model


def assert_any_order(
    model: nn.Module, run: Callable[[], Tensor], assert_near: Callable[[Tensor, Tensor], None], **options: Any
) -> None:
    """Merge one adapter more or one fewer at a time, compare with what one merge makes, and go back to every bit."""

    def values() -> dict[str, Any]:  # without Λ and Γ, which stay
        return all_bits({name: value for name, value in model.named_parameters() if "randlora" not in name})

    before, wanted, at_once, merged = snapshot(model), run(), dict[str, Any](), set[str]()
    for names in (way := ["a", "ab", "abc", "bc", "c", "ca", "cab", "b"]):
        randlora.merge(model, adapters=[*names], reversible=True, **options)
        at_once[names] = values()
        randlora.unmerge(model)
    assert len({str(each) for each in at_once.values()}) > len(at_once) / 2
    for names in way:
        for name in {*names} - merged:
            report = randlora.merge(model, adapters=[name], reversible=True, **options)
            assert report.adapters == {name: FACTORS[name]}
        for name in merged - {*names}:
            randlora.unmerge(model, name)
        merged = {*names}
        assert values() == at_once[names]
        assert_near(run(), wanted)
    randlora.unmerge(model)
    assert_unchanged(model, before)
    assert same_bits(run(), wanted)


@pytest.mark.product
@every_mergeable_kind
@torch.no_grad()
def test_a_layer_of_any_kind_computes_the_sum_in_any_order_and_gets_back_every_bit(kind: LayerKind) -> None:
    model, x = with_three(nn.Sequential(kind.build(9, 14, True, kind.exact))), torch.randn(5, 9).to(kind.exact)
    assert_any_order(model, lambda: model(x), partial(assert_within_a_step, kind, model[0], x))
    if kind.is_quantized:
        options: dict[str, Any] = {"quantized": "dequantize", "dtype": torch.float32}
        assert_any_order(model, lambda: model(x), within(0.5 if kind.rounds_inputs else 1e-4), **options)
        randlora.merge(model, adapters="c", reversible=True, **options)
        with untouched(model), pytest.raises(MergeError, match="others are merged with different options"):
            randlora.merge(model, reversible=True)


@pytest.mark.product
@every_read_kind
def test_a_weight_that_is_read_is_the_sum_gets_back_every_bit_and_is_yielded(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = with_three(kind.model(dtype), **{**kind.adapter_options, "alpha": 5})
    assert_any_order(model, lambda: kind.run(model, dtype), within(1e-10))
    assert yielded_bits(model) == merged_bits(model)


def merged_bits(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Return what a permanent merge of a copy leaves in its state dict."""
    twin = copy.deepcopy(model)
    randlora.merge(twin, **options)
    return all_bits({name: value for name, value in twin.state_dict().items() if isinstance(value, Tensor)})


def yielded_bits(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Return what is yielded, after checking names, shapes and dtypes, and that the model stays as it is."""
    with untouched(model):
        pairs = [*randlora.merged_tensors(model, **options)]
        found = MergedTensors.of(model, options.get("dtype"), doing="test")
        planned = [(entry.fqn, found.on_meta(entry)) for entry in found.entries]
    assert len(dict(pairs)) == len(pairs)
    shown = [[(name, tensor.dtype, tensor.shape) for name, tensor in each] for each in (pairs, planned)]
    assert shown[0] == shown[1], "as it is known before"
    return {name: bits(tensor) for name, tensor in pairs}


@pytest.mark.product
@every_mergeable_kind_and_dtype
def test_every_kind_of_layer_is_yielded_as_it_would_be_merged(kind: LayerKind, dtype: torch.dtype) -> None:
    model = nn.Sequential(kind.build(128, 96, True, dtype), nn.LayerNorm(96, dtype=dtype))
    adapt(model, r=8, targets=["0"])
    options: dict[str, Any] = {"quantized": "dequantize"} if kind.is_quantized else {}
    expected = merged_bits(model, **options)
    assert yielded_bits(model) == expected
    with randlora.merged(model, **options):
        assert yielded_bits(model) == expected
    with randlora.merged(model):
        assert yielded_bits(model).keys() == expected.keys()
    model.append(kind.build(96, 64, True, dtype))
    assert yielded_bits(model)["2.weight"][1] in ((64, 96), (96, 64)), "without an adapter it is written out too"


class Beside(nn.Module):
    """A model with buffers of both sorts, a tied and a shared layer, and a norm with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.norm = nn.Embedding(20, 12), nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.second, self.head = nn.Linear(16, 12), nn.Linear(12, 20, bias=False)
        self.again, self.head.weight = self.second, self.table.weight
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("dropped", torch.randn(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.again.bias + self.second(self.norm(self.first(self.table(ids)))))
        return logits


def beside() -> Any:
    return adapt(Beside(), targets=["first", "second"], train_also=["norm.weight", "norm.bias"]).eval()


def test_names_order_and_bits_are_those_of_the_plain_models_state_dict() -> None:
    plain, model = Beside().eval(), beside()
    expected, names = merged_bits(model), list(plain.state_dict())
    assert list(yielded_bits(model)) == names
    assert yielded_bits(model) == yielded_bits(torch.nn.DataParallel(model)) == expected
    with randlora.merged(model):
        assert yielded_bits(model) == expected
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert all_bits(dict(randlora.merged_tensors(model))) == expected
    tensors = dict(randlora.merged_tensors(model))
    assert not any(tensor.requires_grad for tensor in tensors.values())
    plain.load_state_dict(tensors, strict=True)
    ids = torch.randint(0, 20, (7,))
    torch.testing.assert_close(plain(ids), model(ids))
    outer = nn.Sequential(model, nn.Linear(20, 2))
    assert list(yielded_bits(outer)) == [*(f"0.{name}" for name in names), "1.weight", "1.bias"]
    for name, tensor in randlora.merged_tensors(model, dtype=torch.bfloat16):
        assert bits(tensor) == bits(tensors[name].bfloat16() if tensors[name].is_floating_point() else tensors[name])
    with pytest.raises(ConfigError, match="a floating dtype or None"):
        randlora.merged_tensors(model, dtype=torch.int8)
    lazily, alive = randlora.merged_tensors(model), list[weakref.ref[Tensor]]()
    expected = merged_bits(fill(model, seed=1))
    for name, tensor in lazily:  # each is computed when it is asked for, and not kept
        assert bits(tensor) == expected[name]
        if name in ("first.weight", "second.weight"):
            assert not any(each() is not None for each in alive)
            alive.append(weakref.ref(tensor))
        del tensor


CHANGES: list[tuple[Callable[[nn.Module], Any], str]] = [
    *((change, "from two different models") for change in (randlora.merge, randlora.eject, randlora.disabled)),
    (lambda model: randlora.activate(model, {"default": 0.5}), "from two different models"),
    (lambda model: randlora.trainable_parameters(model)[0].data.fill_(torch.nan), "of first.weight would not be fin"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=["merge", "eject", "disabled", "activate", "nan"])
def test_a_change_between_two_tensors_and_values_that_are_not_finite_are_refused(change: Any, message: str) -> None:
    tensors = randlora.merged_tensors(model := beside())
    next(tensors)
    changed = change(model)
    block = changed if isinstance(changed, AbstractContextManager) else nullcontext()
    with block, pytest.raises(MergeError, match=message):
        dict(tensors)


X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda model: torch.export.export(model, (X,)).module(), marks=[needs_export, pytest.mark.medium]),
        pytest.param(
            lambda model: torch.jit.trace(model, (X,)), marks=pytest.mark.filterwarnings("ignore:`torch.jit.trace")
        ),
        pytest.param(lambda model: torch.compile(model, backend="eager"), marks=[needs_compiler, pytest.mark.medium]),
    ],
)
def test_a_program_of_a_merged_model_stays_what_it_was_and_parameters_are_the_same_objects(make: Any) -> None:
    model = adapt(nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), r=2, targets="all")
    held: dict[str, Any] = dict(model.named_parameters())
    expected = model(X)
    held["1.weight"].sharded = True  # as libraries mark parameters
    with randlora.merged(model):
        assert model.get_parameter("1.weight") is not held["1.weight"]
        assert dict(model.named_parameters())["1.weight"].__dict__ == {"sharded": True}
        program = make(model)
        assert_close(program(X), expected, torch.float32)
    assert_close(program(X), expected, torch.float32)
    assert_close(model(X), expected, torch.float32)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    randlora.merge(model)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())  # which an optimizer holds
    program = make(model)
    assert_close(program(X), expected, torch.float32)
    assert not [name for name in getattr(program, "state_dict", dict)() if "randlora" in name]

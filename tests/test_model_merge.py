"""Law 3: a merged layer is the adapted one, and unmerging gives every bit back, in any order of several adapters."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import randlora
from randlora.errors import AdapterError, MergeError
from tests.kit import Bits, all_bits, assert_unchanged, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, TOLERANCES, Mixed, adapted_names, assert_close, update_of
from tests.layer_kinds import (
    LayerKind,
    every_dense_kind_and_dtype,
    every_mergeable_kind,
    every_mergeable_kind_and_dtype,
)
from tests.read_kinds import ReadKind, every_read_kind


def one_layer(kind: LayerKind, shape: tuple[int, int], dtype: torch.dtype, r: int = 3) -> nn.Sequential:
    model = nn.Sequential(kind.build(*shape, True, dtype))
    randlora.inject(model, r=r, alpha=r, stream="portable")
    fill(model)
    return model


def mixed(dtype: torch.dtype = torch.float32, **options: Any) -> Mixed:
    model = Mixed(dtype)
    randlora.inject(model, r=4, **options)
    return fill(model)


def assert_within_a_step(kind: LayerKind, model: nn.Sequential, x: Tensor, expected: Tensor) -> None:
    """Compare a merged layer's output; weights that are codes may each be a step off what was merged."""
    layer = model[0]
    found, allowed = model(x).double(), x.double().abs() @ kind.step(layer).double().T if kind.step else 0.0
    tolerance = 0.05 if kind.rounds_inputs else TOLERANCES[x.dtype]
    rounding = tolerance * max(1.0, expected.abs().max().item())
    assert ((found - expected.double()).abs() <= allowed + rounding).all()


@every_mergeable_kind_and_dtype
@settings(max_examples=8)
@given(shape=st.tuples(st.integers(2, 15), st.integers(2, 15)), r=st.integers(1, 6))
def test_a_merged_layer_computes_what_the_adapted_one_does_and_unmerging_restores_every_bit(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int], r: int
) -> None:
    model = one_layer(kind, shape, dtype, r)
    before, layer, x = snapshot(model), model[0], torch.randn(5, shape[0]).to(dtype)
    expected = model(x)
    for _ in range(2):
        with randlora.merged(model):
            assert_within_a_step(kind, model, x, expected)
        assert_unchanged(model, before)
        assert same_bits(model(x), expected)
    randlora.merge(model)
    assert model[0] is layer
    assert adapted_names(model) == set()
    assert_within_a_step(kind, model, x, expected)


@every_dense_kind_and_dtype
@pytest.mark.parametrize("is_cast", [False, True])
def test_a_merged_weight_is_the_exact_sum_rounded_once(kind: LayerKind, dtype: torch.dtype, is_cast: bool) -> None:
    model = one_layer(kind, (9, 14), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    expected = (kind.weight(model[0]).to(wide) + update_of(model[0])).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        randlora.merge(model)
    assert same_bits(kind.weight(model[0]), expected)
    assert model.get_parameter("0.weight").is_contiguous()


def test_several_adapters_are_summed_before_the_one_rounding() -> None:
    model = mixed(torch.bfloat16)
    randlora.inject(model, r=4, name="b", targets=["q"])
    fill(model, "b", seed=1)
    randlora.activate(model, {"default": 0.7, "b": -0.3})
    delta = 0.7 * randlora.delta_weight(model, "q", name="default") - 0.3 * randlora.delta_weight(model, "q", name="b")
    expected = (model.get_parameter("q.weight").float() + delta).to(torch.bfloat16)
    report = randlora.merge(model, reversible=True)
    assert report.adapters == {"default": 0.7, "b": -0.3}
    torch.testing.assert_close(model.get_parameter("q.weight"), expected, rtol=2**-8, atol=0)


def test_merged_nests_and_leaves_the_state_it_found() -> None:
    model = Mixed()
    before = snapshot(model)
    randlora.inject(model, r=4)
    fill(model)
    with randlora.merged(model) as outer:
        with randlora.merged(model) as inner:
            assert inner is outer
        assert randlora.adapters(model)[0].is_merged
    assert not randlora.adapters(model)[0].is_merged
    report = randlora.merge(model, reversible=True)
    with randlora.merged(model) as inner:
        assert inner is report
    assert randlora.unmerge(model) == report.targets == ("q", "up", "down")
    with randlora.merged(model):
        randlora.unmerge(model)
    with randlora.merged(model):
        randlora.eject(model)
    assert_unchanged(model, before)


def test_what_is_merged_or_unmerged_in_inference_mode_can_be_trained_later() -> None:
    model, other = mixed(), mixed()
    randlora.merge(other, reversible=True)
    other.double()
    with torch.inference_mode():
        randlora.merge(model)
        randlora.unmerge(other)
    other.embed.requires_grad_()
    for each in (model, other):
        each(TOKENS).sum().backward()
        assert each.embed.weight.grad is not None
    assert all(parameter.grad is not None for parameter in model.parameters())  # trained as before the adapter


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.float32), (1e6, torch.float16)]
)
def test_a_merge_that_would_not_be_finite_changes_nothing(value: float, dtype: torch.dtype) -> None:
    """PEFT's safe_merge leaves the layers before the bad one merged."""
    model = mixed(dtype)
    model.get_parameter("down.randlora_lambda.default").data.fill_(value)
    for reversible in (False, True):
        with untouched(model), pytest.raises(MergeError, match=f"weight of down would not be finite in {dtype}"):
            randlora.merge(model, reversible=reversible)


def test_what_would_lose_something_or_go_wrong_while_merged_is_refused() -> None:
    model = mixed()
    merge: Any = partial(randlora.merge, reversible=True)

    def refused(message: str, verb: Callable[..., Any], *args: Any, **options: Any) -> None:
        with untouched(model), pytest.raises((MergeError, AdapterError), match=message):
            verb(model, *args, **options)

    refused("the adapters are not merged", randlora.unmerge)
    with randlora.disabled(model):
        refused(r"outside of randlora\.disabled\(model\)", randlora.merge)
    with randlora.serving.routed(model, ["default"]):
        refused(r"merge outside of randlora\.serving\.routed", randlora.merge)
    randlora.inject(model, r=4, targets=["up"], name="b", train_also=["q.weight"])
    randlora.inject(model, r=4, name="idle")
    refused("b, idle would be lost: save and remove inactive adapters", randlora.merge)
    randlora.activate(model, [])
    refused("no adapter is active: activate one of default", randlora.merge)
    randlora.activate(model, ["default", "b"])
    refused(r"'b' would not be merged, but trains a copy of q\.weight", merge, adapters="default")
    refused("default, idle would be lost: save and remove other", randlora.merge, adapters="b")
    for names, message in (("x", "no adapter named 'x'"), ([[]], r"named \[\]"), (3, "named 3"), ([], "is empty")):
        refused(message, merge, adapters=names)
    refused("'idle' is not active", merge, adapters="idle")
    randlora.activate(model, ["default", "idle"])
    merge(model, adapters="default")
    refused("'default' is merged already", merge, adapters=["default", "idle"])
    refused("'b' is not merged: default is", randlora.unmerge, ["default", "b"])
    refused(r"\[\] is not merged: default is", randlora.unmerge, [[]])
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
    model.to("meta")
    refused("3 problems", randlora.merge)
    model = mixed()
    randlora.merge(model)
    for verb in (randlora.merge, randlora.unmerge):
        refused("a merge that is not reversible removed it", verb)


class Wrapped(nn.Module):
    """Returns what a model computes in one of the forms that models return."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.form = Mixed(), form

    def forward(self, ids: Tensor) -> Any:
        return self.form(self.inner(ids))


class Named(NamedTuple):
    """An output in a named tuple."""

    layers: int
    states: Tensor


@dataclass(frozen=True, slots=True)
class Dataclass:
    """An output in a dataclass that cannot be changed."""

    states: Tensor


@pytest.mark.parametrize(
    ("form", "loss_of"),
    [
        (lambda out: (out, None), lambda out: out[0]),
        (lambda out: {"loss": out.sum(), "states": [out]}, lambda out: out["states"][0]),
        (lambda out: CausalLMOutput(loss=out.sum(), logits=out), lambda out: out.loss),
        (lambda out: Named(1, out), lambda out: out.states),
        (lambda out: Dataclass(out), lambda out: out.states),  # noqa: PLW0108
    ],
    ids=["tuple", "dict", "output", "named tuple", "dataclass"],
)
def test_a_backward_pass_while_merged_is_refused_and_gradients_of_inputs_are_right(form: Any, loss_of: Any) -> None:
    model = Wrapped(form)
    randlora.inject(model, r=4, targets=["q", "up", "down"], train_also=["norm"])
    fill(model)
    inner: Any = model.inner

    def gradient() -> tuple[Tensor, Tensor]:
        out = loss_of(model(TOKENS))
        return torch.autograd.grad(out.sum(), inner.norm.weight)[0], out.detach()

    before = loss_of(model(TOKENS)).sum()  # a graph that was made before the merge
    expected = torch.autograd.grad(before, inner.norm.weight, retain_graph=True)[0], loss_of(model(TOKENS)).detach()
    with randlora.merged(model):
        torch.testing.assert_close(gradient(), expected)
        assert torch.equal(torch.autograd.grad(before, inner.norm.weight)[0], expected[0])
        with pytest.raises(MergeError, match=r"would get no gradients: call randlora\.unmerge\(model\) first"):
            loss_of(model(TOKENS)).sum().backward()
        with torch.no_grad():
            assert not loss_of(model(TOKENS)).requires_grad
        copy.deepcopy(model)
        randlora.set_trainable(model, "default", trainable=False)
        inner.head.weight.requires_grad_()
        loss_of(model(TOKENS)).sum().backward()  # no adapter is trained, and the rest is right
        randlora.set_trainable(model, "default")
    loss_of(model(TOKENS)).sum().backward()
    assert all(each.grad is not None for each in randlora.trainable_parameters(model))
    randlora.inject(model, r=4, targets=["q"], name="on top")
    randlora.activate(model, ["default", "on top"])
    randlora.set_trainable(model, "on top")
    randlora.merge(model, adapters="default", reversible=True)
    loss_of(model(TOKENS)).sum().backward()


def test_a_state_dict_of_a_merged_model_counts_no_adapter_twice_and_follows_its_dtype() -> None:
    model, twin = mixed(), Mixed()
    randlora.inject(twin, r=4)
    with randlora.merged(model):
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert model.state_dict(keep_vars=True)["q.bias"] is model.q.bias
    twin.load_state_dict(saved)
    assert same_bits(twin(TOKENS), model(TOKENS))
    randlora.merge(model, reversible=True)
    assert {tensor.dtype for tensor in model.half().state_dict().values()} == {torch.float16}


# Some of several adapters, while the others stay active on top

FACTORS = {"a": 1.0, "b": -0.7, "c": 0.4}
WAY = [frozenset(names) for names in ("a", "ab", "abc", "bc", "c", "ca", "cab", "b", "")]
"""Which adapters are merged, step by step: one more or one fewer at a time."""


def with_three(model: nn.Module, **options: Any) -> nn.Module:
    for seed, name in enumerate(FACTORS):
        randlora.inject(model, name=name, **{"r": 3, "alpha": 4 + seed, "stream": "portable", "seed": seed, **options})
        fill(model, name, seed=seed)
    randlora.activate(model, FACTORS)
    return model


def step(model: nn.Module, wanted: Iterable[str], **options: Any) -> None:
    """Merge and unmerge adapters one by one until those wanted are merged."""
    now = {info.name for info in randlora.adapters(model) if info.is_merged}
    for name in {*wanted} - now:
        assert randlora.merge(model, adapters=[name], reversible=True, **options).adapters == {name: FACTORS[name]}
    for name in now.difference(wanted):
        randlora.unmerge(model, name)


def values(model: nn.Module) -> dict[str, Bits]:
    """Take down the weights that the model computes with, without Λ and Γ, which stay."""
    return all_bits({name: value for name, value in model.named_parameters() if "randlora" not in name})


def assert_any_order(
    model: nn.Module, run: Callable[[], Tensor], check: Any, way: list[frozenset[str]] = WAY, **options: Any
) -> None:
    """Compare the weights on a way with those that one merge makes, and go back to every bit."""
    before, wanted, at_once = snapshot(model), run(), {frozenset[str](): values(model)}
    for names in {*way} - {frozenset()}:
        randlora.merge(model, adapters=names, reversible=True, **options)
        at_once[names] = values(model)
        randlora.unmerge(model)
    assert len({str(each) for each in at_once.values()}) > len(at_once) / 2
    for names in way:
        step(model, names, **options)
        assert values(model) == at_once[names]
        check(run(), wanted)
    assert_unchanged(model, before)
    assert same_bits(run(), wanted)


@every_mergeable_kind
def test_a_layer_of_any_kind_computes_the_sum_and_gets_back_every_bit(kind: LayerKind) -> None:
    model = with_three(nn.Sequential(kind.build(9, 14, True, kind.exact)))
    x = torch.randn(5, 9).to(kind.exact)
    tolerance = 0.5 if kind.rounds_inputs else 1e-4
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        check = (lambda *_: None) if kind.is_quantized else partial(assert_close, dtype=kind.exact)
        assert_any_order(model, lambda: model(x), check)
        if kind.is_quantized:
            options: dict[str, Any] = {"quantized": "dequantize", "dtype": torch.float32}
            assert_any_order(model, lambda: model(x), close, **options)
            step(model, {"c"}, **options)
            with untouched(model), pytest.raises(MergeError, match="others are merged with different options"):
                randlora.merge(model, reversible=True)


@every_read_kind
def test_a_weight_that_is_read_is_the_sum_and_gets_back_every_bit(kind: ReadKind) -> None:
    dtype = kind.dtypes[0]
    model = with_three(kind.model(dtype), **{**kind.adapter_options, "alpha": 5})
    check = partial(assert_close, dtype=dtype)
    assert_any_order(model, lambda: kind.run(model, dtype), check, [*map(frozenset, ("a", "ac", "c", ""))])

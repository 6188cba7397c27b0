"""Law 3: a merged layer is the adapted one, and unmerging gives every bit back."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import randlora
from randlora.errors import AdapterError, MergeError
from tests.kit import assert_unchanged, fill, same_bits, snapshot, untouched
from tests.laws import (
    TOKENS,
    TOLERANCES,
    Mixed,
    adapted_names,
    assert_close,
    update_of,
)
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_dense_kind_and_dtype, every_mergeable_kind_and_dtype
from tests.strategies import KINDS_AND_STREAMS

shapes = st.tuples(st.integers(2, 15), st.integers(2, 15))


def one_layer(kind: LayerKind, shape: tuple[int, int], dtype: torch.dtype, r: int = 3) -> nn.Sequential:
    model = nn.Sequential(kind.build(*shape, True, dtype))
    randlora.inject(model, r=r, alpha=r, stream="portable")
    fill(model)
    return model


def assert_within_a_step(kind: LayerKind, model: nn.Sequential, x: Tensor, expected: Tensor) -> None:
    """Compare a merged layer's output; weights that are codes may each be a step off what was merged."""
    layer = model[0]
    found, allowed = model(x).double(), x.double().abs() @ kind.step(layer).double().T if kind.step else 0.0
    tolerance = 0.05 if kind.rounds_inputs else TOLERANCES[x.dtype]
    rounding = tolerance * max(1.0, expected.abs().max().item())
    assert ((found - expected.double()).abs() <= allowed + rounding).all()


@every_mergeable_kind_and_dtype
@given(shape=shapes, r=st.integers(1, 6))
def test_a_merged_layer_computes_what_the_adapted_one_does(
    kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int], r: int
) -> None:
    model = one_layer(kind, shape, dtype, r)
    x = torch.randn(5, shape[0]).to(dtype)
    expected = model(x)
    layer = model[0]
    randlora.merge(model)
    assert model[0] is layer
    assert adapted_names(model) == set()
    assert_within_a_step(kind, model, x, expected)


@every_dense_kind_and_dtype
def test_a_merged_weight_is_the_exact_sum_rounded_once(kind: LayerKind, dtype: torch.dtype) -> None:
    model = one_layer(kind, (9, 14), dtype)
    layer = model[0]
    wide = torch.promote_types(dtype, torch.float32)
    expected = (kind.weight(layer).to(wide) + update_of(layer)).to(dtype)
    randlora.merge(model)
    assert same_bits(kind.weight(model[0]), expected)


@every_mergeable_kind_and_dtype
@given(shape=shapes)
def test_unmerging_restores_every_bit(kind: LayerKind, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    model = one_layer(kind, shape, dtype)
    before, x = snapshot(model), torch.randn(5, shape[0]).to(dtype)
    expected = model(x)
    for _ in range(3):
        with randlora.merged(model):
            assert_within_a_step(kind, model, x, expected)
        assert_unchanged(model, before)
        assert same_bits(model(x), expected)


@pytest.mark.parametrize(("basis", "stream"), KINDS_AND_STREAMS)
def test_every_kind_of_basis_merges(basis: str, stream: str) -> None:
    model = Mixed(torch.float64)
    randlora.inject(model, r=4, basis=basis, stream=stream)  # type: ignore[arg-type]
    fill(model)
    expected = model(TOKENS)
    report = randlora.merge(model)
    assert report.targets == ("q", "up", "down")
    assert adapted_names(model) == set()
    assert_close(model(TOKENS), expected, torch.float64)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_adapters_are_summed_before_the_one_rounding() -> None:
    model = Mixed(torch.bfloat16)
    randlora.inject(model, r=4)
    randlora.inject(model, r=4, name="b", targets=["q"])
    fill(model)
    fill(model, "b", seed=1)
    randlora.activate(model, {"default": 0.7, "b": -0.3})
    delta = 0.7 * randlora.delta_weight(model, "q", name="default") - 0.3 * randlora.delta_weight(model, "q", name="b")
    expected = (model.get_parameter("q.weight").float() + delta).to(torch.bfloat16)
    report = randlora.merge(model, reversible=True)
    assert report.adapters == {"default": 0.7, "b": -0.3}
    torch.testing.assert_close(model.get_parameter("q.weight"), expected, rtol=2**-8, atol=0)


def test_merged_nests_and_leaves_the_state_it_found() -> None:
    model = Mixed()
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
    assert randlora.unmerge(model) == ("q", "up", "down")


def test_weights_merged_in_inference_mode_can_be_trained_later() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    with torch.inference_mode():
        randlora.merge(model)
    model(TOKENS).sum().backward()
    assert model.q.weight.grad is not None


def _poison(model: Mixed, value: float) -> None:
    with torch.no_grad():
        model.get_parameter("down.randlora_lambda.default").fill_(value)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merge_that_would_not_be_finite_changes_nothing(reversible: bool, value: float) -> None:
    """PEFT's safe_merge leaves the layers before the bad one merged."""
    model = Mixed()
    randlora.inject(model, r=4)
    fill(model)
    _poison(model, value)
    with untouched(model), pytest.raises(MergeError, match="merged weight of down would not be finite"):
        randlora.merge(model, reversible=reversible)


def test_an_overflow_of_half_precision_is_refused() -> None:
    model = Mixed(torch.float16)
    randlora.inject(model, r=4)
    _poison(model, 1e6)
    with untouched(model), pytest.raises(MergeError, match=r"would not be finite in torch\.float16"):
        randlora.merge(model)


def _two(model: nn.Module) -> None:
    randlora.inject(model, r=4, name="b", targets=["q"])


def _disable(model: nn.Module) -> None:
    with randlora.disabled(model):
        pass


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_two, "b would be lost: save and remove inactive adapters"),
        (lambda model: randlora.activate(model, []), "no adapter is active: activate one of default"),
        (lambda model: randlora.merge(model, reversible=True), r"merged already: call randlora\.unmerge"),
        (lambda model: model.to("meta"), "3 problems"),
    ],
)
def test_a_merge_that_would_lose_something_is_refused(prepare: Callable[[nn.Module], object], message: str) -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    prepare(model)
    with untouched(model), pytest.raises(MergeError, match=message):
        randlora.merge(model)


def test_merging_while_disabled_and_unmerging_what_is_not_merged_are_refused() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    with randlora.disabled(model), pytest.raises(MergeError, match=r"merge outside of randlora\.disabled\(model\)"):
        randlora.merge(model)
    rows = randlora.serving.routed(model, ["default"])
    with rows, pytest.raises(MergeError, match=r"merge outside of randlora\.serving\.routed"):
        randlora.merge(model)
    with untouched(model), pytest.raises(MergeError, match="the adapters are not merged"):
        randlora.unmerge(model)


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: randlora.activate(model, {"default": 2.0}),
        lambda model: randlora.remove(model, "default"),
        _disable,
        _two,
    ],
)
def test_verbs_that_would_go_wrong_while_merged_are_refused(verb: Callable[[nn.Module], object]) -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    randlora.merge(model, reversible=True)
    with untouched(model), pytest.raises(AdapterError, match=r"while the adapters are merged: call randlora\.unmerge"):
        verb(model)


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
        (lambda out: out, lambda out: out),
        (lambda out: (out, None), lambda out: out[0]),
        (lambda out: {"loss": out.sum(), "states": [out]}, lambda out: out["states"][0]),
        (lambda out: CausalLMOutput(loss=out.sum(), logits=out), lambda out: out.loss),
        (lambda out: Named(1, out), lambda out: out.states),
        (lambda out: Dataclass(out), lambda out: out.states),  # noqa: PLW0108
    ],
    ids=["tensor", "tuple", "dict", "output", "named tuple", "dataclass"],
)
def test_a_backward_pass_while_merged_is_refused_and_gradients_of_inputs_are_right(form: Any, loss_of: Any) -> None:
    model = Wrapped(form)
    randlora.inject(model, r=4, targets=["q", "up", "down"], train_also=["norm"])
    fill(model)
    x = TOKENS
    inner: Any = model.inner
    expected = torch.autograd.grad(loss_of(model(x)).sum(), inner.norm.weight)[0]
    plain = loss_of(model(x)).detach()
    with randlora.merged(model):
        out = model(x)
        torch.testing.assert_close(loss_of(out).detach(), plain)
        found = torch.autograd.grad(loss_of(out).sum(), inner.norm.weight)[0]
        torch.testing.assert_close(found, expected)
        with pytest.raises(MergeError, match=r"would get no gradients: call randlora\.unmerge\(model\) first"):
            loss_of(model(x)).sum().backward()
        with torch.no_grad():
            assert not loss_of(model(x)).requires_grad
        copy.deepcopy(model)
        randlora.set_trainable(model, "default", trainable=False)
        inner.head.weight.requires_grad_()
        loss_of(model(x)).sum().backward()  # no adapter is trained, and the rest is right
        randlora.set_trainable(model, "default")
    loss_of(model(x)).sum().backward()
    assert all(each.grad is not None for each in randlora.trainable_parameters(model))


def test_merging_twice_says_what_the_first_merge_did() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    randlora.merge(model)
    for verb in (randlora.merge, randlora.unmerge):
        with pytest.raises(AdapterError, match="a merge that is not reversible removed it"):
            verb(model)


def test_a_merged_layer_is_as_contiguous_as_torch_likes_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8))
    randlora.inject(model, r=2, targets="all-linear")
    fill(model)
    randlora.merge(model)
    weight: Tensor = model[0].weight  # type: ignore[assignment]
    assert weight.is_contiguous()


def test_autocast_does_not_reach_into_a_merge() -> None:
    weights = []
    for enabled in (True, False):
        torch.manual_seed(0)
        model = one_layer(LAYER_KINDS[0], (9, 14), torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            randlora.merge(model)
        weights.append(model.get_parameter("0.weight"))
    assert same_bits(*weights)


def test_a_state_dict_saved_while_merged_counts_no_adapter_twice() -> None:
    model, twin = Mixed(), Mixed()
    for each in (model, twin):
        randlora.inject(each, r=4)
    fill(model)
    with randlora.merged(model):
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin.load_state_dict(saved)
    assert same_bits(twin(TOKENS), model(TOKENS))


def test_ejecting_inside_merged_ends_well() -> None:
    model = Mixed()
    before = snapshot(model)
    randlora.inject(model, r=4)
    fill(model)
    with randlora.merged(model):
        randlora.eject(model)
    assert_unchanged(model, before)


def test_what_is_unmerged_in_inference_mode_can_be_trained_through() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    randlora.merge(model, reversible=True)
    model.double()
    with torch.inference_mode():
        randlora.unmerge(model)
    model.embed.requires_grad_()
    model(TOKENS).sum().backward()
    assert model.embed.weight.grad is not None


def test_merging_lets_go_of_the_bases_written_out() -> None:
    model = Mixed(torch.bfloat16)
    randlora.inject(model, r=4)
    model(TOKENS)
    with randlora.merged(model):
        assert [basis._copies for basis in randlora.state.adapted_root(model)[1].bank] == [{}]


def test_a_graph_made_before_a_merge_keeps_its_gradients() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    fill(model)
    x = torch.randn(3, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(model.q(x).sum(), x)
    output = model.q(x).sum()
    with randlora.merged(model):
        (found,) = torch.autograd.grad(output, x)
    assert torch.equal(found, expected)


def test_a_state_dict_of_a_merged_model_follows_its_dtype_and_keeps_the_parameters_objects() -> None:
    model = Mixed()
    randlora.inject(model, r=4)
    fill(model)
    randlora.merge(model, reversible=True)
    model.half()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert model.state_dict(keep_vars=True)["q.bias"] is model.q.bias


def test_merging_is_refused_where_a_weight_was_tied_after_it_was_adapted() -> None:
    model = Mixed()
    randlora.inject(model, r=4, targets=["q"])
    fill(model)
    model.norm.weight = nn.Parameter(model.q.weight.data)
    with untouched(model), pytest.raises(MergeError, match=r"the weight of q is tied to norm\.weight"):
        randlora.merge(model)

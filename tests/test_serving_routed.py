"""Each row of a batch through its own adapter: equal to running each adapter alone, or an error."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from threading import Thread
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nested import nested_tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

import randlora
from randlora.errors import AdapterError, MergeError
from randlora.functional import Compute, Diagonals
from randlora.serving import routed, stacked
from randlora.serving.stacked import Stack, Way, one_by_one, stacked_update
from tests import models, reference
from tests.kit import adapt, in_call, untouched
from tests.laws import assert_close
from tests.layer_kinds import LayerKind, every_kind
from tests.pairs import Case, case, every_form
from tests.read_kinds import READ_KINDS, ReadKind, output_of, weighted
from tests.serving import Names, each_alone, row_by_row, with_adapters
from tests.strategies import ranks, sides

OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "alpha": 6},
    "b": {"r": 3, "alpha": 9},  # on the bases of a
    "c": {"r": 2, "alpha": 2, "basis": "block", "seed": 5},
    "d": {"r": 2, "alpha": 7, "basis": "block", "seed": 5},
    "elsewhere": {"r": 3, "targets": ["1"]},
}
NAMES: Names = ["a", "b", None, "a"]
names_of_rows = st.lists(st.sampled_from([*OPTIONS, None]), min_size=1, max_size=7)


def with_some(model: nn.Module, names: Names | None = None, **options: Any) -> nn.Module:
    chosen = {name: own for name, own in OPTIONS.items() if names is None or name in ("a", *names)}
    for seed, (name, own) in enumerate(chosen.items()):
        adapt(model, values=seed, name=name, stream="portable", **{"targets": ["0", "1"], **options, **own})
    return model


def in_block(model: nn.Module, names: Names, run: Callable[[], Tensor]) -> Tensor:
    with routed(model, names):
        return run()


@every_kind
@settings(max_examples=6)
@given(
    st.tuples(*[st.integers(1, 20).filter(lambda side: side != 16)] * 2),
    names_of_rows,
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.sampled_from(get_args(Compute)),
    st.booleans(),
)
def test_rows_are_those_of_each_adapter_alone(
    kind: LayerKind, sides: tuple[int, int], names: Names, lead: tuple[int, ...], compute: Compute, has_grad: bool
) -> None:
    layers = kind.build(*sides, True, kind.exact), nn.Linear(sides[1], 4)
    model = with_some(nn.Sequential(*layers), names, targets=["0"]).to(kind.exact)
    randlora.set_compute(model, compute)
    x = torch.randn(len(names), *lead, sides[0], dtype=kind.exact)
    with torch.set_grad_enabled(has_grad):
        expected = row_by_row(model, names, lambda: model(x))
        assert_close(in_block(model, names, lambda: model(x)), expected, kind.exact)


def test_in_training_dropout_falls_on_the_rows_of_each_adapter() -> None:
    model, x = with_some(nn.Sequential(nn.Linear(10, 6)), ["a"], targets=["0"], dropout=0.5), torch.randn(4, 10)
    torch.manual_seed(1)
    expected = row_by_row(model, ["a"] * 4, lambda: model(x))
    torch.manual_seed(1)
    assert_close(in_block(model, ["a"] * 4, lambda: model(x)), expected, torch.float32)
    assert not torch.allclose(model(x), expected)


@settings(max_examples=8)
@given(names_of_rows, st.integers(1, 4))
def test_gradients_are_those_of_each_adapter_alone(names: Names, tokens: int) -> None:
    model = with_some(nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 8)).double(), trainable=True)
    x = torch.randn(len(names), tokens, 10, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(len(names), tokens, 8, dtype=torch.float64)
    wanted = [x, *randlora.trainable_parameters(model)]
    found = []
    for run in (row_by_row, in_block):
        loss = (run(model, names, lambda: model(x)) * factors).sum()
        found.append(torch.autograd.grad(loss, wanted, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one.to(other.dtype), rtol=1e-6, atol=1e-7)  # Λ and Γ are float32


@pytest.mark.parametrize(  # out_proj is a weight that attention reads of a layer inside of it
    "kind", [kind for kind in READ_KINDS if "out_proj" not in kind.name], ids=lambda kind: kind.name
)
def test_rows_of_modules_that_read_their_weight(kind: ReadKind) -> None:
    model = kind.adapted(torch.float64)
    adapt(model, values=7, **{**kind.adapter_options, **kind.other, "name": "b", "seed": 7})
    args = kind.arguments(torch.float64)
    names: Names = [("default", None, "b")[row % 3] for row in range(args[0].shape[0])]
    randlora.set_trainable(model, ["default", "b"])
    expected, found = (run(model, names, lambda: output_of(model[0](*args))) for run in (row_by_row, in_block))
    assert_close(found, expected, torch.float64)
    assert len(names) == 1 or not torch.equal(expected[0], expected[1])
    trained = [*randlora.trainable_parameters(model)]
    for ours, alone in zip(
        *(torch.autograd.grad(weighted(each), trained, materialize_grads=True) for each in (found, expected)),
        strict=True,
    ):
        assert_close(ours, alone, torch.float32)


def test_attention_of_which_the_output_projection_alone_is_adapted_is_refused() -> None:
    model, x = (
        with_adapters(nn.Sequential(nn.MultiheadAttention(12, 2, batch_first=True)), ["out_proj"]),
        torch.randn(4, 5, 12),
    )
    with routed(model, NAMES), pytest.raises(AdapterError, match="reads an adapted weight outside of the forward"):
        model[0](x, x, x)


@pytest.mark.parametrize(("batch_first", "masked"), [(False, "padding"), (True, "heads"), (False, "all")])
def test_attention(batch_first: bool, masked: str) -> None:
    attention = nn.MultiheadAttention(12, 2, batch_first=batch_first).double()
    model, tokens, axis = with_adapters(nn.Sequential(attention), "all"), 4 if masked == "all" else 5, 1 - batch_first
    x = torch.randn(*((4, tokens) if batch_first else (tokens, 4)), 12, dtype=torch.float64)
    others = ~torch.eye(tokens, dtype=torch.bool)
    options: dict[str, Any] = {
        "padding": {"key_padding_mask": torch.rand(4, tokens) > 0.8},
        "heads": {"attn_mask": (torch.rand(8, tokens, tokens) > 0.7) & others},
        "all": {"attn_mask": others.triu(1)},
    }[masked]
    singles = each_alone(model, NAMES, lambda: model[0](x, x, x, **options))
    with routed(model, NAMES):
        for _ in range(2):
            output, weights = model[0](x, x, x, **options)
            for row, name in enumerate(NAMES):
                torch.testing.assert_close(output.select(axis, row), singles[name][0].select(axis, row), equal_nan=True)
                torch.testing.assert_close(weights[row], singles[name][1][row], equal_nan=True)
            with pytest.raises((AdapterError, RuntimeError, AssertionError)):
                model[0](*[torch.randn(7)] * 3)


@pytest.mark.parametrize("axis", [0, 1])
def test_attention_inside_of_a_model_that_may_put_tokens_first(axis: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=axis == 0)
            self.reading = nn.MultiheadAttention(12, 2, batch_first=axis == 0)
            self.table, self.last = nn.Parameter(torch.randn(3, 12)), nn.Linear(3, 12)

        def forward(self, x: Tensor) -> Tensor:
            table = self.table.expand(len(x), -1, -1).transpose(0, axis)  # the same for all rows
            output, weights = self.reading(self.layer(x.transpose(0, axis)), table, table)
            total: Tensor = output.transpose(0, axis) + self.last(weights)
            return total

    model, x = with_adapters(Model().double(), "all"), torch.randn(4, 5, 12, dtype=torch.float64)
    expected = row_by_row(model, NAMES, lambda: model(x))
    for _ in range(2):
        torch.testing.assert_close(in_block(model, NAMES, lambda: model(x)), expected)


@pytest.fixture
def model() -> nn.Module:
    return with_some(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)))


SOME: Names = ["a", "b", "c", "d", None]


def test_under_autocast_rows_are_as_close_as_those_of_each_adapter_alone(model: nn.Module) -> None:
    x = torch.randn(5, 3, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (run(model, SOME, lambda: model(x)) for run in (row_by_row, in_block))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found, expected, torch.bfloat16)


def test_values_are_copied_once_a_block_and_are_in_no_copy_of_the_model(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, size, copies, copied = torch.randn(5, 6), len(pickle.dumps(model)), list[Stack](), Stack.of

    def noted(*args: Any) -> Stack:
        copies.append(copied(*args))
        return copies[-1]

    monkeypatch.setattr(Stack, "of", noted)
    with torch.no_grad():
        wanted = row_by_row(model, SOME, lambda: model(x))
        with routed(model, SOME):
            for tokens in (x, x.unsqueeze(1).expand(5, 3, 6), x):
                found = model(tokens)
                torch.testing.assert_close(found if found.dim() == 2 else found[:, 1], wanted)
                with pytest.warns(UserWarning, match="adapters of a copy"):
                    assert len(pickle.dumps(copy.deepcopy(model))) < size + 2000
        assert len(copies) == 4, "one for each layer and basis"
        kept = weakref.ref(copies.pop().gamma)
        copies.clear()
        gc.collect()
        assert kept() is None


def in_place(held: Any) -> None:
    held["b"].mul_(-3)


def other_data(held: Any) -> None:
    other = held["b"].data * -3
    held["b"].data = torch.zeros_like(other)
    gc.collect()
    held["b"].data = other.clone()


def other_parameter(held: Any) -> None:
    held["b"] = nn.Parameter(held["b"] * -3, requires_grad=False)


@pytest.mark.parametrize(
    "change", [torch.no_grad()(in_place), torch.inference_mode()(in_place), other_data, other_parameter]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_inside_of_the_block_is_seen_and_gradients_are_after_it(
    model: nn.Module, change: Any, mode: Any
) -> None:
    x = torch.randn(5, 6)
    with routed(model, SOME):
        with mode():
            before = model(x).clone()
        other = Thread(target=change, args=[model.get_submodule("0.randlora_lambda")])
        other.start()
        other.join()
        with mode():
            after = model(x).clone()
        for names in ([], ["a", "c"]):  # of the input alone, and of adapters too
            randlora.set_trainable(model, names)
            found = model(x.requires_grad_())
            torch.testing.assert_close(found, after)
            found.square().sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in randlora.trainable_parameters(model))
    with torch.no_grad():
        torch.testing.assert_close(after, row_by_row(model, SOME, lambda: model(x)))
    assert not torch.equal(before[1], after[1])


PER_ROW = "expected for each row the name of an adapter"
STRANGE: list[Any] = ["a", [], None, [[]], [True]]
WRONG: list[tuple[Any, str]] = [
    (["a", "z"], "no adapter named 'z'"),
    *((names, PER_ROW) for names in STRANGE),
    ([1, "a"], "got 1"),
    ([["a", "b"], "a"], r"got \['a', 'b'\]"),
]


def test_parameters_of_inference_mode_are_never_kept(model: nn.Module) -> None:
    x, held = torch.randn(len(SOME), 6), model.get_submodule("0.randlora_lambda")
    with torch.inference_mode():
        other_parameter(held)
        with routed(model, SOME):
            model(x)
            in_place(held)
            after = model(x)
        torch.testing.assert_close(after, row_by_row(model, SOME, lambda: model(x)))


def test_wrong_names_and_inputs_of_another_number_of_rows_are_refused(model: nn.Module) -> None:
    for names, message in WRONG:
        with untouched(model), pytest.raises(AdapterError, match=message), routed(model, names):
            pass
    with routed(model, ["a", "b"]):
        for rows in (3, 4, 1):
            with pytest.raises(AdapterError, match=f"names for 2 rows.*which has {rows}"):
                model(torch.randn(rows, 6))
        for shape in ((3, 6), (4, 2, 6), (6, 5, 6), (6,)):  # the second has its batch in another dimension
            with pytest.raises(AdapterError, match="whose first dimension is not the batch of 2"):
                model.get_submodule("0")(torch.randn(shape))
    first, x, names = model.get_submodule("0"), torch.randn(2, 6), ["b", "a"]
    expected = row_by_row(model, names, lambda: first(x))
    assert_close(in_block(model, names, lambda: first(x)), expected, torch.float32)


def reads_elsewhere(layer: Any) -> None:
    assert layer.weight is layer._parameters["weight"]
    with in_call():
        layer.weight.sum()


X = torch.randn(4, 4)
LLAMA4 = Llama4TextConfig(hidden_size=4, intermediate_size=8, num_local_experts=2)
SWITCH = transformers.SwitchTransformersConfig(d_model=4, d_ff=8, num_experts=2)
UNBATCHED = r" was given an input of shape .4, 4., which has no"
WITHOUT_ROWS: list[tuple[Callable[[], nn.Module], Callable[[Any], object], str]] = [
    (lambda: Llama4TextExperts(LLAMA4), lambda module: module(X), "sorted by expert"),
    (lambda: Llama4TextExperts(LLAMA4), lambda module: module(X, X[:, 0]), "sorted by expert"),
    (lambda: SwitchTransformersSparseMLP(SWITCH), lambda module: module(X[:, None]), "sorted by values of the batch"),
    (lambda: nn.Conv1d(4, 4, 3), lambda module: module(X), f"Conv1d{UNBATCHED} batch"),
    (lambda: nn.MultiheadAttention(4, 2), lambda module: module(X, X, X), f"Attention{UNBATCHED}"),
    (lambda: nn.Linear(4, 4), lambda module: module(X.to_sparse()), r"nor sparse, .*Linear was given.*x\.to_dense\(\)"),
    (
        lambda: nn.Linear(4, 4),
        lambda module: module(nested_tensor([*X], layout=torch.jagged)),
        "neither nested .*padded",
    ),
    (lambda: nn.Conv1d(4, 4, 1), reads_elsewhere, "reads an adapted weight outside"),
]


@pytest.mark.parametrize(("build", "call", "message"), WITHOUT_ROWS)
def test_what_has_no_rows_is_an_error(build: Any, call: Any, message: str) -> None:
    model = nn.Sequential(build())
    for parameter in model.parameters():  # which Llama4's experts leave uninitialized
        nn.init.normal_(parameter)
    randlora.inject(model, r=2, targets="all", name="a")
    with routed(model, ["a", None, "a", "a"]), pytest.raises(AdapterError, match=message):
        call(model[0])


def test_names_in_a_call_are_refused() -> None:
    model, ids = models.llama(), torch.tensor([[1, 2], [3, 4]])
    randlora.inject(model, r=2, name="a")
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(AdapterError, match=r"randlora.serving.routed\(model, names\)"):
            each(ids, adapter_names=["a", "b"])
        randlora.eject(each)
        each(ids, adapter_names=["a", "b"])  # which models of transformers ignore
        assert not each._forward_pre_hooks
        assert not each._forward_pre_hooks_with_kwargs


def test_blocks_nest_the_innermost_counts_and_an_error_ends_them(model: nn.Module) -> None:
    x = torch.randn(2, 6)
    a, b, base = each_alone(model, ("a", "b", None), lambda: model(x)).values()
    randlora.activate(model, "c")
    c = model(x)
    with routed(model, ["a", "b"]):
        torch.testing.assert_close(model(x), torch.stack([a[0], b[1]]))
        with randlora.disabled(model):
            assert torch.equal(model(x), base)
            with routed(model, ["b", None]):
                torch.testing.assert_close(model(x), torch.stack([b[0], base[1]]))
            assert torch.equal(model(x), base)
        torch.testing.assert_close(model(x), torch.stack([a[0], b[1]]))
        with pytest.raises(MergeError, match="disabled"):
            randlora.merge(model)
    assert torch.equal(model(x), c)
    with pytest.raises(ZeroDivisionError), routed(model, ["a", "b"]):
        raise ZeroDivisionError
    assert torch.equal(model(x), c)


# The products with bases that several adapters share

every_count = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def updates(form: str, out: int, into: int, r: int, counts: list[int], x: Tensor) -> tuple[Case, Any, Tensor]:
    made = case(form, out, into, r)
    lam, gamma, _ = made.diagonals
    diagonals = [
        Diagonals(torch.randn_like(lam), torch.randn_like(gamma), scaling)
        for scaling in torch.rand(len(counts), dtype=torch.float64).tolist()
    ]
    deltas = [reference.delta_weight(made.basis_A, made.basis_B, *one, in_features=into) for one in diagonals]
    parts = zip(x.double().split(counts), deltas, strict=True)
    return made, diagonals, torch.cat([part @ delta.T for part, delta in parts])


@every_form
@settings(max_examples=8)
@given(
    out=sides,
    into=sides,
    r=ranks,
    counts=every_count,
    way=st.sampled_from([*get_args(Way), None]),
    at_once=st.sampled_from([1, 2**22]),
)
def test_each_token_gets_the_oracles_update(
    form: str, out: int, into: int, r: int, counts: list[int], way: Way | None, at_once: int
) -> None:
    x, is_wide = torch.randn(sum(counts), into, dtype=torch.float64), into <= out
    made, diagonals, wanted = updates(form, out, into, r, counts, x)
    in_turn = one_by_one(x, made.pair, diagonals, counts, is_wide=is_wide)
    torch.testing.assert_close(in_turn, wanted, rtol=1e-12, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stacked.AT_ONCE, "cpu", at_once)
        stacked._parts.cache_clear()
        found = stacked_update(x, made.pair, Stack.of(made.pair, diagonals), counts, is_wide=is_wide, way=way)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", get_args(Way))
def test_in_bfloat16_it_is_as_close_as_one_by_one(way: Way) -> None:
    x, counts = torch.randn(6, 16, dtype=torch.float64).bfloat16(), [1, 2, 3]
    made, diagonals, wanted = updates("dense", 24, 16, 8, counts, x)
    pair = type(made.pair)(made.pair.A.float(), made.pair.B.bfloat16(), *made.pair.other_arguments)
    near = one_by_one(x, pair, diagonals, counts, is_wide=True)
    found = stacked_update(x, pair, Stack.of(pair, diagonals), counts, is_wide=True, way=way)
    errors = [(each.double() - wanted).norm() / wanted.norm() for each in (near, found)]
    assert errors[1] < 2 * errors[0] + 1e-3


def test_a_few_tokens_of_each_adapter_build_no_large_factor() -> None:
    few, many = ({part.way for part in stacked._parts((count, count), (1, 8, 8, 64), "cpu", None)} for count in (1, 64))
    assert few == {"by row"}
    assert many == {"whole"}


def test_as_many_updates_are_computed_at_once_as_fit_into_the_memory_that_is_written() -> None:
    stacked._parts.cache_clear()
    with mock.patch.dict(stacked.AT_ONCE, cpu=1000):
        parts = {way: stacked._parts((3,) * 7, (2, 4, 5, 8), "cpu", way) for way in get_args(Way)}
    stacked._parts.cache_clear()
    found = {way: [part.updates.stop - part.updates.start for part in each] for way, each in parts.items()}
    assert found == {"whole": [3, 3, 1], "by row": [5, 2]}  # of 2·4·8 entries for each of 5 bases, or of 3 tokens


@pytest.mark.parametrize(("compute", "way"), [("auto", None), ("factored", "whole")])
def test_the_factor_is_built_if_it_was_asked_for(compute: Compute, way: Way | None) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)
    for values, name in enumerate("ab"):
        adapt(model, values=values, name=name)
    randlora.set_compute(model, compute)
    counted = mock.patch("randlora.serving.run.stacked_update", side_effect=stacked_update)
    with torch.no_grad(), counted as computed, routed(model, ["a", "b", "a", "b"]):
        model(x)
    assert [call.kwargs["way"] for call in computed.call_args_list] == [way]


# Real models in `generate`, and compiled ones

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MIXTRAL = transformers.MixtralConfig(
    **models.SIDES, **TOKENS, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=4
)
T5 = transformers.T5Config(**TOKENS, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
GENERATED: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "beams": (models.gpt2, None, {"num_beams": 3}),
    "sequences": (lambda: transformers.MixtralForCausalLM(MIXTRAL), "all", {"num_beams": 2, "num_return_sequences": 2}),
    "static": (models.llama, None, {"cache_implementation": "static", "disable_compile": True}),
    "uncached": (models.gpt2, None, {"use_cache": False}),
    "decoder": (lambda: transformers.T5ForConditionalGeneration(T5), None, {"num_beams": 2}),
}


@pytest.mark.medium
@pytest.mark.parametrize("what", GENERATED)
def test_generate_of_left_padded_rows(what: str) -> None:
    build, targets, options = GENERATED[what]
    model, batch = with_adapters(build(), targets, r=4), torch.randint(3, 60, (4, 4))  # as many tokens as rows
    mask = torch.ones_like(batch)
    if what != "decoder":
        mask[1, :2] = mask[3, :3] = 0
        batch[mask == 0] = 0
    each = options.get("num_return_sequences", 1)

    def run(**options: Any) -> list[Any]:
        usual = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        if what == "beams" and "num_beams" in options:  # by a config
            config = transformers.GenerationConfig(**usual, **options)
            return list(model.generate(batch, config, attention_mask=mask).split(each))
        return list(model.generate(batch, attention_mask=mask, **usual, **options).split(each))

    for own in (options, {} if each == 1 else options, options):  # the second time after a batch of beams
        alone = each_alone(model, NAMES, lambda: run(**own))  # noqa: B023
        with routed(model, NAMES):
            found = run(**own)
        assert [one.tolist() for one in found] == [alone[name][row].tolist() for row, name in enumerate(NAMES)]


@pytest.mark.medium
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_block_runs_uncompiled_compiles_nothing_and_exports_nothing(model: nn.Module, is_whole: bool) -> None:
    counter, x = CompileCounterWithBackend("aot_eager"), torch.randn(4, 6)
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter) if is_whole else model
    other: Any = torch.compile(nn.Linear(6, 4), backend=counter)
    for layer in () if is_whole else model.children():
        layer.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = row_by_row(model, NAMES, lambda: compiled(x))
        before = counter.frame_count
        for _ in range(2):
            with routed(model, NAMES), routed(model, NAMES):
                torch.testing.assert_close(compiled(x), expected)
                other(x)
        compiled(x)
        assert counter.frame_count == before > 0
        other(x)
    assert counter.frame_count == before + 1, "what ran in the block alone is compiled after it"
    with routed(model, NAMES), pytest.raises(AdapterError, match="cannot be exported or compiled in"):
        torch.export.export(model, (x,), strict=False)

"""Each row of a batch through its own adapter: equal to running each adapter alone, or an error."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

import randlora
from randlora.errors import AdapterError
from randlora.functional import Compute
from randlora.layers.scopes import in_call
from tests.kit import fill, untouched
from tests.laws import assert_close
from tests.layer_kinds import LayerKind, every_kind
from tests.read_kinds import READ_KINDS, ReadKind, output_of
from tests.serving import Names, each_alone, row_by_row

OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "alpha": 6},
    "b": {"r": 3, "alpha": 9},  # on the bases of a
    "c": {"r": 2, "alpha": 2, "basis": "block", "seed": 5},
    "d": {"r": 2, "alpha": 7, "basis": "block", "seed": 5},
    "elsewhere": {"r": 3, "targets": ["1"]},
}
names_of_rows = st.lists(st.sampled_from([*OPTIONS, None]), min_size=1, max_size=7)


def with_adapters(model: nn.Module, names: Names | None = None, **options: Any) -> nn.Module:
    """Add the adapters of `OPTIONS`, or those of some names and "a", with values as after some training."""
    chosen = {name: own for name, own in OPTIONS.items() if names is None or name in ("a", *names)}
    for seed, (name, own) in enumerate(chosen.items()):
        randlora.inject(model, name=name, stream="portable", **{**options, **own})
        fill(model, name, seed=seed)
    return model


@every_kind
@settings(max_examples=6)
@given(
    st.integers(1, 20).filter(lambda side: side != 16),
    st.integers(1, 20).filter(lambda side: side != 16),
    names_of_rows,
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.sampled_from(get_args(Compute)),
    st.booleans(),
)
def test_rows_are_those_of_each_adapter_alone(
    kind: LayerKind, inside: int, out: int, names: Names, lead: tuple[int, ...], compute: Compute, has_grad: bool
) -> None:
    layers = kind.build(inside, out, True, kind.exact), nn.Linear(out, 4)
    model = with_adapters(nn.Sequential(*layers), names, targets=["0"]).to(kind.exact)
    randlora.set_compute(model, compute)
    x = torch.randn(len(names), *lead, inside, dtype=kind.exact)
    with torch.set_grad_enabled(has_grad):
        expected = row_by_row(model, names, lambda: model(x))
        with randlora.serving.routed(model, names):
            assert_close(model(x), expected, kind.exact)


@settings(max_examples=8)
@given(names_of_rows, st.integers(1, 4))
def test_gradients_are_those_of_each_adapter_alone(names: Names, tokens: int) -> None:
    model = with_adapters(nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 8)).double(), targets=["0", "1"], trainable=True)
    x = torch.randn(len(names), tokens, 10, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(len(names), tokens, 8, dtype=torch.float64)
    wanted = [x, *randlora.trainable_parameters(model)]
    found = []
    for run in (row_by_row, routed):
        loss = (run(model, names, lambda: model(x)) * factors).sum()
        found.append(torch.autograd.grad(loss, wanted, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one.to(other.dtype), rtol=1e-6, atol=1e-7)  # Λ and Γ are float32


def routed(model: nn.Module, names: Names, run: Callable[[], Tensor]) -> Tensor:
    with randlora.serving.routed(model, names):
        return run()


@pytest.mark.parametrize(  # out_proj is a weight that attention reads of a layer inside of it
    "kind", [kind for kind in READ_KINDS if "out_proj" not in kind.name], ids=lambda kind: kind.name
)
def test_rows_of_modules_that_read_their_weight(kind: ReadKind) -> None:
    model = kind.adapted(torch.float64)
    randlora.inject(model, **{**kind.adapter_options, **kind.other, "name": "b", "seed": 7})
    fill(model, "b", seed=7)
    args = kind.arguments(torch.float64)
    names: Names = [("default", None, "b")[row % 3] for row in range(args[0].shape[0])]
    module = model.get_submodule("0")
    expected = row_by_row(model, names, lambda: output_of(module(*args)))
    assert_close(routed(model, names, lambda: output_of(module(*args))), expected, torch.float64)
    assert len(names) == 1 or not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize(
    ("batch_first", "masked"), [(True, "nothing"), (False, "padding"), (True, "heads"), (False, "all")]
)
def test_attention_with_both_projections(batch_first: bool, masked: str) -> None:
    model = nn.Sequential(nn.MultiheadAttention(12, 2, batch_first=batch_first).double(), nn.Identity())
    for seed, adapter in enumerate("ab"):
        randlora.inject(model, r=3, targets="all", name=adapter, seed=seed)
        fill(model, adapter, seed=seed)
    names: Names = ["b", "a", None, "a"]
    tokens, axis = 4 if masked == "all" else 5, 0 if batch_first else 1
    x = torch.randn(*((4, tokens) if batch_first else (tokens, 4)), 12, dtype=torch.float64)
    others = ~torch.eye(tokens, dtype=torch.bool)
    options: dict[str, Any] = {
        "nothing": {},
        "padding": {"key_padding_mask": torch.rand(4, tokens) > 0.8},
        "heads": {"attn_mask": (torch.rand(8, tokens, tokens) > 0.7) & others},
        "all": {"attn_mask": others.triu(1)},
    }[masked]
    singles = each_alone(model, names, lambda: model[0](x, x, x, **options))
    with randlora.serving.routed(model, names):
        output, weights = model[0](x, x, x, **options)
    for row, name in enumerate(names):
        torch.testing.assert_close(output.select(axis, row), singles[name][0].select(axis, row), equal_nan=True)
        torch.testing.assert_close(weights[row], singles[name][1][row], equal_nan=True)


def test_tokens_of_a_packed_row() -> None:
    model = with_adapters(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double(), targets=["0", "1"])
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    names: list[Names] = [["a", "a", "b"], [None, "c", "a"]]
    outputs = each_alone(model, ("a", "b", "c", None), lambda: model(x))
    expected = torch.stack([
        torch.stack([outputs[name][row, token] for token, name in enumerate(each)]) for row, each in enumerate(names)
    ])
    with randlora.serving.routed(model, names):
        assert_close(model(x), expected, torch.float64)
        with pytest.raises(AdapterError, match="names for 2 rows of 3 tokens"):
            model(torch.randn(2, 4, 6, dtype=torch.float64))


@pytest.fixture
def model() -> nn.Module:
    return with_adapters(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), targets=["0", "1"])


PER_ROW = "expected for each row the name of an adapter"
STRANGE: list[Any] = ["a", [], None, [[]], [True]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "z"], "no adapter named 'z'"),
        *((names, PER_ROW) for names in STRANGE),
        ([1, "a"], "got 1"),
        ([["a"], "a"], "got both"),
        ([["a"], ["a", "b"]], r"different numbers of names, \[1, 2\]"),
        ([["a", 3]], "got 3"),
    ],
)
def test_wrong_names_are_refused_before_anything_changes(model: nn.Module, names: Any, message: str) -> None:
    with untouched(model), pytest.raises(AdapterError, match=message), randlora.serving.routed(model, names):
        pass


def test_another_number_of_rows_and_a_layer_that_does_not_tell_them_are_an_error(model: nn.Module) -> None:
    with randlora.serving.routed(model, ["a", "b"]):
        for rows in (3, 4, 1):
            with pytest.raises(AdapterError, match=f"names for 2 rows.*which has {rows}"):
                model(torch.randn(rows, 6))
        for shape in ((3, 6), (4, 2, 6), (6, 5, 6), (6,)):  # the second has its batch in another dimension
            with pytest.raises(AdapterError, match="whose first dimension is not the batch of 2"):
                model.get_submodule("0")(torch.randn(shape))


def llama4_experts() -> nn.Module:
    experts: nn.Module = Llama4TextExperts(Llama4TextConfig(hidden_size=4, intermediate_size=8, num_local_experts=2))
    nn.init.normal_(experts.get_parameter("gate_up_proj"))
    return experts


def reads_elsewhere(layer: Any) -> None:
    assert layer.weight is layer._parameters["weight"]
    with in_call():
        layer.weight.sum()


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        (llama4_experts, lambda module: module(torch.randn(4, 4)), "sorted by expert"),
        (
            lambda: nn.Conv1d(4, 4, 3),
            lambda module: module(torch.randn(4, 9)),
            r"Conv1d was given an input of shape .4, 9., which has no batch",
        ),
        (
            lambda: nn.MultiheadAttention(4, 2),
            lambda module: module(*[torch.randn(4, 4)] * 3),
            r"MultiheadAttention was given an input of shape .4, 4., which has no",
        ),
        (lambda: nn.Conv1d(4, 4, 1), reads_elsewhere, "reads an adapted weight outside"),
    ],
    ids=["experts", "unbatched convolution", "unbatched attention", "read elsewhere"],
)
def test_what_has_no_rows_is_an_error(build: Callable[[], nn.Module], call: Any, message: str) -> None:
    model = nn.Sequential(build())
    randlora.inject(model, r=2, targets="all", name="a")
    with randlora.serving.routed(model, ["a", None, "a", "a"]), pytest.raises(AdapterError, match=message):
        call(model[0])


class Swallowing(nn.Module):
    """A model that ignores what it does not know, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002
        output: Tensor = self.layer(x)
        return output


def test_names_in_a_call_are_refused() -> None:
    model, x = Swallowing(), torch.randn(2, 4)
    model(x, adapter_names=["a", "b"])
    randlora.inject(model, r=2, name="a")
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(AdapterError, match=r"randlora.serving.routed\(model, names\)"):
            each(x, adapter_names=["a", "b"])
        randlora.eject(each)
        each(x, adapter_names=["a", "b"])
        assert not each._forward_pre_hooks
        assert not each._forward_pre_hooks_with_kwargs


def test_blocks_nest_the_innermost_counts_and_an_error_ends_them(model: nn.Module) -> None:
    x = torch.randn(2, 6)
    a, b, base = each_alone(model, ("a", "b", None), lambda: model(x)).values()
    randlora.activate(model, "c")
    c = model(x)
    with randlora.serving.routed(model, ["a", "b"]):
        torch.testing.assert_close(model(x), torch.stack([a[0], b[1]]))
        with randlora.disabled(model):
            assert torch.equal(model(x), base)
            with randlora.serving.routed(model, ["b", None]):
                torch.testing.assert_close(model(x), torch.stack([b[0], base[1]]))
            assert torch.equal(model(x), base)
        torch.testing.assert_close(model(x), torch.stack([a[0], b[1]]))
        with pytest.raises(randlora.errors.MergeError, match="disabled"):
            randlora.merge(model)
    assert torch.equal(model(x), c)
    with pytest.raises(ZeroDivisionError), randlora.serving.routed(model, ["a", "b"]):
        raise ZeroDivisionError
    assert torch.equal(model(x), c)


def test_a_copy_made_inside_has_inactive_adapters(model: nn.Module) -> None:
    x = torch.randn(2, 6)
    base = each_alone(model, [None], lambda: model(x))[None]
    with randlora.serving.routed(model, ["a", "b"]):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert torch.equal(twin(x), base)
        assert not [info.name for info in randlora.adapters(twin) if info.is_active]

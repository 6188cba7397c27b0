"""`merged_tensors` and programs made of a merged model: the bits of a merge, from a model that stays as it is."""

import copy
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, ConfigError, MergeError
from tests.kit import all_bits, bits, fill, untouched
from tests.laws import assert_close, needs_compiler, needs_export
from tests.layer_kinds import LayerKind, every_mergeable_kind_and_dtype
from tests.read_kinds import ReadKind, every_read_kind


def merged_bits(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Return what a permanent merge of a copy leaves in its state dict."""
    twin = copy.deepcopy(model)
    randlora.merge(twin, **options)
    return all_bits({name: value for name, value in twin.state_dict().items() if isinstance(value, Tensor)})


def yielded_bits(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Return what is yielded, after checking that no name comes twice and that the model stays as it is."""
    with untouched(model):
        pairs = [(name, bits(tensor)) for name, tensor in randlora.merged_tensors(model, **options)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


class Beside(nn.Module):
    """A model with buffers of both sorts, a tied and a shared layer, and a norm with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.first = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 12)
        self.again = self.second
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("dropped", torch.randn(3), persistent=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(self.table(ids)))) * self.scale
        logits: Tensor = self.head(self.again.bias + x)
        return logits


def beside(**options: Any) -> Beside:
    model = Beside()
    usual = {"r": 4, "targets": ["first", "second"], "train_also": ["norm.weight", "norm.bias"]}
    randlora.inject(model, **{**usual, **options})
    return fill(model)


@every_mergeable_kind_and_dtype
def test_every_kind_of_layer_is_yielded_as_it_would_be_merged(kind: LayerKind, dtype: torch.dtype) -> None:
    model = nn.Sequential(kind.build(128, 96, True, dtype), nn.LayerNorm(96, dtype=dtype))
    randlora.inject(model, r=8, targets=["0"])
    fill(model)
    options: dict[str, Any] = {"quantized": "dequantize"} if kind.is_quantized else {}
    expected = merged_bits(model, **options)
    assert yielded_bits(model) == expected
    with randlora.merged(model, **options):
        assert yielded_bits(model) == expected
    with randlora.merged(model):
        assert yielded_bits(model).keys() == expected.keys()
    model.append(kind.build(96, 64, True, dtype))
    assert yielded_bits(model)["2.weight"][1] in ((64, 96), (96, 64)), "without an adapter it is written out too"


@every_read_kind
def test_every_weight_that_is_read_is_yielded_as_it_would_be_merged(kind: ReadKind) -> None:
    model = kind.adapted()
    assert yielded_bits(model) == merged_bits(model)


def test_names_order_and_bits_are_those_of_the_plain_models_state_dict() -> None:
    plain, model = Beside().eval(), beside().eval()
    expected, names = merged_bits(model), list(plain.state_dict())
    assert list(yielded_bits(model)) == names
    assert yielded_bits(model) == yielded_bits(torch.nn.DataParallel(model)) == expected
    with randlora.merged(model):
        assert yielded_bits(model) == expected
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert all_bits(dict(randlora.merged_tensors(model))) == expected
    assert not any(tensor.requires_grad for _, tensor in randlora.merged_tensors(model))
    plain.load_state_dict(dict(randlora.merged_tensors(model)), strict=True)
    ids = torch.randint(0, 20, (7,))
    torch.testing.assert_close(plain(ids), model(ids))
    outer = nn.Sequential(model, nn.Linear(20, 2))
    assert list(yielded_bits(outer)) == [*(f"0.{name}" for name in names), "1.weight", "1.bias"]
    tensors = dict(randlora.merged_tensors(model))
    for name, tensor in randlora.merged_tensors(model, dtype=torch.bfloat16):
        assert bits(tensor) == bits(tensors[name].bfloat16() if tensors[name].is_floating_point() else tensors[name])


def test_each_value_is_computed_when_it_is_asked_for_and_not_kept() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    randlora.inject(model, r=4, targets="all-linear")
    tensors = randlora.merged_tensors(model)
    expected, alive = merged_bits(fill(model)), list[weakref.ref[Tensor]]()
    for name, tensor in tensors:
        assert bits(tensor) == expected[name]
        if name.endswith("weight"):
            assert [each for each in alive if each() is not None] == []
            alive.append(weakref.ref(tensor))
        del tensor
    assert len(alive) == 6


def test_a_model_that_cannot_be_merged_is_refused_at_the_call() -> None:
    def refused(error: type[Exception], message: str, model: nn.Module, **options: Any) -> None:
        with pytest.raises(error, match=message):
            randlora.merged_tensors(model, **options)

    model = beside()
    refused(AdapterError, "has no adapter", Beside())
    refused(ConfigError, "a floating dtype or None", model, dtype=torch.int8)
    with randlora.disabled(model):
        refused(MergeError, r"call this outside of randlora.disabled", model)
    randlora.activate(model, [])
    refused(MergeError, "no adapter is active: activate one of default", model)
    randlora.activate(model, "default")
    model.scale = nn.Parameter(torch.ones(1, device="meta"))
    refused(MergeError, "scale has no values here", model)
    model.first.to("meta")
    refused(MergeError, "first.* incomplete", model)
    model.second = nn.Linear(16, 12)
    refused(MergeError, "second no longer has adapter 'default'", model)


def _weigh(model: nn.Module) -> AbstractContextManager[None]:
    randlora.activate(model, {"default": 0.5})
    return nullcontext()


def _poison(model: nn.Module) -> AbstractContextManager[None]:
    randlora.trainable_parameters(model)[0].data.fill_(float("nan"))
    return nullcontext()


OF_TWO = "so the tensors would be from two different models"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: nullcontext(randlora.merge(model)), OF_TWO),
        (lambda model: nullcontext(randlora.eject(model)), OF_TWO),
        (randlora.disabled, OF_TWO),
        (_weigh, OF_TWO),
        (_poison, r"the merged weight of first.weight would not be finite"),
    ],
    ids=["merge", "eject", "disabled", "activate", "nan"],
)
def test_a_change_between_two_tensors_and_values_that_are_not_finite_are_refused(
    change: Callable[[nn.Module], AbstractContextManager[object]], message: str
) -> None:
    model = beside()
    tensors = randlora.merged_tensors(model)
    next(tensors)
    with change(model), pytest.raises(MergeError, match=message):
        dict(tensors)


X = torch.linspace(-1, 1, 24).reshape(3, 8)
Program = Callable[[Tensor], Tensor]


def exported(model: nn.Module) -> Program:
    module: Program = torch.export.export(model, (X,)).module()
    return module


def traced(model: nn.Module) -> Program:
    program: Program = torch.jit.trace(model, (X,))
    return program


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(exported, marks=[needs_export, pytest.mark.medium]),
        pytest.param(traced, marks=pytest.mark.filterwarnings("ignore:`torch.jit.trace")),
        pytest.param(lambda model: torch.compile(model, backend="eager"), marks=[needs_compiler, pytest.mark.medium]),
    ],
)
def test_a_program_of_a_merged_model_stays_what_it_was_and_parameters_are_the_same_objects(
    make: Callable[[nn.Module], Program],
) -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    randlora.inject(model, r=2, targets="all")
    expected, held = fill(model)(X), dict(model.named_parameters())
    held["1.weight"].sharded = True  # type: ignore[attr-defined]  # as libraries mark parameters
    with randlora.merged(model):
        assert model.get_parameter("1.weight") is not held["1.weight"]
        assert model.get_parameter("1.weight").sharded  # type: ignore[attr-defined]
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

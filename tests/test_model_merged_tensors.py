"""`merged_tensors` and programs made of a merged model: the bits of a merge, from a model that stays as it is."""

import copy
import gc
import resource
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, ConfigError, MergeError
from tests import models
from tests.kit import all_bits, bits, fill, untouched
from tests.laws import assert_close, needs_compiler, needs_export
from tests.layer_kinds import LAYER_KINDS, LayerKind, every_mergeable_kind_and_dtype
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
    options = {"quantized": "dequantize"} if kind.is_quantized else {}
    assert yielded_bits(model) == merged_bits(model, **options)


@every_read_kind
def test_every_weight_that_is_read_is_yielded_as_it_would_be_merged(kind: ReadKind) -> None:
    model = kind.adapted()
    assert yielded_bits(model) == merged_bits(model)


def test_names_and_order_are_those_of_the_plain_models_state_dict() -> None:
    plain, model = Beside(), beside()
    assert [name for name, _ in randlora.merged_tensors(model)] == list(plain.state_dict())
    assert yielded_bits(model) == merged_bits(model)
    assert {"table.weight", "head.weight", "again.weight", "norm.running_mean", "kept"} <= yielded_bits(model).keys()


def test_what_is_yielded_loads_into_a_plain_model_that_then_computes_the_same() -> None:
    model, plain = beside().eval(), Beside().eval()
    plain.load_state_dict(dict(randlora.merged_tensors(model)), strict=True)
    ids = torch.randint(0, 20, (7,))
    torch.testing.assert_close(plain(ids), model(ids))


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.bert], ids=lambda build: build.__name__)
def test_models_of_transformers(build: Callable[[], nn.Module]) -> None:
    model = build()
    names = list(model.state_dict())
    randlora.inject(model, r=4, targets="all-linear")
    fill(model)
    assert [name for name, _ in randlora.merged_tensors(model)] == names
    assert yielded_bits(model) == merged_bits(model)


def test_several_adapters_are_summed_with_their_weights() -> None:
    model = beside()
    randlora.inject(model, name="other", r=2, targets=["first"])
    fill(model, "other", seed=1)
    for names in ("default", {"other": -0.5}, {"default": 2.0, "other": 0.25}):
        randlora.activate(model, names)
        with randlora.merged(model):
            expected = {fqn: bits(model.get_submodule(fqn).get_parameter("weight")) for fqn in ("first", "second")}
        found = yielded_bits(model)
        assert {fqn: found[f"{fqn}.weight"] for fqn in expected} == expected
    randlora.activate(model, "other")
    assert found["norm.weight"] != yielded_bits(model)["norm.weight"], "only the first trains the norm"


def test_what_is_merged_reversibly_is_yielded_as_it_is() -> None:
    model = beside()
    expected = yielded_bits(model)
    with randlora.merged(model):
        assert yielded_bits(model) == expected


@pytest.mark.parametrize("how", ["requantize", "dequantize"])
def test_quantized_layers_that_are_merged_are_yielded_as_they_are(how: Any) -> None:
    kind = next(kind for kind in LAYER_KINDS if kind.name == "NF4")
    model = nn.Sequential(kind.build(64, 96, True, torch.float32), kind.build(96, 64, True, torch.float32))
    randlora.inject(model, r=8, targets=["0"])
    fill(model)
    expected = yielded_bits(model)
    assert expected["1.weight"][1] == (64, 96), "a layer without an adapter is dequantized too"
    with randlora.merged(model, quantized=how):
        found = yielded_bits(model)
    assert (found == expected) is (how == "dequantize")
    assert found.keys() == expected.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_is_that_of_all_floating_tensors(dtype: torch.dtype) -> None:
    model = beside()
    plain = dict(randlora.merged_tensors(model))
    for name, tensor in randlora.merged_tensors(model, dtype=dtype):
        assert bits(tensor) == bits(plain[name].to(dtype) if plain[name].is_floating_point() else plain[name])


def test_the_values_are_those_of_the_moment_at_which_they_are_asked_for() -> None:
    model = beside()
    tensors = randlora.merged_tensors(model)
    fill(model, seed=3)
    expected = merged_bits(model)
    assert all_bits(dict(tensors)) == expected


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_wrapper_of_torch_does_not_appear_in_the_names() -> None:
    model = beside()
    assert yielded_bits(torch.nn.DataParallel(model)) == yielded_bits(model)
    compiled: Any = torch.compile(model)
    assert dict.fromkeys(yielded_bits(compiled)) == dict.fromkeys(yielded_bits(model))


def test_a_model_around_an_adapted_one_is_yielded_whole() -> None:
    outer = nn.Sequential(beside(), nn.Linear(20, 2))
    names = [f"0.{name}" for name in Beside().state_dict()] + ["1.weight", "1.bias"]
    assert list(yielded_bits(outer)) == names


def test_at_most_one_merged_tensor_is_held() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    randlora.inject(model, r=4, targets="all-linear")
    fill(model)
    alive: list[weakref.ref[Tensor]] = []
    for name, tensor in randlora.merged_tensors(model):
        if name.endswith("weight"):
            assert [each for each in alive if each() is not None] == []
            alive.append(weakref.ref(tensor))
        del tensor
    assert len(alive) == 6


@pytest.mark.slow
def test_after_1000_syncs_with_training_between_the_base_is_as_it_was_and_memory_has_not_grown() -> None:
    model = beside().train()
    rollout = Beside()
    trained = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    held = {name: bits(value) for name, value in model.named_parameters() if id(value) not in trained}
    optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-3)
    ids = torch.randint(0, 20, (8,))

    def sync() -> None:
        rollout.load_state_dict(dict(randlora.merged_tensors(model)))
        nn.functional.cross_entropy(model(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(100):
        sync()
    gc.collect()
    objects, resident = len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(900):
        sync()
    gc.collect()
    assert {name: bits(value) for name, value in model.named_parameters() if id(value) not in trained} == held
    assert len(gc.get_objects()) - objects < 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 2048, "KiB"
    rollout.load_state_dict(dict(randlora.merged_tensors(model)))
    randlora.merge(model)
    assert all_bits(model.state_dict()) == all_bits(rollout.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: randlora.activate(model, []), "no adapter is active: activate one of default"),
        (lambda model: model.first.to("meta"), "first.* incomplete"),
        (lambda model: setattr(model, "scale", nn.Parameter(torch.ones(1, device="meta"))), "scale has no values here"),
        (lambda model: setattr(model, "second", nn.Linear(16, 12)), "second no longer has adapter 'default'"),
    ],
    ids=["inactive", "meta", "meta-beside", "lost"],
)
def test_a_model_that_cannot_be_merged_is_refused_at_the_call(change: Callable[[Any], object], message: str) -> None:
    model = beside()
    change(model)
    with pytest.raises(MergeError, match=message):
        randlora.merged_tensors(model)


def test_a_call_in_a_disabled_block_a_wrong_dtype_and_a_plain_model_are_refused() -> None:
    model = beside()
    with randlora.disabled(model), pytest.raises(MergeError, match=r"call this outside of randlora.disabled"):
        randlora.merged_tensors(model)
    with pytest.raises(ConfigError, match="a floating dtype or None"):
        randlora.merged_tensors(model, dtype=torch.int8)
    with pytest.raises(AdapterError, match="has no adapter"):
        randlora.merged_tensors(nn.Linear(2, 2))


def _disable(model: nn.Module) -> None:
    block = randlora.disabled(model)
    block.__enter__()
    model.__dict__["block"] = block  # which ends with what holds it


@pytest.mark.parametrize(
    "change",
    [randlora.merge, randlora.eject, _disable, lambda model: randlora.activate(model, {"default": 0.5})],
    ids=["merge", "eject", "disabled", "activate"],
)
def test_a_change_of_the_adapters_between_two_tensors_is_an_error(change: Callable[[nn.Module], object]) -> None:
    model = beside()
    tensors: Iterator[tuple[str, Tensor]] = randlora.merged_tensors(model)
    next(tensors)
    change(model)
    with pytest.raises(MergeError, match="so the tensors would be from two different models"):
        next(tensors)


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    model = beside()
    with torch.no_grad():
        randlora.trainable_parameters(model)[0].fill_(float("nan"))
    with pytest.raises(MergeError, match=r"the merged weight of first.weight would not be finite"):
        dict(randlora.merged_tensors(model))


def test_nothing_that_is_yielded_needs_gradients_in_any_mode() -> None:
    model = beside()
    assert not any(tensor.requires_grad for _, tensor in randlora.merged_tensors(model))
    with torch.inference_mode():
        inferred = all_bits(dict(randlora.merged_tensors(model)))
    with torch.autocast("cpu", torch.bfloat16):
        assert inferred == all_bits(dict(randlora.merged_tensors(model))) == yielded_bits(model)


X = torch.linspace(-1, 1, 24).reshape(3, 8)
Program = Callable[[Tensor], Tensor]


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    randlora.inject(model, r=2, targets="all")
    return fill(model)


def exported(model: nn.Module) -> Program:
    module: Program = torch.export.export(model, (X,)).module()
    return module


def traced(model: nn.Module) -> Program:
    program: Program = torch.jit.trace(model, (X,))
    return program


def compiled(model: nn.Module) -> Program:
    return torch.compile(model, backend="eager")


PROGRAMS = [
    pytest.param(exported, marks=[needs_export, pytest.mark.medium]),
    pytest.param(traced, marks=pytest.mark.filterwarnings("ignore:`torch.jit.trace")),
    pytest.param(compiled, marks=[needs_compiler, pytest.mark.medium]),
]


@pytest.mark.parametrize("make", PROGRAMS)
def test_a_program_of_a_merged_model_stays_what_it_was_after_unmerging(make: Callable[[nn.Module], Program]) -> None:
    model = adapted()
    expected = model(X)
    with randlora.merged(model):
        program = make(model)
        assert_close(program(X), expected, torch.float32)
    assert_close(program(X), expected, torch.float32)
    assert_close(model(X), expected, torch.float32)


@pytest.mark.parametrize("make", PROGRAMS)
def test_a_program_of_a_model_merged_for_good_has_no_adapter(make: Callable[[nn.Module], Program]) -> None:
    model = adapted()
    expected = model(X)
    randlora.merge(model)
    program = make(model)
    assert_close(program(X), expected, torch.float32)
    assert not [name for name in getattr(program, "state_dict", dict)() if "randlora" in name]


def test_merging_for_good_changes_the_parameters_that_an_optimizer_holds() -> None:
    model = adapted()
    held = {name: parameter for name, parameter in model.named_parameters() if "randlora" not in name}
    randlora.merge(model)
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


def test_unmerging_puts_the_parameters_themselves_back() -> None:
    model = adapted()
    held = dict(model.named_parameters())
    held["1.weight"].sharded = True  # type: ignore[attr-defined]  # as libraries mark parameters
    with randlora.merged(model):
        assert model.get_parameter("1.weight") is not held["1.weight"]
        assert model.get_parameter("1.weight").sharded  # type: ignore[attr-defined]
    assert all(parameter is held[name] for name, parameter in model.named_parameters())


def test_buffers_that_no_state_dict_has_are_not_yielded() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("saved", torch.ones(2))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    expected = [*model.state_dict()]
    randlora.inject(model, r=2, targets="all")
    assert sorted(name for name, _ in randlora.merged_tensors(model)) == sorted(expected)

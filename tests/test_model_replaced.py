"""What trains beside an adapter, what is said of it, and what becomes of it where modules are replaced or resized."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Embedding4bit
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

import randlora
from randlora.errors import AdapterError, CheckpointError, MergeError, RandLoRAError, TargetError
from randlora.serving import routed
from tests import models
from tests.checkpoint_files import read_tensors
from tests.kit import adapt, adapter_values, bits, fill, same_bits, untouched
from tests.laws import TOKENS, Mixed
from tests.quantized import of_4_bits
from tests.test_readers_kinds import REWRITES

NAMES: list[tuple[list[str] | str, list[str]]] = [
    (["head"], ["head.weight", "head.bias"]),
    (["bias"], ["q.bias", "down.bias", "norm.bias", "head.bias"]),
    (r"(q|down)\.bias", ["q.bias", "down.bias"]),
    (["norm", "head.bias"], ["norm.weight", "norm.bias", "head.bias"]),
    (["twin"], ["embed.weight"]),  # a tied parameter goes by its first name
]


def test_names_mean_modules_or_parameters_and_a_rule_does_not_adapt_what_is_trained_itself() -> None:
    model = Mixed()
    model.twin = nn.Embedding(11, 12)
    model.twin.weight = model.embed.weight
    for _ in range(2):
        for names, expected in NAMES:
            assert [*randlora.plan(model, r=4, train_also=names, name="b").train_also] == expected
        for targets, own in ((None, ["q"]), ("all", ["q.weight", "twin"]), ("all-linear", r"q(\..*)?")):
            with_it = {*randlora.plan(model, r=4, targets=targets, name="b").targets}
            assert with_it - {*randlora.plan(model, r=4, targets=targets, train_also=own, name="b").targets} == {"q"}
        if not randlora.adapters(model):
            randlora.inject(model, r=4)


def with_steps() -> nn.Module:
    model = Mixed()
    model.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    return model


def with_codes(storage: torch.dtype = torch.bfloat16) -> nn.Module:
    return nn.Sequential(OrderedDict(body=nn.Linear(64, 64), head=of_4_bits(64, 8, quant_storage=storage)))


def convolutions() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), flat=nn.Flatten(), fc=nn.Linear(8, 4)))


NAMED_TWICE = r"train_also includes q\.weight, which the targets name"
CODES = r"head\.weight, which is quantized \(Linear4bit\).*name only its bias"
REFUSED: list[tuple[Callable[[], nn.Module], Any, Any, str]] = [
    (Mixed, ["q", "down"], ["q"], NAMED_TWICE),
    (Mixed, r"q|down", ["q"], NAMED_TWICE),
    (Mixed, lambda fqn, _: fqn in ("q", "down"), ["q"], NAMED_TWICE),
    (convolutions, None, ["fc"], r"no layer is left .*fc \(trained by train_also\).*targets="),
    (with_steps, None, ["steps"], r"train_also includes steps of dtype torch\.int64"),
    (lambda: with_codes(torch.uint8), ["body"], ["head"], CODES),
    (with_codes, ["body"], r"head\.weight", CODES),
]


def test_what_cannot_be_trained_is_refused_and_what_stands_beside_it_is_not() -> None:
    for build, targets, names, message in REFUSED:
        model = build()
        with untouched(model), pytest.raises(TargetError, match=message):
            randlora.inject(model, r=2, targets=targets, train_also=names)
    assert randlora.inject(convolutions(), r=2, targets="all", train_also=["fc"]).targets == ("conv",)
    assert randlora.inject(with_codes(), r=4, targets=["body"], train_also=["head.bias"]).train_also == ("head.bias",)
    model = nn.Sequential(Embedding4bit(16, 64, quant_storage=torch.bfloat16), nn.Linear(64, 64)).to("cpu")
    with pytest.raises(TargetError, match=r"0\.weight, which is quantized \(Embedding4bit\)"):
        randlora.inject(model, r=4, targets=["1"], train_also=["0"])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_buffer("cache", torch.zeros(4), persistent=False)
    assert randlora.inject(model, r=2, targets=["0"], train_also=["1"]).train_also == ("1.weight", "1.bias")


NOTE = "is exactly zero in all layers"


@pytest.mark.parametrize(("init", "also"), [("lambda", None), ("gamma", ["head"])])
def test_an_adapter_that_nothing_has_trained_is_told_of(init: Any, also: list[str] | None, tmp_path: Path) -> None:
    def told() -> list[str]:
        notes = [*randlora.save(model, tmp_path, name="default").notes, *randlora.merge(model, reversible=True).notes]
        randlora.unmerge(model)
        return [note for note in notes if NOTE in note]

    model = Mixed()
    too_early = list(model.parameters())
    randlora.inject(model, r=4, init=init, train_also=also)
    for _ in range(2):
        model(TOKENS).square().mean().backward()
        torch.optim.SGD(too_early, lr=1e-2).step()  # which was made before inject, for all that it trains
    saved, _ = told()
    assert ("made before inject" in saved, "train_also" in saved) == (True, also is not None)
    moved = model.head.bias if also else randlora.trainable_parameters(model)[0]
    moved.data.view(-1)[-1] += 1e-6  # one number is enough
    assert told() == []
    randlora.inject(model, r=4, name="b", targets=["q"])
    randlora.activate(model, ["default", "b"])
    (merged,) = told()
    assert "'b'" in merged
    notes = [any(NOTE in each for each in report.notes) for report in randlora.save_all(model, tmp_path)]
    assert notes == [False, True]


def test_flags_come_back_to_the_parameters_that_have_the_names_they_were_of() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7)))
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 3 > 0
    of_value = {bits(parameter): parameter.requires_grad for parameter in model.parameters()}
    randlora.inject(model, r=2, targets=["0", "2"], train_also=["1.bias"])
    torch.__future__.set_swap_module_params_on_conversion(True)  # as for tensors of other classes, such as sharded ones
    try:
        model = copy.deepcopy(pickle.loads(pickle.dumps(model)).double().float())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    randlora.eject(model.requires_grad_(True))
    assert {bits(parameter): parameter.requires_grad for parameter in model.parameters()} == of_value


def round_trip(model: nn.Module) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("chosen", ["a", "none", "merged"])
def test_what_is_held_aside_is_converted_with_a_wrapper_too(chosen: str) -> None:
    """Whatever is active meanwhile. `tests.state_machine` converts the model itself, and copies."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).eval()

    def adapted() -> nn.Module:
        model = made()
        for seed, name in enumerate("ab"):
            randlora.inject(model, r=2, targets=["0"], train_also=["1", "2"], name=name, active=True)
            with torch.no_grad():
                for value in adapter_values(model, name).values():
                    value.add_(torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype))
        return model

    model, x = adapted(), torch.randn(4, 6)
    randlora.activate(model, {"none": [], "a": "a"}.get(chosen, "b"))
    with randlora.merged(model) if chosen == "merged" else nullcontext():
        round_trip(nn.Sequential(model))
    for name in ("a", "b"):
        expected = adapted()
        randlora.activate(expected, name)
        round_trip(expected)
        randlora.activate(model, name)
        assert same_bits(model(x), expected(x)), name
    randlora.remove(model, "a")
    plain = made()
    round_trip(plain)
    randlora.eject(model)
    assert same_bits(model(x), plain(x))
    assert vars(model).keys() == vars(plain).keys()


def test_what_is_held_aside_moves_with_the_model_and_what_has_no_values_gets_none() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    own = [entry.original for entry in randlora.state.adapted_root(model)[1].replaced.values()]
    before = [id(each) for each in own]
    model.share_memory()
    assert all(each.is_shared() for each in own)
    randlora.eject(model)
    assert [id(each) for each in model[1].parameters()] == before
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    randlora.inject(empty, r=2, targets=["0"], train_also=["1"])
    empty.to_empty(device="cpu")
    with pytest.raises(NotImplementedError, match="no data"):
        randlora.activate(empty, [])


@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_no_conversion_of_a_copy_is_one_of_a_different_model(depth: str) -> None:
    """A shallow copy shares the model's modules, and its method: that tells where it would act on others, or none."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    twin = copy.copy(model)
    assert twin.double()[1].weight.dtype == model[1].weight.dtype == torch.float64
    kept = [model]
    if depth == "deep":
        twin = copy.deepcopy(twin)
    else:
        kept.clear()
    del model
    with pytest.raises(AdapterError, match="cannot convert a shallow copy"), untouched(twin):
        twin.float()
    assert all(model[1].weight.dtype == torch.float64 for model in kept)


X = torch.randn(3, 8)
NEEDING: dict[str, Callable[[nn.Module, Path], object]] = {
    "delta_weight": lambda model, _: randlora.delta_weight(model, "0"),
    "update_norms": lambda model, _: randlora.update_norms(model, name="a"),
    "limit_norms": lambda model, _: randlora.limit_norms(model, 1.0, name="a"),
    "check": lambda model, _: randlora.check(model, X),
    "merge": lambda model, _: randlora.merge(model),
    "merge some": lambda model, _: randlora.merge(model, adapters=["a"], reversible=True),
    "merged": lambda model, _: randlora.merged(model).__enter__(),
    "merged_tensors": lambda model, _: dict(randlora.merged_tensors(model)),
    "save_merged": lambda model, path: randlora.files.save_merged(model, path / "merged"),
    "combine": lambda model, _: randlora.serving.combine(model, {"a": 2.0}, name="c"),
    "plan": lambda model, _: randlora.plan(model, r=2, name="c", targets=["0"]),
    "inject": lambda model, _: randlora.inject(model, r=2, name="c", targets=["0"]),
    "load": lambda model, path: randlora.load(model, path / "a", name="c"),
}
"""What needs the weight of an adapted layer, or puts something beside it."""
ONCE_MERGED: dict[str, Callable[[nn.Module], object]] = {
    "unmerge": randlora.unmerge,
    "unmerge some": lambda model: randlora.unmerge(model, "a"),
    "eject": randlora.eject,
    "state_dict": nn.Module.state_dict,
}
COMPUTED = r"0 computes its weight from other parameters: remove the parametrization first$"


def of_two() -> Any:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    for name in ("a", "b"):
        adapt(model, r=2, targets=["0", "1"], name=name)
    randlora.activate(model, ["a", "b"])
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REWRITES)
def test_what_needs_a_weight_that_is_computed_since_refuses_it_in_the_same_words(name: str, tmp_path: Path) -> None:
    model, merged = of_two(), of_two()
    own = bits(merged[0].weight)
    randlora.merge(merged, reversible=True)
    for each in (model, merged):
        REWRITES[name](each[0], "weight")
    randlora.save_all(model, tmp_path)
    for verb, call in NEEDING.items():
        with untouched(model), pytest.raises(RandLoRAError, match=COMPUTED):
            call(model, tmp_path)
        assert not (tmp_path / "merged").exists(), verb
    before = [str(each) for each in randlora.adapters(merged)]
    words = "0 changed its class" if name in ("weight_norm", "parametrize") else COMPUTED
    for verb, undo in ONCE_MERGED.items():
        with pytest.raises(RandLoRAError, match=words if verb == "eject" else COMPUTED):
            undo(merged)
    assert [str(each) for each in randlora.adapters(merged)] == before
    if name == "prune":
        prune.remove(merged[0], "weight")
        randlora.unmerge(merged)
        assert bits(merged[0].weight) == own


def test_a_weight_that_is_computed_since_is_refused_in_a_layer_with_a_forward_of_its_own() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].forward = lambda x: nn.functional.linear(x, model[0].weight, model[0].bias)
    adapt(model, r=4)
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(MergeError, match=COMPUTED):
        [*randlora.merged_tensors(model)]


IDS = torch.arange(10).view(2, 5)


def llama(*, is_tied: bool) -> Any:
    return models.llama(vocab_size=40, tie_word_embeddings=is_tied, num_hidden_layers=1)


def resize(model: Any, size: int) -> None:
    torch.manual_seed(1)
    model.resize_token_embeddings(size, mean_resizing=False)


def step(model: nn.Module) -> None:
    parameters = [*randlora.trainable_parameters(model)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    torch.optim.SGD(parameters, lr=0.1).step()


@pytest.mark.parametrize(
    ("is_tied", "also", "size"),
    [
        (False, ["embed_tokens"], 44),
        (False, ["embed_tokens", "lm_head"], 30),
        (True, ["lm_head"], 44),
        (True, ["embed_tokens"], 30),
    ],
)
def test_a_resized_vocabulary_is_trained_and_saved(is_tied: bool, also: list[str], size: int, tmp_path: Path) -> None:
    model = llama(is_tied=is_tied)
    randlora.inject(model, r=2, targets=["q_proj"], train_also=also)
    step(model)
    resize(model, size)
    names = [fqn for fqn, parameter in model.named_parameters() if any(name in fqn for name in also)]
    names = ["model.embed_tokens.weight"] if is_tied else names
    trained = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    assert all(id(model.get_parameter(name)) in trained for name in names)
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    step(model)
    assert not any(same_bits(before[name], model.get_parameter(name)) for name in names)
    randlora.save(model, tmp_path)
    fresh = llama(is_tied=is_tied)
    with pytest.raises(CheckpointError, match=r"has shape \(40, 32\) here"):
        randlora.load(fresh, tmp_path)
    resize(fresh, size)
    for name, parameter in model.named_parameters():  # the rows that are new in what is not trained
        if "randlora" not in name and name not in names:
            fresh.get_parameter(name).data = parameter.data.clone()
    randlora.load(fresh, tmp_path)
    assert same_bits(fresh(IDS).logits, model(IDS).logits)
    randlora.eject(model)
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (size, 32)
    assert is_tied == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_resizing_an_adapted_embedding_or_head_is_said_by_everything(tmp_path: Path) -> None:
    model = llama(is_tied=False)
    adapt(model, r=2, targets=["embed_tokens"])
    resize(model, 44)
    with pytest.raises(AdapterError, match=r"had the shape \(40, 32\) when it was adapted: resize it before"):
        model(IDS)
    assert_said(model, "the shape of model.embed_tokens was", tmp_path)
    randlora.inject(model, r=2, targets=["lm_head", "q_proj"])
    resize(model, 48)
    assert_said(model, "lm_head no longer has adapter 'default': the module was replaced by a different one", tmp_path)
    assert model(IDS).logits.shape[-1] == 48
    randlora.inject(other := Mixed(), r=2, train_also=["head.weight"])
    with randlora.disabled(other):
        other.head = nn.Linear(12, 5)
    assert_said(other, "the shape of head.weight, which adapter 'default' trains, was 3 x 12 and is 5 x 12", tmp_path)


def assert_said(model: nn.Module, message: str, place: Path) -> None:
    """Whatever would train, write or merge an adapter that the model has lost a part of is refused; eject is not."""
    (info,) = randlora.adapters(model)
    assert [message in problem for problem in info.problems] == [True]
    refused: list[tuple[type[RandLoRAError], Callable[[], object]]] = [
        (AdapterError, lambda: [*randlora.trainable_parameters(model)]),
        (CheckpointError, lambda: randlora.save(model, place / "new")),
        (MergeError, lambda: randlora.merge(model)),
    ]
    for error, call in refused:
        with pytest.raises(error, match=message):
            call()
    assert not (place / "new").exists()
    randlora.eject(model)
    assert not any("randlora" in name for name, _ in model.named_parameters())


class Tied(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(12, 3, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = super().forward(tokens) + self.twin(self.embed(tokens))
        return output


def assigned(model: Tied) -> None:
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()}, assign=True)


def new_while_disabled(model: Tied) -> None:
    with randlora.disabled(model):
        model.head = nn.Linear(12, 3)


def wider_parameter(model: Tied) -> None:
    model.head.weight = model.twin.weight = nn.Parameter(torch.randn(5, 12))
    model.head.bias = nn.Parameter(torch.randn(5))


TRAINED = "head.weight", "head.bias", "twin.weight"
EDITS: dict[str, Callable[[Any], object]] = {
    "new head": lambda model: setattr(model, "head", nn.Linear(12, 3)),
    "wider parameter": wider_parameter,
    "untied": lambda model: setattr(model.twin, "weight", nn.Parameter(torch.randn(3, 12))),
    "assigned": assigned,
    "new head while disabled": new_while_disabled,
    "wrapped": lambda model: model.add_module("head", checkpoint_wrapper(model.head)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_trained_after_a_change_is_what_the_model_has_and_what_is_saved(edit: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    randlora.inject(model, r=4, targets=["q"], train_also=["head.weight"], name="a")
    randlora.inject(model, r=4, targets=["q"], train_also=["head"], name="b", active=True, trainable=True)
    own, other = fill(model, "b").head.weight.detach().clone(), copy.deepcopy(model)
    EDITS[edit](model)
    step(model)
    live = dict(model.named_parameters(remove_duplicate=False))
    live = {fqn.replace("._checkpoint_wrapped_module", ""): parameter for fqn, parameter in live.items()}
    trained = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    assert all(id(live[fqn]) in trained for fqn in TRAINED)
    randlora.save(model, tmp_path, name="b")
    places = {id(live[fqn]): fqn for fqn in reversed(TRAINED)}  # each once, by its first name
    written = {fqn: value for fqn in TRAINED if (value := written_value(tmp_path, fqn)) is not None}
    assert {fqn: bits(value) for fqn, value in written.items()} == {fqn: bits(live[fqn]) for fqn in places.values()}
    with torch.inference_mode():
        randlora.adapters(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    output = model(TOKENS)
    with randlora.disabled(model):
        model(TOKENS)
    assert same_bits(model(TOKENS), output)
    randlora.eject(model)
    model(TOKENS)
    randlora.activate(other, "a")  # b is not active, and keeps its values
    EDITS[edit](other)
    if edit != "wider parameter":
        randlora.activate(other, "b")
        assert same_bits(other.head.weight, own)
        assert same_bits(other.twin.weight, own)
        randlora.save(other, tmp_path, name="b")
        assert bits(written_value(tmp_path, "head.weight")) == bits(own)
        return
    with pytest.raises(AdapterError, match=r"'b' trained head\.weight of shape \(3, 12\), and the model has \(5, 12\)"):
        randlora.activate(other, "b")
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(3, 12\) here, expected all of \(5, 12\)"):
        randlora.save(other, tmp_path / "new", name="b")
    assert not (tmp_path / "new").exists()


def written_value(place: Path, fqn: str) -> Any:
    return read_tensors(place)[0].get(f"base_model.model.{fqn}")


LOST: list[tuple[str, Callable[[], nn.Module] | None, str]] = [
    ("norm", None, "norm.weight"),
    ("norm", lambda: nn.LayerNorm(12, bias=False), "norm.bias"),
    ("norm", nn.Identity, "norm.weight"),
    ("q", lambda: nn.Linear(12, 12), "q no longer has"),
    ("q", nn.Identity, "q no longer has"),
]


@pytest.mark.parametrize(("place", "new", "message"), LOST)
def test_what_was_lost_is_said(place: str, new: Callable[[], nn.Module] | None, message: str, tmp_path: Path) -> None:
    def lose() -> None:
        setattr(model, place, new()) if new else delattr(model, place)

    model = Mixed()
    also = ["norm.bias" if "bias" in message else "norm.weight"]
    randlora.inject(model, r=4, basis="sparse", targets=["q", "up"], train_also=also)  # PEFT draws them under any torch
    held = getattr(model, place)
    own = {name: id(value) for name, value in adapter_values(model).items()}
    lose()
    assert randlora.adapters(model)[0].problems
    setattr(model, place, held)
    assert not randlora.adapters(model)[0].problems
    assert {name: id(value) for name, value in adapter_values(model).items()} == own
    assert randlora.save(fill(model), tmp_path).notes == ()
    model.head = nn.Linear(12, 3)
    (note,) = randlora.save(model, tmp_path).notes
    assert note.startswith("head.weight, head.bias requires grad and belongs to no adapter, so it is not in the file")
    lose()
    assert_said(model, message, tmp_path)


def test_a_forward_that_would_miss_an_adapter_is_refused_wherever_the_layer_was_and_no_other() -> None:
    inner, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)), torch.randn(3, 6)
    model: Any = nn.Sequential(OrderedDict(inner=inner, last=nn.Linear(6, 6)))
    adapt(model, r=2, targets=["inner.0", "last"])
    adapt(model, r=2, targets=["inner.2"], name="other", values=1)
    said, expected = r"cannot run the model: inner\.0 no longer has adapter 'default': the module was rep", model(x)
    model.inner = checkpoint_wrapper(model.inner)  # under new names
    copies: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(nn.Sequential(model)))[0], model]
    for each in copies:
        assert same_bits(each(x), expected)
        inner = each.inner._checkpoint_wrapped_module
        first, inner[0] = inner[0], nn.Linear(6, 9)
        for whole in (each, nn.Sequential(each)):
            with pytest.raises(AdapterError, match=said):
                whole(x)
        with routed(each, ["other", None, "other"]):
            each(x)
        with pytest.raises(AdapterError, match=r"cannot route: inner\.0 no longer has adapter"):
            routed(each, ["default", None, "other"]).__enter__()
        with randlora.disabled(each):
            each(x)
        randlora.activate(each, "other")
        each(x)
        randlora.activate(each, "default")
        with pytest.raises(AdapterError, match=said):
            each(x)
        inner[0] = first
        assert same_bits(each(x), expected)
        del inner[1:], inner[0]
        with pytest.raises(AdapterError, match=said):
            each(x)
        inner.append(first)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # the adapted layer is there again
            each(x)
        randlora.remove(each, "other")
        inner.append(nn.Linear(9, 6))
        assert each(x).shape == (3, 6)
        randlora.eject(each)
        inner[0] = nn.Linear(6, 9)
        assert each(x).shape == (3, 6)


def test_a_layer_of_a_different_adapted_model_does_not_stand_for_a_lost_one_with_its_name() -> None:
    model: Any = adapt(nn.Sequential(OrderedDict(a=nn.Linear(6, 6), b=nn.Linear(6, 6))), r=2)
    other = adapt(nn.Sequential(OrderedDict(a=nn.Linear(6, 6))), r=2)
    model.add_module("other", other)
    assert model(torch.randn(3, 6)).shape == (3, 6)
    model.a = nn.Linear(6, 6)
    with pytest.raises(AdapterError, match=r"cannot run the model: a no longer has adapter 'default'"):
        model(torch.randn(3, 6))

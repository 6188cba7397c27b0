"""What trains beside an adapter, what is said of it, and what becomes of it where modules are replaced or resized."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Embedding4bit
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

import randlora
from randlora.errors import AdapterError, CheckpointError, MergeError, RandLoRAError, TargetError
from tests.checkpoint_files import read_tensors
from tests.kit import adapter_values, assert_unchanged, bits, fill, same_bits, snapshot, untouched
from tests.laws import TOKENS, Mixed
from tests.quantized import of_4_bits

NAMES: list[tuple[list[str] | str, list[str]]] = [
    (["head"], ["head.weight", "head.bias"]),
    (["bias"], ["q.bias", "down.bias", "norm.bias", "head.bias"]),
    (r"(q|down)\.bias", ["q.bias", "down.bias"]),
    (r"norm", ["norm.weight", "norm.bias"]),
    (["norm", "head.bias"], ["norm.weight", "norm.bias", "head.bias"]),
    (["twin"], ["embed.weight"]),  # a tied parameter goes by its first name
]


@pytest.mark.parametrize("is_adapted", [False, True])
def test_names_mean_modules_or_parameters(is_adapted: bool) -> None:
    model = Mixed()
    model.twin = nn.Embedding(11, 12)
    model.twin.weight = model.embed.weight
    if is_adapted:
        randlora.inject(model, r=4)
    for names, expected in NAMES:
        assert [*randlora.plan(model, r=4, train_also=names, name="b").train_also] == expected
    assert "embed" not in randlora.plan(model, r=4, targets="all", train_also=["twin"], name="b").targets


def test_the_bias_of_an_adapted_layer_trains_and_comes_back() -> None:
    model = Mixed()
    before, own = snapshot(model), model.head.weight.detach().clone()
    randlora.inject(model, r=4, train_also=["q.bias", "head"])
    optimizer = torch.optim.SGD(randlora.trainable_parameters(model), lr=1.0)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert bits(model.q.bias) != before["value q.bias"]
    assert not same_bits(model.head.weight, own)
    randlora.inject(model, r=4, name="b", train_also=["head"], active=True)
    assert same_bits(model.head.weight, own), "copies start from the model's own values"
    randlora.eject(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("targets", "names"), [(None, ["q"]), ("all", ["q.weight"]), ("all-linear", r"q(\..*)?")], ids=str
)
def test_what_is_trained_itself_is_not_adapted_by_a_rule(targets: str | None, names: list[str] | str) -> None:
    options: dict[str, Any] = {"targets": targets, "train_also": names}
    with_it = randlora.plan(Mixed(), r=4, targets=targets)
    report = randlora.inject(Mixed(), r=4, **options)
    assert "q" in with_it.targets
    assert report.targets == tuple(fqn for fqn in with_it.targets if fqn != "q")
    assert "q.weight" in report.train_also
    assert report == randlora.plan(Mixed(), r=4, **options)


def with_steps() -> nn.Module:
    model = Mixed()
    model.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    return model


def with_codes(storage: torch.dtype) -> nn.Module:
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
    (partial(with_codes, torch.uint8), ["body"], ["head"], CODES),
    (partial(with_codes, torch.bfloat16), ["body"], r"head\.weight", CODES),
]


def test_what_cannot_be_trained_is_refused_and_what_stands_beside_it_is_not() -> None:
    for build, targets, names, message in REFUSED:
        model = build()
        with untouched(model), pytest.raises(TargetError, match=message):
            randlora.inject(model, r=2, targets=targets, train_also=names)
    assert randlora.inject(convolutions(), r=2, targets="all", train_also=["fc"]).targets == ("conv",)
    model = with_codes(torch.bfloat16)
    assert randlora.inject(model, r=4, targets=["body"], train_also=["head.bias"]).train_also == ("head.bias",)
    model = nn.Sequential(Embedding4bit(16, 64, quant_storage=torch.bfloat16), nn.Linear(64, 64)).to("cpu")
    with pytest.raises(TargetError, match=r"0\.weight, which is quantized \(Embedding4bit\)"):
        randlora.inject(model, r=4, targets=["1"], train_also=["0"])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_buffer("cache", torch.zeros(4), persistent=False)
    assert randlora.inject(model, r=2, targets=["0"], train_also=["1"]).train_also == ("1.weight", "1.bias")


NOTE = "is exactly zero in all layers"


def notes(model: nn.Module, directory: Path) -> tuple[bool, bool]:
    """Return whether `save` and `merge` have the note."""
    saved, merged = randlora.save(model, directory).notes, randlora.merge(model, reversible=True).notes
    randlora.unmerge(model)
    return any(NOTE in note for note in saved), any(NOTE in note for note in merged)


@pytest.mark.parametrize(("init", "also"), [("lambda", None), ("gamma", ["head"])])
def test_an_adapter_that_nothing_has_trained_is_told_of(init: Any, also: list[str] | None, tmp_path: Path) -> None:
    model = Mixed()
    too_early = list(model.parameters())
    randlora.inject(model, r=4, init=init, train_also=also)
    for _ in range(2):
        model(TOKENS).square().mean().backward()
        torch.optim.SGD(too_early, lr=1e-2).step()  # which was made before inject, for all that it trains
    assert notes(model, tmp_path) == (True, True)
    (note,) = (note for note in randlora.save(model, tmp_path).notes if NOTE in note)
    assert "made before inject" in note
    assert ("train_also" in note) == (also is not None)
    moved = model.head.bias if also else randlora.trainable_parameters(model)[0]
    moved.data.view(-1)[-1] += 1e-6  # one number is enough
    assert notes(model, tmp_path) == (False, False)
    randlora.inject(model, r=4, name="b", targets=["q"])
    randlora.activate(model, ["default", "b"])
    (note,) = (note for note in randlora.merge(model, reversible=True).notes if NOTE in note)
    assert "'b'" in note
    saved = [any(NOTE in each for each in report.notes) for report in randlora.save_all(model, tmp_path)]
    assert saved == [False, True]


def moved(model: nn.Module) -> nn.Module:
    model.add_module("elsewhere", model._modules.pop("1"))
    return model


def pruned(model: nn.Module) -> nn.Module:
    prune.random_unstructured(model.get_submodule("5"), "weight", amount=0.5)
    return model


def reassigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def thawed(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def swapped(model: nn.Module) -> nn.Module:
    """Convert as torch does tensors of other classes, such as those of a sharded or a quantized model."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "changes",
    [
        (thawed, moved),
        (pruned, thawed),
        (moved, pickled, thawed),
        (reassigned, copy.deepcopy, thawed, reassigned),
        (pickled, reassigned, pickled, swapped, copy.deepcopy),
    ],
)
def test_flags_come_back_to_the_parameters_they_were_of(changes: tuple[Callable[[nn.Module], nn.Module], ...]) -> None:
    """Not if a parameter is replaced or copied and renamed, as it then has nothing that tells which it was."""
    model: nn.Module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7)))
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad = index % 3 > 0
    of_value = {bits(parameter): parameter.requires_grad for parameter in model.parameters()}
    randlora.inject(model, r=2, targets=["0", "2"], train_also=["1.bias"])
    for change in changes:
        model = change(model)
    randlora.eject(model)
    assert {bits(parameter): parameter.requires_grad for parameter in model.parameters()} == of_value
    assert not any(vars(parameter) for parameter in model.parameters()), "no mark is left"


# Modules that are replaced or resized afterwards

IDS = torch.arange(10).view(2, 5)


def llama(*, is_tied: bool) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, tie_word_embeddings=is_tied, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def resize(model: Any, size: int) -> None:
    torch.manual_seed(1)
    model.resize_token_embeddings(size, mean_resizing=False)


def step(model: nn.Module) -> None:
    """Take a step of training that changes everything that an adapter trains."""
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
def test_a_resized_vocabulary_is_trained_and_saved_on(
    is_tied: bool, also: list[str], size: int, tmp_path: Path
) -> None:
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
    with pytest.raises(CheckpointError, match=r"has shape \(40, 16\) here"):
        randlora.load(fresh, tmp_path)
    resize(fresh, size)
    for name, parameter in model.named_parameters():  # the rows that are new in what is not trained
        if "randlora" not in name and name not in names:
            fresh.get_parameter(name).data = parameter.data.clone()
    randlora.load(fresh, tmp_path)
    assert same_bits(fresh(IDS).logits, model(IDS).logits)
    randlora.eject(model)
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (size, 16)
    assert is_tied == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_resizing_an_adapted_embedding_or_head_is_said_by_everything(tmp_path: Path) -> None:
    model = llama(is_tied=False)
    randlora.inject(model, r=2, targets=["embed_tokens"])
    fill(model)
    resize(model, 44)
    with pytest.raises(AdapterError, match=r"had the shape \(40, 16\) when it was adapted: resize it before"):
        model(IDS)
    assert_said(model, "the shape of model.embed_tokens was", tmp_path)
    randlora.inject(model, r=2, targets=["lm_head", "q_proj"])
    resize(model, 48)
    assert_said(model, "lm_head no longer has adapter 'default': the module was replaced by a different one", tmp_path)
    assert model(IDS).logits.shape[-1] == 48


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


def test_what_several_adapters_have_lost_is_said_of_each_in_their_order() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.MultiheadAttention(4, 2))
    weight = "2.in_proj_weight"
    randlora.inject(model, r=2, name="a", targets=["1", weight])
    randlora.inject(model, r=2, name="b", targets=["0", weight], in_proj="split")
    model.get_parameter(weight).data = torch.zeros(24, 8)
    model[1], model[0] = nn.Linear(6, 4), nn.Linear(4, 6)
    with untouched(model), pytest.raises(AdapterError) as caught, randlora.serving.routed(model, ["b", "a"]):
        pass
    assert [line.removeprefix("  - ").partition(": ")[0] for line in str(caught.value).splitlines()[1:]] == [
        "0 no longer has adapter 'b'",
        f"the shape of {weight} was 3 x 4 x 4 when it was adapted and is 3 x 8 x 8 now",
        "1 no longer has adapter 'a'",
        f"the shape of {weight} was 12 x 4 when it was adapted and is 24 x 8 now",
    ]


class Tied(Mixed):
    """A head that is tied to another module."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(12, 3, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = super().forward(tokens) + self.twin(self.embed(tokens))
        return output


def new_head(model: Tied) -> None:
    model.head = nn.Linear(12, 3)


def wider_parameter(model: Tied) -> None:
    model.head.weight = model.twin.weight = nn.Parameter(torch.randn(5, 12))
    model.head.bias = nn.Parameter(torch.randn(5))


def untied(model: Tied) -> None:
    model.twin.weight = nn.Parameter(torch.randn(3, 12))


def assigned(model: Tied) -> None:
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()}, assign=True)


def wrapped(model: Tied) -> None:
    model.add_module("head", checkpoint_wrapper(model.head))


TRAINED = "head.weight", "head.bias", "twin.weight"


@pytest.mark.parametrize("edit", [new_head, wider_parameter, untied, assigned, wrapped])
def test_what_is_trained_after_a_change_is_what_the_model_has_and_what_is_saved(
    edit: Callable[[Tied], None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Tied()
    randlora.inject(model, r=4, targets=["q"], train_also=["head.weight"], name="a")
    randlora.inject(model, r=4, targets=["q"], train_also=["head"], name="b", active=True, trainable=True)
    own, other = fill(model, "b").head.weight.detach().clone(), copy.deepcopy(model)
    edit(model)
    step(model)
    live = dict(model.named_parameters(remove_duplicate=False))
    live = {fqn.replace("._checkpoint_wrapped_module", ""): parameter for fqn, parameter in live.items()}
    trained = {id(parameter) for parameter in randlora.trainable_parameters(model)}
    assert all(id(live[fqn]) in trained for fqn in TRAINED)
    randlora.save(model, tmp_path, name="b")
    written = read_tensors(tmp_path)[0]
    places = {id(live[fqn]): fqn for fqn in reversed(TRAINED)}  # each once, by its first name
    assert {fqn for fqn in TRAINED if f"base_model.model.{fqn}" in written} == {*places.values()}
    assert all(bits(written[f"base_model.model.{fqn}"]) == bits(live[fqn]) for fqn in places.values())
    output = model(TOKENS)
    with randlora.disabled(model):
        model(TOKENS)
    assert same_bits(model(TOKENS), output)
    randlora.eject(model)
    model(TOKENS)
    randlora.activate(other, "a")  # b is not active, and keeps its values
    edit(other)
    if other.head.weight.shape == own.shape:
        randlora.activate(other, "b")
        assert same_bits(other.head.weight, own)
        assert same_bits(other.twin.weight, own)
        randlora.save(other, tmp_path, name="b")
        assert bits(read_tensors(tmp_path)[0]["base_model.model.head.weight"]) == bits(own)
        return
    with pytest.raises(AdapterError, match=r"'b' trained head\.weight of shape \(3, 12\), and the model has \(5, 12\)"):
        randlora.activate(other, "b")
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(3, 12\) here, expected all of \(5, 12\)"):
        randlora.save(other, tmp_path / "new", name="b")
    assert not (tmp_path / "new").exists()


LOST: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "deleted": (lambda model: delattr(model, "norm"), "norm.weight"),
    "without bias": (lambda model: setattr(model, "norm", nn.LayerNorm(12, bias=False)), "norm.bias"),
    "identity": (lambda model: setattr(model, "norm", nn.Identity()), "norm.weight"),
    "target": (lambda model: setattr(model, "q", nn.Linear(12, 12)), "q no longer has"),
    "target identity": (lambda model: setattr(model, "q", nn.Identity()), "q no longer has"),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_the_model_lost_is_said_and_not_trained_or_saved_unless_it_is_put_back(lost: str, tmp_path: Path) -> None:
    lose, fqn = LOST[lost]
    model = Mixed()
    randlora.inject(model, r=4, targets=["q", "up"], train_also=[fqn if fqn == "norm.bias" else "norm.weight"])
    held = model.q, model.norm
    own = {name: id(value) for name, value in adapter_values(model).items()}
    lose(model)
    assert randlora.adapters(model)[0].problems
    model.q, model.norm = held
    assert not randlora.adapters(model)[0].problems
    assert {name: id(value) for name, value in adapter_values(model).items()} == own
    assert randlora.save(fill(model), tmp_path).notes == ()
    lose(model)
    assert_said(model, fqn, tmp_path)


def test_a_parameter_that_is_trained_and_belongs_to_no_adapter_is_said_to_be_left_out(tmp_path: Path) -> None:
    model = Mixed()
    model.head = nn.Linear(12, 3, bias=False)
    randlora.inject(model, r=4, targets=["q"], train_also=["head"])
    fill(model).head = nn.Linear(12, 3)
    (note,) = randlora.save(model, tmp_path).notes
    assert note.startswith("head.bias requires grad and belongs to no adapter, so it is not in the files")

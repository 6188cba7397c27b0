"""Parameters that adapters train, and weights that they adapt, of modules that are replaced or resized afterwards."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import randlora
from randlora.errors import AdapterError, CheckpointError, MergeError, RandLoRAError
from tests.checkpoint_files import read_tensors
from tests.kit import adapter_values, bits, fill, same_bits, untouched
from tests.laws import TOKENS, Mixed

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

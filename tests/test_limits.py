"""What docs/limits.md says of code that does not know of adapters, and what to do instead."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import randlora
from tests.kit import adapt, same_bits
from tests.models import llama


def two(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8) if first is None else first, nn.Linear(8, 8))


class OwnPickling(nn.Linear):
    def __reduce__(self) -> Any:
        return OwnPickling, (self.in_features, self.out_features)


def test_a_layer_with_its_own_pickling_is_copied_once_it_is_ejected() -> None:
    model = adapt(two(OwnPickling(8, 8)), r=2, targets=["0"])
    copies: tuple[Callable[[object], object], ...] = copy.deepcopy, pickle.dumps
    for copied in copies:
        with pytest.raises(TypeError, match="OwnPickling defines its own pickling: eject its adapters first"):
            copied(model)
    randlora.eject(model)
    for copied in copies:
        copied(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(5, 8), nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.inner(self.table(ids)), self.table.weight)


def interrupt(_: nn.Module) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [interrupt, randlora.merge, randlora.eject])
def test_after_an_interrupt_or_an_end_within_a_call_its_thread_goes_on_reading_updates(end: Any) -> None:
    model, other = (adapt(Tied(), r=2, targets=["table"]) for _ in range(2))
    model.get_submodule("inner").register_forward_hook(lambda *_: (end(model), None)[1])
    parameter = other.get_parameter("table.weight")

    def call() -> tuple[bool, bool]:
        with contextlib.suppress(KeyboardInterrupt):
            model(torch.tensor([1]))
        return other.table.weight is parameter, dict(other.named_parameters())["table.weight"] is parameter

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(call).result() == (False, True)
    assert other.table.weight is parameter


def share(model: nn.Sequential) -> nn.Module:
    randlora.inject(other := nn.Sequential(nn.Linear(8, 8), model[1]), r=2, targets=["0"])
    return other


CHANGED: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "not at all": (lambda _: None, set()),
    "pruned": (lambda model: prune.identity(model[1], "weight"), {"1.weight_orig"}),
    "moved": (lambda model: model.add_module("moved", model._modules.pop("1")), {"moved.weight", "moved.bias"}),
    "shared": (share, {"1.weight", "1.bias"}),
}


@pytest.mark.parametrize("how", CHANGED)
def test_flags_come_back_to_parameters_that_kept_their_names_and_are_in_no_other_adapted_model(how: str) -> None:
    change, frozen = CHANGED[how]
    model = two()
    randlora.inject(model, r=2, targets=["0"])
    other = change(model)
    randlora.eject(model)
    if how == "shared":
        randlora.eject(other)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("is_whole", [True, False], ids=["model", "part"])
def test_a_conversion_of_a_part_alone_does_not_round_what_is_held_aside(is_whole: bool) -> None:
    model: Any = two()
    own = model[1].weight.detach().clone()
    randlora.inject(model, r=2, targets=["0"], train_also=["1"])
    (model if is_whole else model[1]).half().float()
    randlora.eject(model)
    assert same_bits(model[1].weight, own.half().float() if is_whole else own)


def test_a_resized_head_of_a_model_in_16_bits_is_float32_until_it_is_converted() -> None:
    model: Any = llama(vocab_size=40, num_hidden_layers=1).bfloat16()
    ids = torch.arange(5)[None]
    randlora.inject(model, r=2, targets=["q_proj"], train_also=["lm_head"])
    model.resize_token_embeddings(44, mean_resizing=False)
    assert model.lm_head.weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="same dtype"):
        model(ids)
    model.lm_head.to(torch.bfloat16)
    assert model(ids).logits.shape == (1, 5, 44)

"""`check_rows` names the first layer whose rows are elsewhere in a later call, and finds no fault with right models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from randlora.errors import AdapterError
from randlora.serving import check_rows
from tests import models
from tests.serving import Names, with_adapters

NAMES: Names = ["a", None, "b", "a"]
X = torch.randn(4, 4, 6)  # as many tokens as rows, so that sizes tell nothing


class Layers(nn.Module):
    def __init__(self, arrange: Callable[[Tensor], Tensor], *others: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.others = nn.Linear(6, 6), nn.Linear(6, 6), nn.Sequential(*others)
        self.arrange = arrange

    def forward(self, x: Tensor, more: Any = None, *, generator: Any = None) -> Any:
        if generator is not None:
            x = x + torch.randn(x.shape[1:], generator=generator)
        if more is not None:
            x = x + more["in"][0]
        return {"y": self.last(self.others(self.arrange(torch.tanh(self.first(x)))))}


def by_values(x: Tensor) -> Tensor:
    return x.flip(0) if x[0].std(0).sum() < x[1].std(0).sum() else x.roll(2, 0)


def test_the_first_layer_whose_rows_moved_differently_is_named() -> None:
    model = with_adapters(Layers(by_values))
    with pytest.raises(AdapterError, match=r"^last has rows in different places than routed expects.*by one row"):
        check_rows(model, NAMES, X * torch.tensor([0, 1, 1, 1]).view(4, 1, 1))  # of the first, all tokens are the same


class Skipping(nn.Sequential):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self[2](self[1](self[0](x)) if self.calls == 1 else self[0](x))


def test_a_layer_that_is_called_only_in_the_second_forward_is_named() -> None:
    model = with_adapters(Skipping(*(nn.Linear(6, 6) for _ in range(3))))
    with pytest.raises(AdapterError, match=r"^2 was not called there in the forward before"):
        check_rows(model, NAMES, X)


ATTENTION = nn.TransformerEncoderLayer(6, 2, 8, batch_first=False)
RIGHT: dict[str, tuple[Callable[[Tensor], Tensor], list[nn.Module], dict[str, Any]]] = {
    "tokens first": (lambda x: x.transpose(0, 1), [], {}),
    "attention": (lambda x: x.transpose(0, 1), [ATTENTION], {}),
    "a convolution": (lambda x: x, [nn.Conv1d(4, 4, 1)], {}),
    "dropout": (lambda x: x, [nn.Dropout(0.5)], {}),
    "inputs inside of others": (lambda x: x, [], {"more": {"in": (torch.randn(4, 1, 6), "text")}}),
    "a generator": (lambda x: x, [], {"generator": torch.Generator().manual_seed(3)}),
}


@pytest.mark.parametrize("what", RIGHT)
def test_no_fault_is_found_with_a_right_model_which_stays_as_it_was(what: str) -> None:
    arrange, others, options = RIGHT[what]
    model = with_adapters(Layers(arrange, *copy.deepcopy(others)), "all").train()
    generators = [torch.default_generator, options.get("generator", torch.default_generator)]
    before = [each.get_state() for each in generators]
    check_rows(model, NAMES, X, **options)
    assert all(torch.equal(each.get_state(), state) for each, state in zip(generators, before, strict=True))
    assert all(module.training for module in model.modules())


def test_a_cache_is_rolled_with_the_batch_and_stays_as_it_was() -> None:
    model, ids = with_adapters(models.llama(), None), torch.randint(3, 60, (4, 3))
    model(input_ids=ids, cache=(cache := DynamicCache(config=model.config)))
    keys = cache.layers[0].keys.clone()
    check_rows(model, NAMES, input_ids=ids[:, :1], cache=cache)
    assert cache.get_seq_length() == 3
    assert torch.equal(cache.layers[0].keys, keys)


class Given(list[Tensor]):
    def __reduce__(self) -> Any:
        return Given, (), None, (each.clone() for each in self)


def test_tensors_that_an_argument_makes_when_it_is_copied_are_not_taken_for_one_another() -> None:
    model = with_adapters(Layers(lambda x: x))
    given = Given(torch.full((4, 1, 6), float(number)) for number in range(4))
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append([float(each.mean()) for each in args[1]["in"]]))
    check_rows(model, NAMES, X, {"in": given})
    assert seen == [[0.0, 1.0, 2.0, 3.0]] * 2


def test_what_routed_refuses_and_rows_of_one_adapter_alone_are_refused() -> None:
    model = with_adapters(Layers(lambda x: x))
    for names, given, message in (
        (["a"] * 4, X, "name at least two"),
        (["a", "z"], X, "no adapter named 'z'"),
        (["a", "b"], X, "names for 2 rows"),
    ):
        with pytest.raises(AdapterError, match=message):
            check_rows(model, names, given)
    model.arrange = lambda x: x[x.sum((1, 2)).argsort()]
    with pytest.raises(AdapterError, match="chosen or sorted by values"):
        check_rows(model, NAMES, X)

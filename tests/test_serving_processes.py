"""Blocks of `routed` and what leaves them: copies and pickles, and threads and processes that are started inside."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import randlora
from randlora.errors import AdapterError
from randlora.serving import routed
from tests.further import further
from tests.serving import Names, with_adapters

NAMES: Names = ["a", "b", None]


@pytest.fixture
def model() -> nn.Module:
    return with_adapters(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)))  # type: ignore[no-any-return]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_is_made_in_a_block_is_inactive_and_this_is_said(how: str, model: nn.Module) -> None:
    """Except where the innermost block disables the adapters: a copy computes as the model does there."""
    x, copied = torch.randn(3, 6), COPIES[how]
    randlora.activate(model, "a")
    with randlora.disabled(model):
        base = model(x)
    with routed(model, NAMES):
        expected = model(x)
        with pytest.warns(
            UserWarning, match=r"^in a block of randlora\.serving\.routed\(?.* a copy .* are inactive: make it"
        ):
            twin = copied(model)
        with randlora.disabled(model):
            assert torch.equal(copied(model)(x), base)
    assert torch.equal(twin(x), base)
    assert not any(info.is_active for info in randlora.adapters(twin))
    with routed(twin, NAMES):
        assert torch.equal(twin(x), expected)
    assert torch.equal(copied(model)(x), model(x))


def computed(model: nn.Module, x: Tensor, outputs: Any) -> None:
    outputs.put(model(x).detach().numpy())


class Computed(Dataset[Tensor]):
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return self.model(self.x).detach()  # type: ignore[no-any-return]


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", further("forkserver")])
def test_a_process_that_is_started_in_a_block_routes_or_is_refused(method: Any, model: nn.Module) -> None:
    """A forked one goes on in the block; one that would get a pickle of the model does not even start."""
    x, context = torch.randn(3, 6), multiprocessing.get_context(method)
    outputs = context.SimpleQueue()

    def process() -> Any:
        return context.Process(target=computed, args=(model, x, outputs))

    def loader() -> DataLoader[Tensor]:
        return DataLoader(Computed(model, x), batch_size=None, num_workers=1, multiprocessing_context=method)

    def assert_both(expected: Tensor) -> None:
        (started := process()).start()
        assert torch.equal(torch.from_numpy(outputs.get()), expected)
        started.join()
        assert [torch.equal(found, expected) for found in loader()] == [True]

    if method == "fork":
        with routed(model, NAMES):
            assert_both(model(x))
        assert_both(model(x))
        return
    refused = "a process spawned here would run the model without them: start it before the block"
    for start in (lambda: process().start(), lambda: iter(loader())):
        with routed(model, NAMES), pytest.raises(AdapterError, match=refused):
            start()

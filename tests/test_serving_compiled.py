"""In a block of `routed` compiled models run uncompiled, and as compiled as before after it."""

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import randlora
from randlora.errors import AdapterError
from tests.kit import fill

pytestmark = pytest.mark.medium


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    built = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    for seed, name in enumerate("abc"):
        randlora.inject(built, r=4, alpha=4, name=name, trainable=False)
        fill(built, name, seed=seed)
    return built.eval()


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_block_runs_uncompiled_and_compiles_nothing(model: nn.Module, is_whole: bool) -> None:
    counter, x = CompileCounterWithBackend("aot_eager"), torch.randn(3, 8)
    if is_whole:
        compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    else:
        compiled = model
        for layer in (model.get_submodule("0"), model.get_submodule("2")):
            layer.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        alone = {}
        for name in "abc":
            randlora.activate(model, name)
            alone[name] = compiled(x)
        compiled_before = counter.frame_count
        for names in (["a", "b", "c"], ["c", "a", "a"]):
            with randlora.serving.routed(model, names), randlora.serving.routed(model, names):
                expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
                torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x), alone["c"])
    assert counter.frame_count == compiled_before > 0


def test_blocks_of_several_models_end_in_any_order(model: nn.Module) -> None:
    compiled: Any = torch.compile(nn.Linear(4, 4), backend=(counter := CompileCounterWithBackend("aot_eager")))
    begun, go_on = threading.Event(), threading.Event()
    other = nn.Sequential(nn.Linear(4, 4))
    randlora.inject(other, r=2, name="a")

    def hold() -> None:
        with randlora.serving.routed(other, ["a"]):
            begun.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    with randlora.serving.routed(model, ["a", "b"]):
        thread.start()
        assert begun.wait(60)
    compiled(torch.randn(2, 4))
    assert counter.frame_count == 0, "the other block is open"
    go_on.set()
    thread.join()
    compiled(torch.randn(2, 4))
    assert counter.frame_count == 1


def test_exporting_in_a_block_is_an_error(model: nn.Module) -> None:
    with (
        randlora.serving.routed(model, ["a", "b", None]),
        pytest.raises(AdapterError, match="cannot be exported or compiled in"),
    ):
        torch.export.export(model, (torch.randn(3, 8),), strict=False)

"""`routed` in compiled code: the rows of each adapter, one graph whatever the adapters are, and errors elsewhere."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import randlora
from randlora.errors import AdapterError
from randlora.layers.compiled_routes import uncompiled
from tests.kit import fill

pytestmark = pytest.mark.medium

Names = list[str | None]
CHOICES: list[Names] = [["a", "b", None], ["b", "c", "a"], ["c", "c", "c"], [None, None, None], ["a", "b", None]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def with_adapters(model: nn.Module, **options: Any) -> nn.Module:
    for seed, name in enumerate("abc"):
        randlora.inject(model, r=4, alpha=4, name=name, trainable=False, **options)
        fill(model, name, seed=seed)
    return model.eval()


def stack() -> nn.Module:
    torch.manual_seed(0)
    return with_adapters(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return with_adapters(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64)))


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        pytest.param(torch.enable_grad, marks=pytest.mark.slow),
        pytest.param(torch.inference_mode, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_every_choice_of_adapters(mode: Any) -> None:
    model, counter = stack(), CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(3, 8)
    with mode():
        for names in CHOICES:
            with randlora.routed(model, names):
                torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == 1
        torch.testing.assert_close(compiled(x), model(x))
        with randlora.disabled(model):
            torch.testing.assert_close(compiled(x), model(x))
        for rows in (5, 7, 9):  # one more graph, for any number of them
            with randlora.routed(model, ["a", "b", None, "c", "a", "a", "b", "c", "c"][:rows]):
                torch.testing.assert_close(compiled(torch.ones(rows, 8)), model(torch.ones(rows, 8)))
    assert counter.frame_count <= 5


class Block(nn.Module):
    """A layer between others, as a transformer repeats it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    torch.manual_seed(0)
    model, counter = with_adapters(nn.Sequential(*(Block() for _ in range(3)))), CompileCounterWithBackend("aot_eager")
    plain, x = copy.deepcopy(model), torch.randn(3, 8)
    for block in model.children():
        block.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        model(x)
        of_one_adapter = counter.frame_count
        for names in CHOICES:
            with randlora.routed(model, names), randlora.routed(plain, names):
                torch.testing.assert_close(model(x), plain(x))
    assert counter.frame_count == 2 * of_one_adapter


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_of_a_compiled_transformer(options: dict[str, Any]) -> None:
    model, counter = llama(), CompileCounterWithBackend("aot_eager")
    plain, ids = copy.deepcopy(model), torch.randint(64, (3, 5))
    model.compile(backend=counter)
    graphs = []
    for names in CHOICES:
        with randlora.routed(model, names), randlora.routed(plain, names):
            chosen = {**options, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
            assert torch.equal(model.generate(ids, **chosen), plain.generate(ids, **chosen))
        graphs.append(counter.frame_count)
    assert len(set(graphs[1:])) == 1, graphs


@pytest.mark.slow
def test_a_whole_transformer() -> None:
    model, counter = llama(), CompileCounterWithBackend("aot_eager")
    plain, ids = copy.deepcopy(model), torch.randint(64, (3, 5))
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    for names in CHOICES:
        with randlora.routed(model, names), randlora.routed(plain, names), torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, plain(ids).logits)
    assert counter.frame_count == 1


def test_values_that_change_in_the_block_count() -> None:
    model = stack()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    with torch.no_grad(), randlora.routed(model, ["a", "b", "c"]):
        compiled(x)
        fill(model, "b", seed=9)
        torch.testing.assert_close(compiled(x), model(x))


def test_copies_go_through_their_own_adapters() -> None:
    model, x = stack(), torch.randn(3, 8)
    with torch.no_grad(), randlora.routed(model, ["a", "b", "c"]):
        torch.compile(model, backend="aot_eager")(x)
        twin = copy.deepcopy(model)
    fill(twin, "a", seed=9)
    with torch.no_grad(), randlora.routed(twin, ["a", "b", "c"]):
        torch.testing.assert_close(torch.compile(twin, backend="aot_eager")(x), twin(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_gradients_are_computed_uncompiled() -> None:
    model, x = stack(), torch.randn(3, 8)
    randlora.activate(model, ["a", "b", "c"], trainable=True)
    parameters = list(randlora.trainable_parameters(model))
    compiled: Any = torch.compile(model, backend="aot_eager")
    with randlora.routed(model, ["a", "b", None]):
        losses = [run(x).square().sum() for run in (model, compiled)]
        found = [torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in losses]
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
            torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(*found)


def test_an_adapter_that_becomes_trainable_in_the_block_is_an_error() -> None:
    model, x = stack(), torch.randn(3, 8)
    compiled: Any = torch.compile(model, backend="aot_eager")
    with randlora.routed(model, ["a", "b", None]):
        compiled(x)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lambda.a" in name)
        with pytest.raises(AdapterError, match="became trainable inside of a block"):
            compiled(x)


def conv() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 1)), torch.randn(3, 4, 9)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4)), torch.randint(12, (3, 5))


def attention() -> tuple[nn.Module, Tensor]:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)


@pytest.mark.parametrize(
    "make", [conv, pytest.param(embedding, marks=pytest.mark.slow), pytest.param(attention, marks=pytest.mark.slow)]
)
def test_modules_that_run_for_each_adapter_run_uncompiled(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make()
    with_adapters(model, targets="all")
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for names in CHOICES:
            with randlora.routed(model, names):
                torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("make", [lambda: (stack(), torch.randn(3, 8)), pytest.param(conv, marks=pytest.mark.slow)])
def test_another_number_of_rows_is_an_error_in_compiled_code_too(make: Any) -> None:
    model, x = make()
    if not randlora.adapters(model):
        with_adapters(model, targets="all")
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), randlora.routed(model, ["a", "b", None]):
        compiled(x)
        for strange in (torch.cat([x, x]), x[:2]):
            with pytest.raises(AdapterError, match="names for 3 rows"):
                compiled(strange)
        torch.testing.assert_close(compiled(x), model(x))


def test_exporting_in_a_block_is_an_error() -> None:
    model = stack()
    with randlora.routed(model, ["a", "b", None]), pytest.raises(Exception, match="cannot be exported in a block"):
        torch.export.export(model, (torch.randn(3, 8),), strict=False)


def test_the_mark_is_that_of_the_compiler() -> None:
    def function() -> None: ...

    marks = [{name for name in vars(mark(function)) if name.startswith("_torchdynamo_disable")}
             for mark in (torch.compiler.disable, uncompiled)]  # fmt: skip
    assert marks[0] <= marks[1]

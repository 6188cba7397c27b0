"""Which rows a layer is given is known wherever a model puts them, equal to each adapter alone, or an error."""

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes  # noqa: F401  # has operations, which have rules
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.errors import AdapterError, RandLoRAError
from randlora.serving import routed
from randlora.serving.labels import NONE, Label
from randlora.serving.tracking import RowTracking
from tests import models
from tests.serving import Names, each_alone, row_by_row, with_adapters

NAMES: Names = ["a", "b", None, "a"]
ROWS = len(NAMES)


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what torch sets while threads follow rows: torch 2.6 leaves it set, and then compiles nothing."""
    monkeypatch.setattr(torch.utils._python_dispatch, "_is_in_non_infra_torch_dispatch_mode", False)


def rows_are_right(model: nn.Module, run: Callable[[], Tensor], axis: int = 0) -> bool:
    """Whether the rows of each adapter are its own, in the first call and in the second; an error is no answer."""
    with torch.no_grad():
        alone, expected = each_alone(model, "ab", run), row_by_row(model, NAMES, run, axis)
        assert not torch.allclose(alone["a"], alone["b"], atol=1e-3, equal_nan=True), "or nothing could be wrong"
        with routed(model, NAMES):
            found = [run(), run()]
    return all(torch.allclose(each, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())) for each in found)


class Arranging(nn.Module):
    def __init__(self, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.there, self.back = there, back

    def forward(self, x: Tensor, *, tokens_first: bool = False) -> Any:
        x = self.there(self.first(x))
        y = torch.tanh(self.layer(x.transpose(0, 1) if tokens_first else x))
        return self.last(self.back(y.transpose(0, 1) if tokens_first else y))


def in_parts_after_a_token(x: Tensor) -> Tensor:
    found = torch.zeros(ROWS, ROWS + 1, 6)
    found[:, 2:] = x[:, 1:]
    found[:, 1] += x[:, 0]
    return found


TABLE = torch.linspace(-1, 1, 12).view(6, 2)
ARRANGED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tokens first": (lambda x: x.transpose(0, 1).flatten(0, 1), lambda x: x.unflatten(0, (-1, ROWS)).transpose(0, 1)),
    "interleaved": (lambda x: x.repeat_interleave(2, 0), lambda x: x.unflatten(0, (-1, 2)).mean(1)),
    "some tokens": (lambda x: x.flatten(0, 1)[[14, 1, 5, 8]], lambda x: x[[1, 2, 3, 0]]),
    "windows": (
        lambda x: F.pad(x, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 2),
        lambda x: x.unflatten(0, (ROWS, 2, -1)).transpose(1, 2).flatten(1, 2),
    ),
    "a token before": (lambda x: torch.cat([torch.ones(1, 1, 6).expand(ROWS, -1, -1), x], 1), lambda x: x[:, 1:]),
    "written into parts": (in_parts_after_a_token, lambda x: x[:, 1:]),
    "looked up in columns": (lambda x: x + TABLE[:, (x.sum(-1) > 0).long()].permute(1, 2, 0), lambda x: x),
    "strided": (lambda x: x.as_strided((ROWS, 2, 6), (6 * ROWS, 6, 1)), lambda x: x),
    "beside nothing": (lambda x: torch.cat([x, (x[..., :1] * torch.ones(0)).view(ROWS, 0, 6)], 1), lambda x: x),
    "normalized": (lambda x: F.batch_norm(x, torch.zeros(ROWS), torch.ones(ROWS)), lambda x: x),
}


@pytest.mark.parametrize("arranged", ARRANGED)
def test_rows_anywhere(arranged: str) -> None:
    tokens = ROWS + 1 if arranged == "windows" else ROWS  # as many as rows, so that sizes tell nothing
    model, x = with_adapters(Arranging(*ARRANGED[arranged])), torch.randn(ROWS, tokens, 6)
    assert rows_are_right(model, lambda: model(x))


@torch.library.custom_op("flash_attn::forward", mutates_args=())
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by an operation that torch knows by name alone, as FlashAttention's own package has."""
    return F.scaled_dot_product_attention(query, key, value)


VALUES, UNKNOWN = "were chosen or sorted by values", "are mixed or unknown, since "
NOT_KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "top tokens": (lambda x: x.flatten(0, 1)[x.flatten(0, 1).sum(-1).topk(ROWS).indices], VALUES),
    "sorted in Python": (
        lambda x: torch.stack([x[row] for row in sorted(range(ROWS), key=x.sum((1, 2)).tolist().__getitem__)]),
        VALUES,
    ),
    "sorted by torch": (lambda x: torch.stack([x[int(row)] for row in x.sum((1, 2)).argsort()]), VALUES),
    "written in order": (lambda x: torch.zeros_like(x).index_copy(0, x.sum((1, 2)).argsort(), x), VALUES),
    "through NumPy": (lambda x: torch.from_numpy(x.numpy()[::-1].copy()), rf"{UNKNOWN}Tensor\.numpy"),
    "summed over": (lambda x: torch.einsum("bth,bsh->ts", x, x)[:ROWS, :1] + torch.ones(6), "are mixed"),
    "normalized over": (lambda x: F.batch_norm(x, None, None, training=True), f"{UNKNOWN}.*batch_norm"),
    "nn.LSTM": (lambda x: nn.LSTM(6, 6, batch_first=True)(x)[0], UNKNOWN),
    "FlashAttention": (lambda x: flash_attention(x, x, x), f"{UNKNOWN}flash_attn::forward"),
}


@pytest.mark.parametrize("what", NOT_KNOWN)
def test_rows_that_cannot_be_known_are_an_error_at_every_length(what: str) -> None:
    arrange, message = NOT_KNOWN[what]
    model = with_adapters(Arranging(arrange, lambda x: x))
    with routed(model, NAMES), torch.no_grad():
        for length in (ROWS - 1, ROWS, ROWS - 1):
            with pytest.raises(AdapterError, match=message):
                model(torch.randn(ROWS, length, 6))


class Table(nn.ModuleList):
    def forward(self, x: Tensor, *, is_queries: bool) -> Tensor:
        table = torch.ones(ROWS, 6)
        y: Tensor = self[0](table[:1].expand(len(x), -1) if is_queries else table)
        return x * y.unsqueeze(1) if is_queries else x @ y.T


def test_calls_that_differ_in_a_flag_are_not_of_one_kind_and_a_table_as_long_as_the_batch_is_none() -> None:
    model, x = with_adapters(Arranging(torch.clone, torch.clone)), torch.randn(ROWS, ROWS, 6)
    assert rows_are_right(model, lambda: model(x, tokens_first=True))
    with routed(model, NAMES), torch.no_grad():
        model(x)
        with pytest.raises(AdapterError, match="in different places than before"):
            model(x, tokens_first=True)
    table = with_adapters(Table([nn.Linear(6, 6)]))
    assert rows_are_right(table, lambda: table(x, is_queries=True))
    with torch.no_grad(), routed(table, NAMES), pytest.raises(AdapterError, match="the same for all rows"):
        table(x, is_queries=False)


def test_rows_that_a_model_repeats_itself_in_generate_are_an_error() -> None:
    class Guided(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def generate(self, ids: Tensor) -> Any:
            return self(input_ids=ids.repeat(2, 1)).logits

    model, ids = with_adapters(models.llama()), torch.randint(3, 60, (ROWS, ROWS))
    model.__class__ = Guided
    with routed(model, NAMES), pytest.raises(AdapterError, match="which the model arranges itself"):
        model.generate(ids)
    randlora.activate(model, "a")
    expected = model.generate(ids)
    with routed(model, ["a"] * ROWS):  # whose rows are all of one adapter, wherever they are
        torch.testing.assert_close(model.generate(ids), expected)


def test_sequences_that_are_packed_into_one_row_are_of_one_adapter() -> None:
    model, ids = with_adapters(models.llama()), torch.randint(3, 60, (2, 4))
    packed: Any = {"input_ids": ids.view(1, 8), "position_ids": torch.arange(4).repeat(1, 2), "use_cache": False}
    with torch.no_grad():
        expected = each_alone(model, "ab", lambda: model(ids).logits)
        for name, logits in expected.items():
            with routed(model, [name]):
                torch.testing.assert_close(model(**packed).logits.view_as(logits), logits, rtol=1e-4, atol=1e-4)
        with routed(model, ["a", "b"]), pytest.raises(AdapterError, match=r"names for 2 rows, .* which has 1"):
            model(**packed)


def test_what_is_made_of_items_is_taken_for_the_row_that_it_is_put_into() -> None:
    def of_items(x: Tensor) -> Tensor:
        return torch.tensor([row.sum().item() for row in x.flip(0)])[:, None, None].expand_as(x)

    x = torch.randn(ROWS, 5, 6)
    for arrange, is_right in ((lambda x: x.sum((1, 2)).flip(0)[:, None, None].expand_as(x), True), (of_items, False)):
        model = with_adapters(Arranging(arrange, lambda y: y.flip(0)))
        assert rows_are_right(model, lambda: model(x)) is is_right  # noqa: B023


def test_only_the_first_call_of_a_kind_is_followed() -> None:
    model, ids = with_adapters(models.llama()), torch.randint(3, 60, (ROWS, 5))
    hooks = [{**module._forward_hooks} for module in model.modules()]
    begin = patch.object(RowTracking, "__enter__", autospec=True, side_effect=RowTracking.__enter__)
    with begin as begun, routed(model, NAMES):
        for _ in range(2):
            model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert len({id(call.args[0]) for call in begun.call_args_list}) == 2, "the prompts, and a token after them"
    assert hooks == [{**module._forward_hooks} for module in model.modules()]


@pytest.mark.medium
def test_sentences_of_which_each_has_its_adapter(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    transformers.BertModel(models.bert().config).save_pretrained(tmp_path)
    modules = [Transformer(str(tmp_path)), Pooling(32, pooling_mode="mean")]
    texts = ["a", "a b c d", "a b", "a b c d a b c"]
    for model, verb, output, given in (
        (SentenceTransformer(modules=modules, device="cpu"), "encode", "sentence_embedding", texts),
        (CrossEncoder(str(tmp_path), num_labels=1, device="cpu"), "predict", "scores", [(text, "b") for text in texts]),
    ):
        with_adapters(model, None)
        features = model.preprocess(given)
        assert rows_are_right(model, lambda: model({**features})[output])  # noqa: B023
        with routed(model, NAMES):
            with pytest.raises(AdapterError, match=rf"{verb} of sentence-transformers sorts texts .*model\.preprocess"):
                getattr(model, verb)(given)
            with pytest.warns(UserWarning, match="adapters of a copy"):
                twin = copy.deepcopy(model)
        assert verb not in vars(model)
        assert getattr(model, verb)(given).shape == getattr(twin, verb)(given).shape


def simple() -> nn.Module:
    return with_adapters(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)))  # type: ignore[no-any-return]


def test_an_adapter_of_an_open_block_is_not_changed() -> None:
    model, x = simple(), torch.randn(2, 6)
    with routed(model, ["a", None]):
        before = model(x)
        for verb in (randlora.eject, randlora.merge, partial(randlora.remove, name="a")):
            with pytest.raises(RandLoRAError):
                verb(model)
        assert torch.equal(model(x), before)
        randlora.remove(model, "b")  # which the block does not name
        assert torch.equal(model(x), before)


def test_each_task_has_its_own_blocks_and_code_in_none_of_them_is_refused() -> None:
    model, x = simple(), torch.randn(2, 6)
    alone = each_alone(model, ["a", "b", None], lambda: model(x))
    randlora.activate(model, "b")
    hooks, done = [{**module._forward_pre_hooks} for module in model.modules()], list[str | None]()

    async def task(name: str | None, block: AbstractContextManager[Any]) -> None:
        with block:
            for _ in range(3):
                await asyncio.sleep(0.001)  # the other tasks go on
                torch.testing.assert_close(model(x), alone[name])
                torch.testing.assert_close(await asyncio.to_thread(model, x), alone[name])
            for call in (model, model.get_submodule("0")):
                with pytest.raises(AdapterError, match="open in another thread or task, and none here"):
                    await asyncio.get_running_loop().run_in_executor(None, call, x)
            done.append(name)
            while len(done) < len(alone):  # all blocks are open until then
                await asyncio.sleep(0.001)

    async def together() -> None:
        blocks = {"a": routed(model, ["a", "a"]), "b": routed(model, ["b", "b"]), None: randlora.disabled(model)}
        await asyncio.gather(*(task(name, block) for name, block in blocks.items()))

    asyncio.run(together())
    torch.testing.assert_close(model(x), alone["b"])
    assert hooks == [{**module._forward_pre_hooks} for module in model.modules()]


@pytest.mark.parametrize("is_shared", [True, False])
def test_threads_route_at_the_same_time_in_one_block_or_in_several(is_shared: bool) -> None:
    """Each of several kinds of calls is followed in the thread that is the first to make one."""
    model, x = with_adapters(Arranging(*ARRANGED["tokens first"])), torch.randn(ROWS, ROWS, 6)
    names = [NAMES] * 4 if is_shared else [NAMES[row:] + NAMES[:row] for row in range(ROWS)]
    expected = [row_by_row(model, own, lambda: model(x)) for own in names]
    begun = threading.Barrier(4)

    def wait(*_: Any) -> None:
        begun.wait(60)  # until all are in a call

    model.layer.register_forward_pre_hook(wait)

    def run(own: Names) -> list[Tensor]:
        with nullcontext() if is_shared else routed(model, own):
            return [model(x) for _ in range(3)]

    with routed(model, NAMES) if is_shared else nullcontext(), ThreadPoolExecutor(4) as pool:
        found = [pool.submit(contextvars.copy_context().run, run, own) for own in names]
        for each, wanted in zip(found, expected, strict=True):
            for output in each.result():
                torch.testing.assert_close(output, wanted)


class Checkpointed(nn.Sequential):
    use_reentrant: bool | None = True

    def forward(self, x: Tensor) -> Any:
        run: Any = super().forward
        return run(x) if self.use_reentrant is None else checkpoint(run, x, use_reentrant=self.use_reentrant)


BLOCKS: dict[str, tuple[Names | None, ...]] = {
    "one block": (["a", "b", None],),
    "a block in a block": (["a", "b", None], ["b", None, "b"]),
    "disabled in a block": (["a", "b", None], None),
    "a block in disabled": (None, ["a", "b", None]),
}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_what_backward_computes_again_in_a_thread_of_autograd_is_in_the_innermost_block(blocks: str) -> None:
    """Autograd has a thread for each GPU."""
    model = with_adapters(Checkpointed(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    randlora.set_trainable(model, ["a", "b"])
    parameters, x = randlora.trainable_parameters(model), torch.randn(3, 6, requires_grad=True)

    def gradients(use_reentrant: bool | None) -> list[Tensor]:
        model.use_reentrant = use_reentrant
        with ExitStack() as opened:
            for names in BLOCKS[blocks]:
                opened.enter_context(randlora.disabled(model) if names is None else routed(model, names))
            loss = model(x).square().sum()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in (x, *parameters)]
        x.grad = None
        model.zero_grad()
        return found

    kept = gradients(None)
    for use_reentrant in (True, False):
        torch.testing.assert_close(gradients(use_reentrant), kept)


def test_what_backward_computes_again_is_refused_while_threads_are_in_different_blocks() -> None:
    model, x = with_adapters(Checkpointed(nn.Linear(6, 8), nn.Linear(8, 4))), torch.randn(3, 6, requires_grad=True)
    other = contextvars.copy_context()
    with routed(model, ["a", "b", None]), ThreadPoolExecutor(1) as pool:
        block, loss = randlora.disabled(model), model(x).square().sum()
        other.run(block.__enter__)
        with pytest.raises(AdapterError, match="open in another thread or task"):
            pool.submit(loss.backward).result()
        other.run(block.__exit__, None, None, None)


def test_after_an_interrupt_inside_of_a_layer_the_block_goes_on() -> None:
    model = with_adapters(Arranging(*ARRANGED["tokens first"]))
    x, longer = torch.randn(ROWS, 3, 6), torch.randn(ROWS, 5, 6)
    expected = row_by_row(model, NAMES, lambda: model(longer))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with routed(model, NAMES):
            model(x)
            handle = model.layer.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
            handle.remove()
            torch.testing.assert_close(model(longer), expected)

    with ThreadPoolExecutor() as pool:  # the thread counts the interrupted call as running, so it is not this one
        pool.submit(run).result()


def test_generate_in_several_blocks_at_once_leaves_the_method_as_it_was() -> None:
    model, ids = with_adapters(models.llama()), torch.randint(3, 60, (2, 5))
    options: Any = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2}
    alone = each_alone(model, "ab", lambda: model.generate(ids, **options).tolist())
    opened = [(name, contextvars.copy_context(), routed(model, [name] * 2)) for name in "ab"]
    for _, context, block in opened:
        context.run(block.__enter__)
    for name, context, block in opened:  # the first ends before the second
        assert context.run(model.generate, ids, **options).tolist() == alone[name]
        context.run(block.__exit__, None, None, None)
    assert "generate" not in vars(model)


def test_a_model_that_generates_without_a_config_of_generation_is_routed() -> None:
    config = transformers.PatchTSMixerConfig(
        context_length=32, prediction_length=4, patch_length=8, patch_stride=8, d_model=8, num_layers=1,
        num_parallel_samples=2, loss="nll",
    )  # fmt: skip
    model, x = with_adapters(transformers.PatchTSMixerForPrediction(config)), torch.rand(ROWS, 32, 1)
    assert not hasattr(model, "generation_config")

    def sampled() -> Tensor:
        torch.manual_seed(0)
        sequences: Tensor = model.generate(x).sequences
        return sequences

    assert rows_are_right(model, sampled)


# What operations do to rows

WEIGHT, FRACTIONS = torch.randn(4, 4), torch.rand(4)
SQUARE = torch.eye(4) * 3 + torch.rand(4, 4)

OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda x: torch.where(x > 0, F.gelu(x) * FRACTIONS, F.hardswish(x - 1)),
    "reduced": lambda x: [x.sum(1), x.mean(), x.amax(0, keepdim=True), x.var(-1), x.logsumexp(2), x.norm(dim=1)],
    "softmax": lambda x: [x.softmax(d) for d in range(3)] + [x.cumsum(1), F.log_softmax(x, -1)],
    "views": lambda x: [x.transpose(0, 2), x.flatten(0, 1), x.flatten(), x.unsqueeze(1), x[:, 1], x[1:], x.mT, x[None]],
    "splits": lambda x: [*x.split(1, 0), *x.chunk(2, 1), *x.unbind(2)],
    "parts": lambda x: [x.diagonal(), x.unfold(1, 2, 1), x.expand(2, -1, -1, -1), F.pad(x, (1, 1, 1, 0, 2, 0))],
    "moved": lambda x: [x.flip(0), x.roll(1, 1), x.roll(5), x.roll(16), x.repeat(2, 1, 1), x.repeat_interleave(2, 1)],
    "joined": lambda x: [
        torch.cat([x, x.flip(0)]),
        torch.cat([x, FRACTIONS.expand(4, 4, 4)], 1),
        torch.stack([x, x], 1),
    ],
    "products": lambda x: [x @ WEIGHT, WEIGHT @ x, x @ x.mT, F.linear(x, WEIGHT, FRACTIONS)],
    "quantized": lambda x: torch.ops.bitsandbytes.int8_vectorwise_quant(x.flatten(0, 1))[0].float(),
    "einsum": lambda x: torch.einsum("abc,adc->abd", x, x),
    "mixed with one": lambda x: [torch.cat([x.mean(0, keepdim=True), x[:1]]).sum(0), x.flip(1)],
    "solved": lambda x: torch.linalg.solve_triangular(SQUARE.triu(), x, upper=True),
    "norms": lambda x: [F.layer_norm(x, (4,)), F.layer_norm(x, (4, 4)), F.group_norm(x, 2), F.instance_norm(x)],
    "batch norm": lambda x: [F.batch_norm(x, None, None, training=True), F.batch_norm(x, FRACTIONS, FRACTIONS + 1)],
    "convolved": lambda x: [F.conv1d(x, torch.ones(2, 4, 3)), F.conv2d(x[:, None], torch.ones(2, 1, 2, 2))],
    "convolved by": lambda x: [F.conv1d(x, x[:2, :, :3]), x[0]],
    "images": lambda x: [F.max_pool1d(x, 2), F.interpolate(x, 8), F.avg_pool1d(x, 2), F.unfold(x[:, None], 2)],
    "halved": lambda x: [F.glu(x, 1), F.glu(x, 0)],
    "indexed": lambda x: [x[[2, 0]], x[[1, 1], [0, 3]], x[:, [2, 2]], x[:, :, torch.tensor([[0, 1]])]],
    "chosen": lambda x: [x[torch.tensor([True, False, True, True])], x.index_select(2, torch.tensor([0, 1]))],
    "gathered": lambda x: [
        x.gather(0, torch.tensor([1, 0, 3, 2]).view(4, 1, 1).expand(4, 4, 4)),
        x.gather(1, torch.zeros(4, 4, 4).long()),
        x.gather(1, torch.zeros(2, 4, 3).long()),
    ],
    "written": lambda x: [
        torch.zeros(6, 4, 4).index_add_(0, torch.tensor([5, 0, 0, 2]), x),
        torch.zeros(4, 9).index_copy(1, torch.arange(4), x[0]),
        torch.zeros(4, 4, 4).index_put((torch.tensor([1, 2]), torch.tensor([0, 0])), x[:2, 0]),
        torch.zeros(4, 5, 4).scatter(1, torch.ones(4, 4, 4).long(), x),
        torch.zeros(8, 4).index_add_(0, torch.arange(4), x[1]),
    ],
    "marked": lambda x: [
        torch.zeros(4, 4, 4).index_put((x > 0.5,), torch.tensor(1.0)),
        _marked(x),
        x.index_put((x[:, :, 0] > 0.5,), torch.tensor(1.0)),
        torch.zeros(4, 4).fill_(x[1, 2, 3]),
    ],
    "of one row": lambda x: [
        torch.linalg.matrix_exp(x[1, :3, :3]),
        (x[:, 2] > -1).nonzero(),
        x[:, 1].take(FRACTIONS.long()),
    ],
    "into parts": lambda x: [_into(x, 0), _into(x, 1), _into(x[:, :, 0], 1), _into(x[2:], 0)],
    "as bits": lambda x: [_as_bits(x), _as_bits(x[1:])],
    "attention": lambda x: [
        F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        F.scaled_dot_product_attention(x[None], x.flip(0)[None], x[None]),
        F.scaled_dot_product_attention(x, x[:1], x[:1]),
    ],
    "others": lambda x: [torch.fft.fft(x).real, x.triu(), F.dropout(x, 0.5), x.masked_fill(FRACTIONS > 2, 0)],
    "same": lambda x: [x.clone().relu_().add_(x), x.to(torch.float64)],
}

CAUTIOUS = ("as bits", "images", "of one row", "solved", "written")
"""Of these, some outputs are said to depend on several rows although each of their entries depends on one."""


def _as_bits(x: Tensor) -> Tensor:
    found = torch.zeros(4, 4, 4)
    found.view(torch.int32)[: len(x)].copy_(x.view(torch.int32))
    return found


def _marked(x: Tensor) -> Tensor:
    found = torch.zeros(4, 4, 4)
    found[:, x[0] > 0.5] = 1
    return found


def _into(x: Tensor, dim: int) -> Tensor:
    found = torch.zeros(*(size + 1 for size in x.shape))
    part = found.narrow(dim, 1, x.shape[dim])
    for other in range(x.dim()):
        if other != dim:
            part = part.narrow(other, 0, x.shape[other])
    part.copy_(x)
    return found


def followed(operation: Callable[[Tensor], Any], x: Tensor, axis: int) -> list[tuple[Tensor, Label | None]]:
    given, tracking = x.clone(), RowTracking()
    tracking.set(given, Label(torch.arange(4).view(*[1] * axis, -1, *[1] * (x.dim() - axis - 1))))
    with tracking:
        found = outputs(operation, given)
    return [(each, tracking.label(each)) for each in found]


def outputs(operation: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    found = operation(x)
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_other_rows_change(operation: str, mode: Any) -> None:
    run, x = OPERATIONS[operation], torch.rand(4, 4, 4)
    for axis in range(3):
        with mode():
            before = followed(run, x, axis)
            counts = [torch.zeros(was.shape) for was, _ in before]
            for row in range(4):
                other = x.clone()
                other.select(axis, row).add_(1 + torch.rand(4, 4))
                for (was, label), now, count in zip(before, outputs(run, other), counts, strict=True):
                    rows = torch.full((1,) * was.dim(), NONE) if label is None else label.rows
                    is_changed = (was - now).abs().gt(1e-6)
                    is_other = ((rows >= NONE) & (rows != row)).expand(was.shape)
                    assert not bool((is_other & is_changed).any()), (axis, row, rows.shape)
                    count.add_(is_changed)
        for (was, label), count in zip(before, counts, strict=True):
            is_known = label is None or not label.is_mixed
            assert is_known or operation in CAUTIOUS or bool((count > 1).any()), (axis, was.shape, "are known")


UNFOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix_exp": torch.linalg.matrix_exp,
    "index": lambda x: x[:, (x[0, 0] * 9).long() % 4],  # which the values of one row choose for all
    "index_put": lambda x: torch.zeros(4, 4).index_put((torch.arange(4), x[:, 0].argmax(-1)), torch.tensor(1.0)),
    "embedding": lambda x: F.embedding(torch.arange(4), x[:, 0]),
    "masked_select": lambda x: x[:, 0].masked_select(torch.ones(4, dtype=torch.bool)),
    "aten::masked_select": lambda x: x[:, 0, 0].masked_select(torch.ones(3, 4, dtype=torch.bool)),
    "foreach": lambda x: (z := torch.zeros(4, 4, 4), torch._foreach_add_([z], [x]))[0],
}


@pytest.mark.parametrize("operation", UNFOLLOWED)
def test_what_an_unknown_operation_or_the_values_of_one_row_give_has_unknown_rows(operation: str) -> None:
    ((_, label),) = followed(UNFOLLOWED[operation], torch.rand(4, 4, 4), 0)
    assert label is not None
    assert label.is_mixed
    assert operation in label.why


def test_what_an_operation_without_a_rule_makes_of_one_row_is_of_that_row() -> None:
    for run in (lambda x: x[2].nonzero(), lambda x: torch.linalg.matrix_exp(x[2])):
        ((_, label),) = followed(run, torch.rand(4, 4, 4), 0)
        assert label is not None
        assert label.rows.tolist() == [[2]]


def test_rows_of_what_is_repeated_take_no_memory_and_a_batch_without_tokens_has_none() -> None:
    ((_, label),) = followed(lambda x: x.repeat(1, 1 << 20, 1 << 20), torch.rand(4, 4, 4, device="meta"), 0)
    assert label is not None
    assert label.rows.shape == (4, 1, 1)
    ((_, label),) = followed(lambda x: x.flatten(0, 1), torch.rand(4, 0, 4), 0)
    assert label is None

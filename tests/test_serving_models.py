"""Rows of batches of real models through their own adapters, in transformers' ``generate``, and of compiled ones."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import randlora
from randlora.errors import AdapterError
from tests.serving import Names, each_alone, with_adapters

pytestmark = pytest.mark.medium
NAMES: Names = ["a", "b", None, "a"]


def one_by_one(model: Any, names: Names, run: Callable[[], Any]) -> list[Any]:
    """Run the whole batch through each adapter, and take the rows of each; ``run`` returns a list of rows."""
    outputs = each_alone(model, names, run)
    return [outputs[name][row] for row, name in enumerate(names)]


def ids(rows: int = 4, tokens: int = 6) -> Tensor:
    return torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(0))


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (transformers.LlamaForCausalLM, SIZES),
    "Mixtral": (transformers.MixtralForCausalLM, SIZES | EXPERTS),
    "GPT-2": (transformers.GPT2LMHeadModel, SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "T5": (transformers.T5ForConditionalGeneration, {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1} | T5),
}


def built(name: str) -> Any:
    kind, options = MODELS[name]
    return with_adapters(kind(kind.config_class(**options)), "all" if name == "Mixtral" else None, r=4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPT-2", {"num_beams": 3}),
        ("Mixtral", {"num_beams": 2, "num_return_sequences": 2}),
        ("Llama", {"cache_implementation": "static", "disable_compile": True}),
        ("GPT-2", {"use_cache": False}),
        ("T5", {"num_beams": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_generate_of_left_padded_rows(name: str, options: dict[str, Any]) -> None:
    model, batch = built(name), ids()
    mask = torch.ones_like(batch)
    if name != "T5":
        mask[1, :2] = mask[3, :3] = 0
        batch[mask == 0] = 0
    each = options.get("num_return_sequences", 1)

    def run(**options: Any) -> list[list[int]]:
        sequences = model.generate(
            batch, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
        )
        return [part.flatten().tolist() for part in sequences.split(each)]

    expected, greedy = one_by_one(model, NAMES, lambda: run(**options)), []
    if each == 1:
        greedy = one_by_one(model, NAMES, run)
    for _ in range(2):  # the second time after a batch of beams
        with randlora.serving.routed(model, NAMES):
            assert run(**options) == expected
            assert each > 1 or run() == greedy


def test_names_given_to_generate_are_refused() -> None:
    model = built("Llama")
    with pytest.raises(AdapterError, match="adapter_names has no effect"):
        model(input_ids=ids(), adapter_names=NAMES)
    with pytest.raises((AdapterError, ValueError), match="adapter_names"):
        model.generate(ids(), adapter_names=NAMES, max_new_tokens=2)
    with randlora.serving.routed(model, NAMES), pytest.raises(AdapterError, match="names for 4 rows"):
        model(input_ids=ids(8))  # twice as many, and not by generate


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return with_adapters(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), r=4)  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_block_runs_uncompiled_compiles_nothing_and_exports_nothing(model: nn.Module, is_whole: bool) -> None:
    counter, x = CompileCounterWithBackend("aot_eager"), torch.randn(4, 8)
    compiled: Any = model
    if is_whole:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
    else:
        for layer in (model.get_submodule("0"), model.get_submodule("2")):
            layer.compile(fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = torch.stack(one_by_one(model, NAMES, lambda: compiled(x)))
        before = counter.frame_count
        for _ in range(2):
            with randlora.serving.routed(model, NAMES), randlora.serving.routed(model, NAMES):
                torch.testing.assert_close(compiled(x), expected)
        compiled(x)
    assert counter.frame_count == before > 0
    with randlora.serving.routed(model, NAMES), pytest.raises(AdapterError, match="cannot be exported or compiled in"):
        torch.export.export(model, (x,), strict=False)


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

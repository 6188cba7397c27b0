"""Rows of batches of real models through their own adapters: forwards and transformers' ``generate``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import randlora
from randlora.errors import AdapterError
from tests.serving import Names, each_alone, with_adapters

pytestmark = pytest.mark.medium
NAMES: Names = ["a", "b", None, "a"]


def one_by_one(model: Any, names: Names, run: Callable[[], Any]) -> list[Any]:
    """Run the whole batch through each adapter, and take the rows of each; ``run`` returns a list of rows."""
    outputs = each_alone(model, names, run)
    return [outputs[name][row] for row, name in enumerate(names)]


def ids(rows: int = 4, tokens: int = 6, *, vocabulary: int = 60) -> Tensor:
    return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "pad_token_id": 0}
DECODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (transformers.LlamaForCausalLM, {}),
    "Mixtral": (
        transformers.MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    "GPT-2": (transformers.GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
}


def decoder(name: str) -> Any:
    """Build a decoder with random weights."""
    kind, options = DECODERS[name]
    torch.manual_seed(0)
    return with_adapters(kind(kind.config_class(**SIZES, **options)), "all" if name == "Mixtral" else None, r=4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in DECODERS),
        ("GPT-2", {"num_beams": 3}),
        ("Mixtral", {"num_beams": 2, "num_return_sequences": 2}),
        ("Llama", {"cache_implementation": "static", "disable_compile": True}),
        ("GPT-2", {"use_cache": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "greedy",
)
def test_generate_of_left_padded_rows(name: str, options: dict[str, Any]) -> None:
    model, batch = decoder(name), ids()
    mask = torch.ones_like(batch)
    mask[1, :2] = mask[3, :3] = 0
    batch[mask == 0] = 0
    each = options.get("num_return_sequences", 1)

    def run() -> list[list[int]]:
        sequences = model.generate(
            batch, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
        )
        return [part.flatten().tolist() for part in sequences.split(each)]

    expected = one_by_one(model, NAMES, run)
    with randlora.serving.routed(model, NAMES):
        assert run() == expected


def test_sampled_sequences_of_each_row() -> None:
    model, batch = decoder("Llama"), ids(2)

    def run(rows: Tensor) -> Tensor:
        torch.manual_seed(0)
        sampled: Tensor = model.generate(
            rows, do_sample=True, num_return_sequences=3, max_new_tokens=4, output_scores=True,
            return_dict_in_generate=True,
        ).scores[0]  # fmt: skip
        return sampled

    expected = one_by_one(model, ["b", "a"], lambda: run(batch).split(3))
    with randlora.serving.routed(model, ["b", "a"]):
        for found, wanted in zip(run(batch).split(3), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def test_encoder_decoder_generates() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, decoder_start_token_id=0, eos_token_id=1)
    model, batch = with_adapters(transformers.T5ForConditionalGeneration(config), r=4), ids()

    def run() -> list[list[int]]:
        generated: list[list[int]] = model.generate(
            batch, max_new_tokens=5, min_new_tokens=5, num_beams=2, do_sample=False
        ).tolist()
        return generated

    expected = one_by_one(model, NAMES, run)
    for _ in range(2):  # the second time after a batch of beams
        with randlora.serving.routed(model, NAMES):
            assert run() == expected
            assert run() == expected


def test_names_given_to_generate_are_refused() -> None:
    model = decoder("Llama")
    with pytest.raises(AdapterError, match="adapter_names has no effect"):
        model(input_ids=ids(), adapter_names=NAMES)
    with pytest.raises((AdapterError, ValueError), match="adapter_names"):
        model.generate(ids(), adapter_names=NAMES, max_new_tokens=2)
    with randlora.serving.routed(model, NAMES), pytest.raises(AdapterError, match="names for 4 rows"):
        model(input_ids=ids(8))  # twice as many, and not by generate

"""What a matrix in a file is taken for."""

import pytest

from randlora.files.kinds import Kind, doubt, kind_of

WEIGHT, WITH_BIAS = ("weight",), ("weight", "bias")


@pytest.mark.parametrize(
    ("fqn", "parameters", "model_type", "expected"),
    [
        ("model.embed_tokens", WEIGHT, "llama", Kind.EMBEDDING),
        ("transformer.wte", WEIGHT, "gpt2", Kind.EMBEDDING),
        ("bert.embeddings.word_embeddings", WEIGHT, "bert", Kind.EMBEDDING),
        ("decoder.embed_positions", WEIGHT, "opt", Kind.EMBEDDING),
        ("gpt_neox.embed_in", WEIGHT, "gpt_neox", Kind.EMBEDDING),
        ("block.0.relative_attention_bias", WEIGHT, "t5", Kind.EMBEDDING),
        ("encoder.embedding_hidden_mapping_in", WITH_BIAS, "albert", Kind.LINEAR),
        ("patch_embedding", WITH_BIAS, None, Kind.LINEAR),
        ("embed_out", WEIGHT, "gpt_neox", Kind.LINEAR),
        ("model.layers.0.mlp.up_proj", WEIGHT, "llama", Kind.LINEAR),
        ("h.0.attn.c_attn", WITH_BIAS, "gpt2", Kind.CONV1D),
        ("h.0.attn.c_attn", WITH_BIAS, "gpt_bigcode", Kind.LINEAR),
        ("score", WEIGHT, "gpt2", Kind.LINEAR),
    ],
)
def test_a_layer_is_told_by_its_name_and_what_it_holds(
    fqn: str, parameters: tuple[str, ...], model_type: str | None, expected: Kind
) -> None:
    assert kind_of(fqn, parameters, (), model_type) is expected


def test_the_output_of_torchs_attention_is_none_that_is_called() -> None:
    assert kind_of("attention.out_proj", WITH_BIAS, ("in_proj_weight",), None) is Kind.ATTENTION_OUTPUT
    assert kind_of("attention.out_proj", WITH_BIAS, (), None) is Kind.LINEAR


@pytest.mark.parametrize("rows", [512, 513, 514])
def test_an_embedding_has_the_rows_of_some_number_of_the_config_or_a_few_more(rows: int) -> None:
    config = {"text_config": {"max_position_embeddings": 512}, "tie_word_embeddings": True}
    assert doubt("embed_positions", Kind.EMBEDDING, (rows, 8), config) is None
    assert doubt("embed_positions", Kind.EMBEDDING, (rows + 3, 8), config) is not None


def test_a_head_may_have_a_row_for_each_word_and_another_layer_may_not() -> None:
    assert doubt("lm_head", Kind.LINEAR, (50, 8), {"vocab_size": 50}) is None
    assert doubt("words", Kind.LINEAR, (50, 8), {"vocab_size": 50}) is not None


def test_without_a_config_nothing_is_compared() -> None:
    assert doubt("embed_positions", Kind.EMBEDDING, (50, 8), {}) is None

"""The order of a model's parts: a file holds tensors by name, a model defines them in the order in which they run."""

ORDER = (
    *("shared", "wte", "wpe", "embed_tokens", "embed_positions", "embed_in", "embeddings", "word_embeddings"),
    *("encoder", "decoder", "h", "layers", "layer", "blocks"),
    *("ln_1", "self_attn", "attn", "attention", "self", "query", "q_proj", "key", "k_proj", "value", "v_proj"),
    *("c_attn", "o_proj", "out_proj", "dense", "LayerNorm", "input_layernorm", "layernorm_before", "layernorm_after"),
    *("ln_2", "intermediate", "output", "mlp", "gate_proj", "up_proj", "c_fc", "fc1", "c_proj", "down_proj", "fc2"),
    *("post_attention_layernorm", "norm", "ln_f", "layernorm", "weight", "bias"),
    *("pooler", "cls", "predictions", "transform", "classifier", "score", "qa_outputs", "lm_head", "embed_out"),
)
"""Names that stand beside one another in common models; others come by the alphabet, before what follows the layers."""

_PLACE = {name: place for place, name in enumerate(ORDER)}
_UNKNOWN = _PLACE["norm"]


def model_order(fqn: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts fully qualified names as a model of a common kind defines them; numbers count."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (_PLACE.get(part, _UNKNOWN), 0, part) for part in fqn.split(".")
    )

"""The layers adapted by default, by ``model.config.model_type``, and the names of output heads.

The defaults for language models are those of PEFT 0.21.2 for LoRA and RandLoRA, mostly the query and value projections,
so that both libraries adapt the same layers.
"""

_Q_V_PROJ = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

TARGET_PRESETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(
        ("bart", "clip", "gemma", "gemma2", "gemma3_text", "gemma3", "gpt_neo", "gptj", "llama", "llama4", "mbart"),
        _Q_V_PROJ,
    ),
    **dict.fromkeys(
        ("mistral", "mixtral", "olmo", "olmo2", "opt", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "siglip"), _Q_V_PROJ
    ),
    **dict.fromkeys(("smollm3", "stablelm", "starcoder2", "wav2vec2", "whisper"), _Q_V_PROJ),
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "layoutlm", "vit", "deit", "beit", "dinov2"),
        _QUERY_VALUE,
    ),
    **dict.fromkeys(("vit", "deit", "beit", "dinov2"), (*_QUERY_VALUE, *_Q_V_PROJ)),  # renamed in transformers 5
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"), _FUSED),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "t5": ("q", "v"),
}
"""Suffixes (or a regex) of the layers adapted by default; an entry may name layers of only some variants."""

HEAD_NAMES = frozenset({"classifier", "embed_out", "head", "heads", "lm_head", "qa_outputs", "score"})
"""Names of a model's direct children that are output heads."""

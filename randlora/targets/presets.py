"""The names of layers adapted by default, by ``model.config.model_type`` or shared by many models, and of output heads.

The presets are those of PEFT 0.21.2 for LoRA and RandLoRA, mostly the query and value projections, so that both
libraries adapt the same layers; and a few for models with names of their own.
"""

TARGET_PRESETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama"), ("q_proj", "v_proj")),
    **dict.fromkeys(("llama4", "mistral", "mixtral", "opt", "qwen2", "qwen3", "stablelm"), ("q_proj", "v_proj")),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), ("query", "value")),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(  # as `LANGUAGE_MODEL`, under a name that the encoders of CLIP and its kin have too
        ("granite_docling", "idefics2", "idefics3", "kosmos-2", "kosmos-2.5", "smolvlm"),
        r".*text_model\..*\.(q_proj|v_proj)",
    ),
    "bark": ("att_proj",),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "cpmant": ("project_q", "project_v"),
    "ctrl": ("Wq", "Wv"),
    "cvt": ("projection_query", "projection_value"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "funnel": ("q_head", "v_head"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "levit": r".*\.(queries|keys_values|queries_keys_values)\.linear",
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi4_multimodal": ("qkv_proj",),  # of its language model
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "t5": ("q", "v"),
}
"""Suffixes (or a regex) of the layers adapted by default; an entry may name layers of only some variants."""

TRANSFORMERS_NAMES = (
    *("q_proj", "v_proj", "query", "value", "q", "v", "query_proj", "value_proj", "q_lin", "v_lin"),
    *("linear_q", "linear_v", "to_q", "to_v"),
    *("qkv_proj", "qkv", "query_key_value", "Wqkv", "c_attn", "kv_proj", "to_kv"),  # of several at once
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # each as a product of two
    *("in_proj_qkv", "in_proj_qkvz"),  # of linear attention
)
"""Names that two or more of transformers' models have for their query and value projections."""

DIFFUSERS_NAMES = (
    *("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_qkv", "to_kv", "to_added_qkv", "to_qkv_mlp_proj", "to_query", "to_key", "to_value"),
    *("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_qkv_proj", "txt_kv_proj"),
    *("query", "key", "value", "proj_attn"),
)
"""Names that diffusers' models have for their attention projections, outputs included, as its scripts train them."""

LANGUAGE_MODEL = "language_model"
"""The name of the module in transformers' multimodal models that reads what the encoders give, and writes text."""

HEAD_NAMES = frozenset({"classifier", "embed_out", "head", "heads", "lm_head", "qa_outputs", "score"})
"""Names of a model's direct children that are output heads."""

NEW_HEADS = HEAD_NAMES & {"classifier", "head", "heads", "qa_outputs", "score"}
"""Those of heads that are usually new, with random values, for a task of one's own."""

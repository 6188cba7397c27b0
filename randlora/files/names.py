"""From the names in a checkpoint to the names in a model.

They are mostly the same. transformers 5 renamed the layers of some models and goes on writing the old names to disk;
and a checkpoint of a bare model lacks the prefix that a model with a head puts before it, as the first GPT-2's does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from randlora.files.model_directory import ModelDirectory

Renames = tuple[tuple[str, str], ...]

_VIT: Renames = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.query", "q_proj"),
    (r"attention\.key", "k_proj"),
    (r"attention\.value", "v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
_DINOV2: Renames = (
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
)
_SELF_ATTENTION: Renames = (
    (r"attention\.self\.query\.", "attention.q_proj."),
    (r"attention\.self\.key\.", "attention.k_proj."),
    (r"attention\.self\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)
_SWIN: Renames = (
    *_SELF_ATTENTION,
    (r"attention\.self\.(relative_position_bias_table)", r"attention.relative_position_bias.\1"),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
)
_SEGFORMER: Renames = (
    (r"encoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"encoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"encoder\.layer_norm\.(\d+)", r"stages.\1.layer_norm"),
    *_SELF_ATTENTION,
    (r"attention\.self\.sr\.", "attention.sequence_reduction.sequence_reduction."),
    (r"attention\.self\.layer_norm\.", "attention.sequence_reduction.layer_norm."),
    (r"mlp\.dense([12])\.", r"mlp.fc\1."),
    (r"layer_norm_1\.", "layernorm_before."),
    (r"layer_norm_2\.", "layernorm_after."),
    (r"decode_head\.linear_c\.", "decode_head.linear_projections."),
)
_LLAVA: Renames = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|vision_model|multi_modal_projector|image_newline)\b", r"model.\1"),
)
_QWEN2_VL: Renames = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
RENAMES: dict[str, Renames] = {
    **dict.fromkeys(("vit", "deit", "beit", "vit_mae", "vit_msn", "ijepa"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    **dict.fromkeys(("aya_vision", "gemma3", "internvl", "llava", "llava_next", "llava_next_video"), _LLAVA),
    **dict.fromkeys(("llava_onevision", "mistral3", "mllama", "paligemma", "vipllava"), _LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL),
    "swin": _SWIN,
    "segformer": _SEGFORMER,
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
}
"""What transformers 5 does to the names in a file, by model type: patterns, replaced in this order."""

_OLD_NORMS: Renames = ((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias"))

BASE_PREFIXES: dict[str, str] = {
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt"), "transformer"),
    **{
        name: name for name in ("bert", "electra", "distilbert", "roberta", "vit", "deit", "beit", "dinov2", "gpt_neox")
    },
    **dict.fromkeys(("camembert", "xlm-roberta"), "roberta"),
    **dict.fromkeys(("deberta", "deberta-v2"), "deberta"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "olmo", "olmo2"), "model"),
    **dict.fromkeys(("opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "model"),
    **dict.fromkeys(("smollm3", "stablelm", "starcoder2"), "model"),
}
"""The name under which a model with a head holds the bare model, by model type."""

_WITH_A_HEAD = re.compile(r"For[A-Z]|(LMHead|DoubleHeads)Model$")


@dataclass(frozen=True)
class Naming:
    """A way to name the parameters of a model after the tensors of a checkpoint.

    Attributes:
        renames: Patterns and what takes their place, in order.
        added: A prefix that the model has and the files lack, with its dot.
        dropped: A prefix that the files have and the model lacks, with its dot.
    """

    renames: Renames = ()
    added: str = ""
    dropped: str = ""

    def fqn(self, name: str) -> str:
        """Return the parameter's name in the model."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return self.added + name.removeprefix(self.dropped)


def namings(directory: ModelDirectory) -> Iterator[Naming]:
    """Go through the ways in which the model's own names may follow from those in the files.

    The first is that of the class which ``config.json`` names, in transformers 5. The others are those of earlier
    versions, and of the same model with a head or without: an adapter may have been trained on either.
    """
    model_type = directory.model_type or ""
    prefix = f"{BASE_PREFIXES[model_type]}." if model_type in BASE_PREFIXES else ""
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in directory.entries)
    wants_prefix = _WITH_A_HEAD.search(directory.architecture) is not None
    other = Naming(dropped=prefix) if has_prefix else Naming(added=prefix)
    is_other_first = bool(directory.architecture) and wants_prefix != has_prefix
    for renames in dict.fromkeys((RENAMES.get(model_type, ()), ())):
        for naming in (other, Naming()) if is_other_first else (Naming(), other):
            yield Naming((*renames, *_OLD_NORMS), naming.added, naming.dropped)

"""Classes of transformers, each built from its default config with sizes cut down: a few thousand weights to save."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TASKS = {
    "causal LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "vision": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "encoder and decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def _each(names: str, size: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


LAYERS = _each("num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers", 2)
LAYERS |= _each("num_decoder_layers decoder_num_layers num_hidden_groups", 2)
WIDE = {
    "vocab_size": 128,
    **_each("intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim", 96),
    **_each("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 48),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_k moe_topk", 2),
    **_each("n_group topk_group", 1),
    **_each("max_position_embeddings n_positions n_ctx", 64),
    **_each("pad_token_id bos_token_id eos_token_id decoder_start_token_id sep_token_id", 1),
}
HEADS = {
    **_each("hidden_size d_model n_embd dim embedding_size word_embed_proj_dim", 64),
    **_each("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads", 4),
    "num_key_value_heads": 2,
}
SIDES = HEADS | _each("head_dim d_kv", 16)
CUTS = (LAYERS | WIDE | SIDES, LAYERS | WIDE | HEADS, LAYERS | WIDE, LAYERS)
"""What is cut down, the most first: a config may refuse some sizes beside others of its own."""


def classes() -> Iterator[tuple[str, str, str]]:
    seen = set()
    for task, names in TASKS.items():
        for model_type, found in names.items():
            name = found if isinstance(found, str) else found[0]
            if name not in seen:
                seen.add(name)
                yield task, model_type, name


def _of_type(model_type: str, names: Iterable[str], cuts: Iterable[Any]) -> Iterator[tuple[Any, Any, nn.Module]]:
    for name, sizes in product(names, cuts):
        try:
            model_class, config = getattr(transformers, name), cut(CONFIG_MAPPING[model_type], sizes)
            with torch.device("meta"):
                model = model_class(config)
        except Exception:  # some sizes do not go together, and some classes need another library
            continue
        yield model_class, config, model.eval()


def tiny(model_type: str, name: str) -> nn.Module | None:
    """Build a class with few weights; ``None`` where no cut of its config gives any."""
    for model_class, config, model in _of_type(model_type, [name], CUTS):
        if sum(parameter.numel() for parameter in model.parameters()) <= 12_000_000:
            with suppress(Exception):
                found: nn.Module = model_class(config).eval()
                return found
    return None


def on_meta(model_type: str, names: Iterable[str]) -> Iterator[nn.Module]:
    """Build the classes of a type that can be built, each with fewer layers and then as its config is by default."""
    return (model for _, _, model in _of_type(model_type, names, (*CUTS, {})))


def every_type() -> dict[str, list[str]]:
    """Return the names of every type's classes that one of transformers' auto classes builds; the best known first."""
    found: dict[str, list[str]] = {}
    for mapping in (name for name in vars(modeling_auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", name)):
        for model_type, names in getattr(modeling_auto, mapping).items():
            known = found.setdefault(model_type, [])
            known += [name for name in ([names] if isinstance(names, str) else names) if name not in known]
    return {model_type: names for model_type, names in found.items() if model_type in CONFIG_MAPPING}


def cut(config_class: Any, sizes: dict[str, int]) -> Any:
    default = config_class()
    inner = {
        key: cut(type(found), sizes).to_dict()
        for key in config_class.sub_configs
        if (found := getattr(default, key, None)) is not None
    }
    own = {key: size for key, size in sizes.items() if isinstance(getattr(default, key, None), int)}
    return config_class(**own, **inner)

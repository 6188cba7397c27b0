"""The layers adapted if no targets are given: a preset, else attention, by names that models share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from randlora.config import Pattern
from randlora.targets.left_out import LINEAR_KINDS
from randlora.targets.match import matches
from randlora.targets.obstacles import tied_names
from randlora.targets.walk import Census, Visit

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
"""Names of query and value projections that two or more models of transformers share."""

DIFFUSERS_NAMES = (
    *("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_qkv", "to_kv", "to_added_qkv", "to_qkv_mlp_proj", "to_query", "to_key", "to_value"),
    *("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_qkv_proj", "txt_kv_proj"),
    *("query", "key", "value", "proj_attn"),
)
"""Names of attention projections in diffusers' models, including outputs, as in its training scripts."""

LANGUAGE_MODEL = "language_model"
"""The name of the module in transformers' multimodal models that reads the encoders' outputs and writes text."""

HEAD_NAMES = frozenset({"classifier", "embed_out", "head", "heads", "lm_head", "qa_outputs", "score"})
"""Names of a model's direct children that are output heads."""

NEW_HEADS = HEAD_NAMES & {"classifier", "head", "heads", "qa_outputs", "score"}
"""Names of heads that are usually new, with random values, for the user's task."""


def default_targets(census: Census) -> tuple[Pattern, str] | None:
    """Return the pattern of the layers adapted by default, and what it selects; ``None`` if no attention is found.

    Attention also counts as not found if none of its layers can be adapted, because each is tied to another layer or
    is not called, so that an adapter would have no effect.

    Only models of transformers (which have a ``config.model_type``) and of diffusers have a default: elsewhere, a layer
    named ``value`` may be anything.
    """
    default = _by_names(census)
    if default is None:
        return None
    keys = {visit.key for visit in census.candidates if matches(default[0], visit.fqn, visit.module) and visit.entry}
    tied = tied_names(census, [site for site in census.sites if site.key in keys])
    return None if keys and census.uncalled.keys() | tied.keys() >= keys else default


def _by_names(census: Census) -> tuple[Pattern, str] | None:
    model_type = getattr(getattr(census.model, "config", None), "model_type", None)
    if model_type in TARGET_PRESETS:
        preset = TARGET_PRESETS[model_type]
        names = preset if isinstance(preset, str) else ", ".join(preset)
        return preset, f"the preset of model_type {model_type!r} ({names})"
    if isinstance(model_type, str):
        what = "the query and value projections"
        visits: Sequence[Visit] = [visit for visit in census.visits if LANGUAGE_MODEL in visit.fqn.split(".")]
        if visits:
            return _named(visits, TRANSFORMERS_NAMES, f"{what} of {LANGUAGE_MODEL}")
        return _named(census.visits, TRANSFORMERS_NAMES, what)
    if _is_of_diffusers(census.model):
        visits = [visit for visit in census.visits if "time" not in visit.fqn]  # some embed it by attention
        return _named(visits, DIFFUSERS_NAMES, "the attention projections")
    return None


def is_linear(visit: Visit) -> bool:
    """Whether a module or weight is, or looks like, a linear layer or a projection of attention."""
    entry = visit.entry
    return isinstance(entry, str) or (entry is not None and entry.kind in LINEAR_KINDS)


def _is_of_diffusers(model: nn.Module) -> bool:
    """Whether a model's class derives from one of diffusers, whose configs name no type."""
    return any(base.__module__.partition(".")[0] == "diffusers" for base in type(model).__mro__)


def _named(visits: Iterable[Visit], names: Sequence[str], what: str) -> tuple[Pattern, str] | None:
    """Return the pattern and the rule of the linear layers that have one of some names, or lie in a module that has."""
    found = {visit.fqn: visit.fqn.split(".")[-2:] for visit in visits if is_linear(visit)}
    chosen = {fqn for fqn, ending in found.items() if not set(names).isdisjoint(ending)}
    if not chosen:
        return None
    present = [name for name in names if any(name in found[fqn] for fqn in chosen)]
    return lambda fqn, _module: fqn in chosen, f"{what} ({', '.join(present)})"

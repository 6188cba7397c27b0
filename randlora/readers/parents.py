"""Modules that read or change the weight of a linear layer inside them, by qualified name of their class.

An adapter that acts when its layer is called would silently do nothing there. The layer is adapted so that the parent's
forward reads weight + update (`AdapterLayer.as_read`) or, if no adapter would be right, refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from randlora.errors import AdapterError
from randlora.layers.in_place import adapter_layers_of, plain_class
from randlora.layers.registry import FINDERS, Reading, Verdict, qualified_names
from randlora.model.install import CHECKS

NO_EFFECT = "so an adapter would have no effect"
KERNELS = "when the kernels of mamba-ssm are used"
WITHOUT_GRADIENTS = "has no gradient, because {} reads its weight under torch.no_grad, so an adapter could not train"
CHOOSES = "is left out, because {} chooses tokens under torch.no_grad, so an adapter of it could not be trained"
BY_METHOD = f"is read by a method of {{}} that its pipeline calls outside of any call of a module, {NO_EFFECT}"
UNUSED = f"is never used by {{}}, {NO_EFFECT}"
DIVIDED = (
    "is in a {}, whose weights the model divides in place in eval() without dividing the update: load the model with "
    "rescale_every=0 in its config, which computes the same"
)


class Parent(NamedTuple):
    """Linear layers whose weight their owner reads or changes."""

    children: tuple[str, ...]  # their names in the owner
    when: str = ""  # when it does so, if not always
    where: Callable[[Any], bool] = lambda _owner: True  # whether it reads or changes them, given the owner
    problem: str = ""  # why no adapter of them is right, as a phrase after their name; empty if it may act where read


def _sums_slowly(owner: Any) -> bool:
    return bool(owner.pretraining_tp > 1 and owner.slow_but_exact)


def _divides(block: Any) -> bool:
    every = block.config.rescale_every
    return bool(every > 0 and block.layer_id >= every)  # else it divides by one


def _qualified(name: str) -> str:
    """Return the qualified name of a class: ``wavlm:TDNNLayer`` is one of transformers."""
    file, separator, kind = name.partition(":")
    folder, _, other = file.partition(".")
    return f"transformers.models.{folder}.modeling_{other or folder}.{kind}" if separator else name


# Without a library: of transformers, by the file's name and the class. Subclasses are meant too: whether a forward that
# they have themselves calls the layer cannot be told.
_BY_NAMES: dict[tuple[str, ...], tuple[Parent, ...]] = {
    ("torch.nn.modules.activation.MultiheadAttention",): (Parent(("out_proj",)),),
    (
        "torchvision.models.swin_transformer.ShiftedWindowAttention",
        "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d",
    ): (Parent(("qkv", "proj")),),
    ("open_clip.modified_resnet.AttentionPool2d", "diffusers.models.embeddings.HunyuanDiTAttentionPool"): (
        Parent(("q_proj", "k_proj", "v_proj", "c_proj")),
    ),
    (
        "timm.models.beit.Attention",
        "timm.models.eva.EvaAttention",
        "timm.models.swin_transformer_v2.WindowAttention",
    ): (Parent(("qkv",), where=lambda owner: owner.q_bias is not None and not owner.qkv_bias_separate),),
    ("timm.models.naflexvit.NaFlexEmbeds",): (Parent(("proj",), "for patches of several sizes"),),
    ("diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioCausalAttention",): (
        Parent(("qkv",)),
    ),
    ("diffusers.pipelines.ace_step.modeling_ace_step._AceStepResidualFSQ",): (
        Parent(("project_in",)),
        Parent(("project_out",), problem=BY_METHOD),
    ),
    ("diffusers.pipelines.shap_e.renderer.ChannelsProj",): (Parent(("proj",)),),
    ("sentence_transformers.sparse_encoder.modules.sparse_auto_encoder.SparseAutoEncoder",): (Parent(("encoder",)),),
    ("wavlm:WavLMAttention",): (Parent(("q_proj", "k_proj", "v_proj", "out_proj")),),
    (
        *("data2vec.data2vec_audio:TDNNLayer", "unispeech_sat:TDNNLayer", "wav2vec2:TDNNLayer"),
        *("wav2vec2_bert:TDNNLayer", "wav2vec2_conformer:TDNNLayer", "wavlm:TDNNLayer"),
    ): (Parent(("kernel",)),),
    (
        "conditional_detr:ConditionalDetrMHAttentionMap",
        "detr:DetrMHAttentionMap",
        "maskformer:MaskFormerDetrMHAttentionMap",
    ): (Parent(("k_proj",)),),
    ("dab_detr:DabDetrMHAttentionMap",): (Parent(("k_linear",)),),
    ("layoutlmv2:LayoutLMv2Encoder", "layoutlmv3:LayoutLMv3Encoder"): (
        Parent(("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"), problem=WITHOUT_GRADIENTS),
    ),
    ("pp_doclayout_v2:PPDocLayoutV2ReadingOrderEncoder",): (
        Parent(("rel_pos_bias",), problem=WITHOUT_GRADIENTS),
        Parent(("rel_pos_x_bias", "rel_pos_y_bias"), problem=UNUSED),
    ),
    ("gemma3n:Gemma3nTextAltUp",): (
        Parent(
            ("correction_coefs", "prediction_coefs"),  # it clamps the second in place, which a frozen weight is spared
            "in training",
            lambda owner: owner.config.altup_coef_clip is not None,
        ),
    ),
    ("rwkv:RwkvBlock",): (Parent(("attention.output", "feed_forward.value"), where=_divides, problem=DIVIDED),),
    ("gemma4_assistant:Gemma4AssistantForCausalLM", "gemma4_unified_assistant:Gemma4UnifiedAssistantForCausalLM"): (
        Parent(("lm_head",), where=lambda owner: owner.masked_embedding is not None),
    ),
    ("longcat_flash:LongcatFlashTopkRouter",): (Parent(("classifier",)),),
    ("mobilebert:MobileBertLMPredictionHead",): (Parent(("decoder", "dense")),),
    ("neomme:NeoMMEForMaskedLM",): (Parent(("unembedding_projection",)),),
    ("falcon_mamba:FalconMambaMixer", "mamba:MambaMixer"): (
        Parent(("dt_proj",)),
        Parent(("x_proj", "out_proj"), KERNELS),
    ),
    ("jamba:JambaMambaMixer",): (Parent(("dt_proj",)),),
    (
        *("bamba:BambaMixer", "falcon_h1:FalconH1Mixer", "granitemoehybrid:GraniteMoeHybridMambaLayer"),
        *("mamba2:Mamba2Mixer", "nemotron_h:NemotronHMamba2Mixer", "zamba2:Zamba2MambaMixer"),
    ): (Parent(("out_proj",), KERNELS),),
    ("reformer:LSHSelfAttention",): (Parent(("query_key", "value"), "when it generates with a cache"),),
    ("bloom:BloomAttention",): (Parent(("dense",), where=_sums_slowly),),
    ("bloom:BloomMLP",): (Parent(("dense_4h_to_h",), where=_sums_slowly),),
}
PARENTS = {_qualified(name): parents for names, parents in _BY_NAMES.items() for name in names}

WITHOUT_GRADIENT = {
    *(_qualified(f"{name}Indexer") for name in ("axk2:AXK2", "deepseek_v32:DeepseekV32", "dots3_note:Dots3NoteText")),
    *(_qualified(f"{name}Indexer") for name in ("glm5_next:Glm5NextText", "glm_moe_dsa:GlmMoeDsa", "hy_v4:HYV4")),
    *(_qualified(f"{name}Indexer") for name in ("hy_v4_vl:HYV4VL", "mistral_large4:MistralLarge4Text")),
}
"""Modules whose forward runs without gradients. Rules leave out the layers inside them; naming a layer adapts it."""


def _readings_in(owner: nn.Module) -> list[Reading]:
    """Return the modules inside an owner whose weight it reads or changes, or that it leaves out."""
    found, kinds = [], qualified_names(type(owner))
    if not WITHOUT_GRADIENT.isdisjoint(kinds):
        reason = CHOOSES.format(plain_class(owner).__name__)
        found += [Reading(child, reason, "untrained") for child in owner.children()]
    for kind in filter(PARENTS.__contains__, kinds):
        found += _readings_by(owner, PARENTS[kind])
    if any(name in owner._modules for name in JOINED):
        found += [Reading(child, f"{reason}, {NO_EFFECT}", "never") for _, child, reason in _left_by_joining(owner)]
    return found


FINDERS.append(_readings_in)


def _readings_by(owner: nn.Module, readings: Iterable[Parent]) -> Iterator[Reading]:
    name = plain_class(owner).__name__
    for reading in readings:
        if reading.where(owner):
            when = f"is not called {reading.when}" if reading.when else "is never called"
            reason = reading.problem.format(name) or f"{when}, because {name} reads its weight, {NO_EFFECT}"
            verdict: Verdict = "never" if reading.problem else "only where read"
            found = (_child(owner, child) for child in reading.children)
            yield from (Reading(child, reason, verdict) for child in found if child is not None)


def _child(owner: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = owner
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


ATTENTION = "diffusers.models.attention.AttentionModuleMixin"
OLDER_ATTENTION = "diffusers.models.attention_processor.Attention"

JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""The names of joined projections, and of the layers that they are made of."""


def _can_join(module: nn.Module) -> bool:
    """Whether a module is an attention of diffusers."""
    return not {ATTENTION, OLDER_ATTENTION}.isdisjoint(qualified_names(type(module)))


def _left_by_joining(attention: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the projections that an attention does not call since they were joined or separated: name, module, why."""
    held = attention._modules
    if not _can_join(attention):
        return
    is_older = OLDER_ATTENTION in qualified_names(type(attention))  # which keeps joined ones after they are separated
    is_fused = type(attention.processor).__name__.startswith("Fused") if is_older else attention.fused_projections
    for joined, parts in JOINED.items():
        if all(held.get(name) is not None for name in (joined, *parts)):
            unused, used = (parts, joined) if is_fused else ((joined,), ", ".join(parts))
            reason = f"is not called, because {plain_class(attention).__name__} calls {used} instead"
            yield from ((name, held[name], reason) for name in unused)


def require_called(attention: nn.Module, args: Any) -> None:  # noqa: ARG001  # a hook's signature
    """Raise an error if an attention does not call its adapted projections any more; a forward pre-hook."""
    for name, child, reason in _left_by_joining(attention):
        if adapter_layers_of(child):
            raise AdapterError(
                f"{name} is adapted and {reason}: undo fuse_qkv_projections() or unfuse_qkv_projections(), which was "
                "called after adapting, or eject the adapters first and adapt the layers that are called"
            )


CHECKS[require_called] = _can_join

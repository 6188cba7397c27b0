"""Modules that read or change the weight of a linear layer inside them, by qualified name of their class.

An adapter that acts when its layer is called would be a silent no-op where the weight is read. Such a layer is adapted
so that the parent's forward reads weight + update (`AdapterLayer.as_read`, `randlora.layers.scopes`), or, where no
adapter would be right, refused with the reason.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from randlora.layers.in_place import plain_class
from randlora.layers.joined import left_by_joining

TRANSFORMERS = "transformers.models"
NO_EFFECT = "so an adapter would have no effect"
KERNELS = "when the kernels of mamba-ssm are used"
WITHOUT_GRADIENTS = "has no gradient, because {} reads its weight under torch.no_grad, so an adapter could not train"
CHOOSES = "is left out, because {} chooses tokens under torch.no_grad, and an adapter of it could not be trained"
UNUSED = f"is never used by {{}}, {NO_EFFECT}"
DIVIDED = (
    "is in a {} whose weights the model divides in place in eval(), and would not divide the update: load the model "
    "with rescale_every=0 in its config, which computes the same"
)


class Reading(NamedTuple):
    """Linear layers whose weight their owner reads or changes.

    Attributes:
        children: Their names in the owner.
        when: When it does, if not always.
        where: Whether it does, given the owner.
        problem: Why no adapter of them is right, as a phrase after their name; empty if an adapter that acts on the
            weight as it is read is right.
    """

    children: tuple[str, ...]
    when: str = ""
    where: Callable[[Any], bool] = lambda _owner: True
    problem: str = ""


def _joins_biases(owner: Any) -> bool:
    return owner.q_bias is not None and not owner.qkv_bias_separate


def _divides(block: Any) -> bool:
    every = block.config.rescale_every
    return bool(every > 0 and block.layer_id >= every)  # else it divides by one


PARENTS: dict[str, tuple[Reading, ...]] = {
    # of a subclass too: whether a forward of its own calls it cannot be told
    "torch.nn.modules.activation.MultiheadAttention": (Reading(("out_proj",)),),
    **dict.fromkeys(
        (
            "torchvision.models.swin_transformer.ShiftedWindowAttention",
            "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d",
        ),
        (Reading(("qkv", "proj")),),
    ),
    **dict.fromkeys(
        ("open_clip.modified_resnet.AttentionPool2d", "diffusers.models.embeddings.HunyuanDiTAttentionPool"),
        (Reading(("q_proj", "k_proj", "v_proj", "c_proj")),),
    ),
    **dict.fromkeys(
        (
            "timm.models.beit.Attention",
            "timm.models.eva.EvaAttention",
            "timm.models.swin_transformer_v2.WindowAttention",
        ),
        (Reading(("qkv",), where=_joins_biases),),
    ),
    "timm.models.naflexvit.NaFlexEmbeds": (Reading(("proj",), "for patches of several sizes"),),
    f"{TRANSFORMERS}.wavlm.modeling_wavlm.WavLMAttention": (Reading(("q_proj", "k_proj", "v_proj", "out_proj")),),
    **dict.fromkeys(
        (
            f"{TRANSFORMERS}.{model}.modeling_{file}.TDNNLayer"
            for model, file in (
                ("data2vec", "data2vec_audio"),
                *((name, name) for name in ("unispeech_sat", "wav2vec2", "wav2vec2_bert")),
                *((name, name) for name in ("wav2vec2_conformer", "wavlm")),
            )
        ),
        (Reading(("kernel",)),),
    ),
    **dict.fromkeys(
        (
            f"{TRANSFORMERS}.conditional_detr.modeling_conditional_detr.ConditionalDetrMHAttentionMap",
            f"{TRANSFORMERS}.detr.modeling_detr.DetrMHAttentionMap",
            f"{TRANSFORMERS}.maskformer.modeling_maskformer.MaskFormerDetrMHAttentionMap",
        ),
        (Reading(("k_proj",)),),
    ),
    f"{TRANSFORMERS}.dab_detr.modeling_dab_detr.DabDetrMHAttentionMap": (Reading(("k_linear",)),),
    **dict.fromkeys(
        (
            f"{TRANSFORMERS}.layoutlmv2.modeling_layoutlmv2.LayoutLMv2Encoder",
            f"{TRANSFORMERS}.layoutlmv3.modeling_layoutlmv3.LayoutLMv3Encoder",
        ),
        (Reading(("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"), problem=WITHOUT_GRADIENTS),),
    ),
    f"{TRANSFORMERS}.pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2ReadingOrderEncoder": (
        Reading(("rel_pos_bias",), problem=WITHOUT_GRADIENTS),
        Reading(("rel_pos_x_bias", "rel_pos_y_bias"), problem=UNUSED),
    ),
    f"{TRANSFORMERS}.gemma3n.modeling_gemma3n.Gemma3nTextAltUp": (
        Reading(
            ("correction_coefs", "prediction_coefs"),  # it clamps the second in place, which a frozen weight is spared
            "in training",
            lambda owner: owner.config.altup_coef_clip is not None,
        ),
    ),
    f"{TRANSFORMERS}.rwkv.modeling_rwkv.RwkvBlock": (
        Reading(("attention.output", "feed_forward.value"), where=_divides, problem=DIVIDED),
    ),
    **{
        f"{TRANSFORMERS}.{name}.modeling_{name}.{kind}ForCausalLM": (
            Reading(("lm_head",), where=lambda owner: owner.masked_embedding is not None),
        )
        for name, kind in (
            ("gemma4_assistant", "Gemma4Assistant"),
            ("gemma4_unified_assistant", "Gemma4UnifiedAssistant"),
        )
    },
    "diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioCausalAttention": (Reading(("qkv",)),),
    "diffusers.pipelines.ace_step.modeling_ace_step._AceStepResidualFSQ": (Reading(("project_in", "project_out")),),
    "diffusers.pipelines.shap_e.renderer.ChannelsProj": (Reading(("proj",)),),
    "sentence_transformers.sparse_encoder.modules.sparse_auto_encoder.SparseAutoEncoder": (Reading(("encoder",)),),
    f"{TRANSFORMERS}.longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter": (Reading(("classifier",)),),
    f"{TRANSFORMERS}.mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": (Reading(("decoder", "dense")),),
    f"{TRANSFORMERS}.neomme.modeling_neomme.NeoMMEForMaskedLM": (Reading(("unembedding_projection",)),),
    **dict.fromkeys(
        (
            f"{TRANSFORMERS}.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer",
            f"{TRANSFORMERS}.mamba.modeling_mamba.MambaMixer",
        ),
        (Reading(("dt_proj",)), Reading(("x_proj", "out_proj"), KERNELS)),
    ),
    f"{TRANSFORMERS}.jamba.modeling_jamba.JambaMambaMixer": (Reading(("dt_proj",)),),
    **dict.fromkeys(
        (
            f"{TRANSFORMERS}.bamba.modeling_bamba.BambaMixer",
            f"{TRANSFORMERS}.falcon_h1.modeling_falcon_h1.FalconH1Mixer",
            f"{TRANSFORMERS}.granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer",
            f"{TRANSFORMERS}.mamba2.modeling_mamba2.Mamba2Mixer",
            f"{TRANSFORMERS}.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer",
            f"{TRANSFORMERS}.zamba2.modeling_zamba2.Zamba2MambaMixer",
        ),
        (Reading(("out_proj",), KERNELS),),
    ),
    f"{TRANSFORMERS}.reformer.modeling_reformer.LSHSelfAttention": (
        Reading(("query_key", "value"), "when it generates with a cache"),
    ),
    **{
        f"{TRANSFORMERS}.bloom.modeling_bloom.{owner}": (
            Reading((child,), where=lambda owner: owner.pretraining_tp > 1 and owner.slow_but_exact),
        )
        for owner, child in (("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h"))
    },
}


WITHOUT_GRADIENT = frozenset(
    f"{TRANSFORMERS}.{name}.modeling_{name}.{kind}Indexer"
    for name, kind in (
        *(("axk2", "AXK2"), ("deepseek_v32", "DeepseekV32"), ("dots3_note", "Dots3NoteText")),
        *(("glm5_next", "Glm5NextText"), ("glm_moe_dsa", "GlmMoeDsa"), ("hy_v4", "HYV4"), ("hy_v4_vl", "HYV4VL")),
        ("mistral_large4", "MistralLarge4Text"),
    )
)
"""Modules whose forward runs without gradients. Rules leave the layers inside them out; who names one gets it."""


def chosen_without_gradient(owner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Go through the modules inside an owner that computes without gradients, with the reason to leave each out."""
    if any(f"{parent.__module__}.{parent.__qualname__}" in WITHOUT_GRADIENT for parent in type(owner).__mro__):
        reason = CHOOSES.format(plain_class(owner).__name__)
        yield from ((child, reason) for child in owner.children())


def readings_in(owner: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Go through the modules inside an owner whose weight it reads or changes, or that it leaves out.

    Yields:
        The module; why an adapter that acts when it is called would be wrong, a phrase after its name; and whether one
        that acts on the weight as it is read would be right.
    """
    name = plain_class(owner).__name__
    never = f"is never called, because {name} reads its weight, {NO_EFFECT}"
    for parent in type(owner).__mro__:
        for reading in PARENTS.get(f"{parent.__module__}.{parent.__qualname__}", ()):
            if reading.where(owner):
                at_times = f"is not called {reading.when}, because {name} reads its weight, {NO_EFFECT}"
                reason = reading.problem.format(name) or (at_times if reading.when else never)
                found = (_child(owner, child) for child in reading.children)
                yield from ((child, reason, not reading.problem) for child in found if child is not None)
    yield from ((child, f"{reason}, {NO_EFFECT}", False) for child, reason in left_by_joining(owner))


def _child(owner: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = owner
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found

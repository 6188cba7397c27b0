"""Modules that read the weight of a linear layer inside them instead of calling it, by qualified name of their class.

An adapter of such a layer acts in its forward, which does not run, and would be a silent no-op.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from randlora.layers.in_place import plain_class
from randlora.layers.registry import find_readers

TRANSFORMERS = "transformers.models"
KERNELS = "when the kernels of mamba-ssm are used"


class Reading(NamedTuple):
    """Linear layers whose weight their owner reads.

    Attributes:
        children: Their names in the owner.
        when: When it does, if not always.
        where: Whether it does, given the owner.
    """

    children: tuple[str, ...]
    when: str = ""
    where: Callable[[Any], bool] = lambda _owner: True


def _joins_biases(owner: Any) -> bool:
    return owner.q_bias is not None and not owner.qkv_bias_separate


UNCALLED: dict[str, tuple[Reading, ...]] = {
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
    f"{TRANSFORMERS}.layoutlmv2.modeling_layoutlmv2.LayoutLMv2Encoder": (
        Reading(("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")),
    ),
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


def uncalled_in(owner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Go through the modules inside an owner that it does not call, each with the reason, a phrase after its name."""
    name = plain_class(owner).__name__
    never = f"is never called, because {name} reads its weight"
    for kind in find_readers(owner):
        yield from ((child, never) for child in kind.uncalled(owner))
    for parent in type(owner).__mro__:
        for reading in UNCALLED.get(f"{parent.__module__}.{parent.__qualname__}", ()):
            if reading.where(owner):
                reason = f"is not called {reading.when}, because {name} reads its weight" if reading.when else never
                found = (owner._modules.get(child) for child in reading.children)
                yield from ((child, reason) for child in found if child is not None)

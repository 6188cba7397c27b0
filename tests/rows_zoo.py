"""Models of transformers and other libraries, small and with random weights, and batches of any number of rows."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tests import transformers_zoo

Inputs = Callable[[int], dict[Any, Any]]
"""The arguments of a call for a number of rows, by position or keyword."""

TOKENS = 12
"""A multiple of each number of rows, like the sides of images in patches."""
T = torch.randn


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 9, shape)


def times(rows: int) -> Tensor:
    return torch.arange(1, rows + 1)


def mask(rows: int) -> Tensor:
    return torch.ones(rows, TOKENS)


TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
UNET: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
IN_AND_OUT: dict[str, Any] = HEADS | {"in_channels": 4, "out_channels": 4}
SINGLE: dict[str, Any] = HEADS | {"in_channels": 4, "num_single_layers": 1, "joint_attention_dim": 32}
AXES = {"img_ids": lambda _: torch.rand(16, 3), "txt_ids": lambda _: torch.rand(TOKENS, 3)}


def blocks(dims: str) -> dict[str, Any]:
    """Return the kinds of blocks of a UNet that attends to text."""
    down, up = f"DownBlock{dims}", f"UpBlock{dims}"
    return {"down_block_types": (f"CrossAttn{down}", down), "up_block_types": (up, f"CrossAttn{up}")}


def share(rows: int) -> Tensor:
    return times(rows) / 9


# fmt: off
CONDITIONED = UNET | {"cross_attention_dim": 16, "attention_head_dim": 4}
IMAGES_IN_AND_OUT = {"block_out_channels": (8, 16), "norm_num_groups": 4,
                     "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
EFFICIENT = {
    f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }.items()
}
DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "UNet2DModel": (UNET | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }, {"sample": (3, 16, 16)}),
    "UNet2DConditionModel": (CONDITIONED | blocks("2D"), {"sample": (4, 8, 8), TEXT: (TOKENS, 16)}),
    "UNet3DConditionModel": (CONDITIONED | blocks("3D"), {"sample": (4, 4, 8, 8), TEXT: (TOKENS, 16)}),
    "UNetSpatioTemporalConditionModel": (blocks("SpatioTemporal") | {
        "block_out_channels": (32, 64), "layers_per_block": 1, "num_attention_heads": 2, "cross_attention_dim": 32,
        "projection_class_embeddings_input_dim": 24, "addition_time_embed_dim": 8,
    }, {"sample": (4, 8, 8, 8), TEXT: (1, 32), "added_time_ids": lambda n: torch.rand(n, 3)}),
    "Kandinsky3UNet": ({
        "time_embedding_dim": 4, "groups": 2, "attention_head_dim": 4, "layers_per_block": 3,
        "block_out_channels": (32, 64), "cross_attention_dim": 4, "encoder_hid_dim": 32,
    }, {"sample": (4, 8, 8), TEXT: (TOKENS, 32), MASK: mask}),
    "ControlNetModel": (CONDITIONED | {
        "down_block_types": blocks("2D")["down_block_types"], "in_channels": 4,
        "conditioning_embedding_out_channels": (8, 8),
    }, {"sample": (4, 8, 8), TEXT: (TOKENS, 16), "controlnet_cond": (3, 16, 16)}),
    "AutoencoderKL": (IMAGES_IN_AND_OUT, {"sample": (3, 16, 16)}),
    "VQModel": ({"block_out_channels": (8,), "norm_num_groups": 4}, {"sample": (3, 16, 16)}),
    "AutoencoderKLWan": ({
        "base_dim": 3, "z_dim": 16, "dim_mult": [1] * 4, "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }, {"sample": (3, 9, 16, 16)}),
    "AutoencoderDC": (EFFICIENT | {
        "latent_channels": 4, "attention_head_dim": 2, "downsample_block_type": "conv",
        "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
    }, {"sample": (3, 16, 16)}),
    "Transformer2DModel": (HEADS | {"in_channels": 32, "norm_num_groups": 4, "cross_attention_dim": 16}, {
        "hidden_states": (32, 6, 6), TEXT: (TOKENS, 16), "timestep": None,
    }),
    "DiTTransformer2DModel": (HEADS | {"sample_size": 8}, {"hidden_states": (4, 8, 8), "class_labels": times}),
    "PixArtTransformer2DModel": (HEADS | {
        "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 24, "use_additional_conditions": False,
    }, {
        "hidden_states": (4, 8, 8), TEXT: (TOKENS, 24), MASK: mask,
        "added_cond_kwargs": lambda _: {"aspect_ratio": None, "resolution": None},
    }),
    "SD3Transformer2DModel": (IN_AND_OUT | {
        "sample_size": 8, "joint_attention_dim": 32, "caption_projection_dim": 32,
        "pooled_projection_dim": 16, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }, {"hidden_states": (4, 8, 8), TEXT: (TOKENS, 32), "pooled_projections": (16,)}),
    "FluxTransformer2DModel": (SINGLE | {"pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}, {
        "hidden_states": (16, 4), TEXT: (TOKENS, 32), "pooled_projections": (16,), "timestep": share, **AXES,
    }),
    "Flux2Transformer2DModel": (SINGLE | {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}, {
        "hidden_states": (16, 4), TEXT: (TOKENS, 32), "timestep": share, "guidance": share,
        "img_ids": lambda n: torch.rand(n, 16, 4), "txt_ids": lambda n: torch.rand(n, TOKENS, 4),
    }),
    "ChromaTransformer2DModel": (SINGLE | {
        "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8, "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }, {"hidden_states": (16, 4), TEXT: (TOKENS, 32), "timestep": share, **AXES}),
    "CogVideoXTransformer3DModel": (IN_AND_OUT | {
        "time_embed_dim": 4, "text_embed_dim": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": TOKENS,
    }, {"hidden_states": (3, 4, 8, 8), TEXT: (TOKENS, 8)}),
    "CogView4Transformer2DModel": (IN_AND_OUT | {
        "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4, "rope_axes_dim": (8, 8),
    }, {
        "hidden_states": (4, 8, 8), TEXT: (TOKENS, 32),
        **dict.fromkeys(("original_size", "target_size", "crop_coords"), lambda n: torch.ones(n, 2)),
    }),
    "ErnieImageTransformer2DModel": ({
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48, "in_channels": 4,
        "out_channels": 4, "text_in_dim": 24, "rope_axes_dim": (4, 6, 6),
    }, {
        "hidden_states": (4, 6, 6), "text_bth": (TOKENS, 24), "text_lens": lambda n: torch.full((n,), TOKENS),
    }),
    "HunyuanVideoTransformer3DModel": (IN_AND_OUT | {
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 8),
    }, {
        "hidden_states": (4, 4, 8, 8), TEXT: (TOKENS, 16), MASK: mask, "pooled_projections": (8,), "guidance": times,
    }),
    "LTXVideoTransformer3DModel": (HEADS | {
        "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 16,
    }, {
        "hidden_states": (24, 8), TEXT: (TOKENS, 16), MASK: mask,
        **{name: lambda _, size=size: size for name, size in {"num_frames": 2, "height": 3, "width": 4}.items()},
    }),
    "Lumina2Transformer2DModel": ({
        "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1,
        "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
        "axes_lens": (128, 128, 128), "cap_feat_dim": 8,
    }, {"hidden_states": (4, 8, 8), TEXT: (TOKENS, 8), MASK: lambda n: mask(n).bool()}),
    "MochiTransformer3DModel": (HEADS | {
        "attention_head_dim": 8, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
        "time_embed_dim": 4, "max_sequence_length": TOKENS,
    }, {"hidden_states": (4, 2, 8, 8), TEXT: (TOKENS, 16), MASK: lambda n: mask(n).bool()}),
    "QwenImageTransformer2DModel": (IN_AND_OUT | {
        "in_channels": 16, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8),
    }, {
        "hidden_states": (16, 16), TEXT: (TOKENS, 16), "encoder_hidden_states_mask": lambda n: mask(n).long(),
        "timestep": share, "img_shapes": lambda n: [(1, 4, 4)] * n,
    }),
    "SanaTransformer2DModel": (IN_AND_OUT | {
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 8, "sample_size": 8,
    }, {"hidden_states": (4, 8, 8), TEXT: (TOKENS, 8)}),
    "WanTransformer3DModel": (IN_AND_OUT | {
        "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "rope_max_seq_len": 32,
    }, {"hidden_states": (4, 2, 8, 8), TEXT: (TOKENS, 16)}),
    "PriorTransformer": (HEADS | {"embedding_dim": 8, "num_embeddings": 7, "additional_embeddings": 4}, {
        "hidden_states": (8,), "proj_embedding": (8,), TEXT: (7, 8),
    }),
    "StableAudioDiTModel": (IN_AND_OUT | {
        "sample_size": 4, "num_key_value_attention_heads": 2, "cross_attention_dim": 4, "time_proj_dim": 8,
        "global_states_input_dim": 8, "cross_attention_input_dim": 4,
    }, {
        "hidden_states": (4, 8), "timestep": lambda n: times(n).float(), TEXT: (TOKENS, 4),
        "global_hidden_states": (1, 8), "rotary_embedding": lambda _: (T(9, 8), T(9, 8)),
    }),
    "AllegroTransformer3DModel": (HEADS | {
        "attention_head_dim": 12, "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8,
        "sample_frames": 8, "caption_channels": 24,
    }, {
        "hidden_states": (4, 2, 8, 8), TEXT: (TOKENS, 24), MASK: mask,
        "attention_mask": lambda n: torch.ones(n, 2, 8, 8),
    }),
    "LatteTransformer3DModel": (HEADS | {
        "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16,
        "attention_bias": True, "sample_size": 8, "patch_size": 2, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        "norm_eps": 1e-6, "caption_channels": 8, "video_length": 4,
    }, {"hidden_states": (4, 4, 8, 8), TEXT: (TOKENS, 8)}),
}
"""Options of a class, and its inputs: shapes after that of the batch, or functions of the number of rows."""

SWIN = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}
VIT = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {
    **{name: {} for name in (
        "test_vit", "test_mambaout", "test_convnext", "test_resnet", "test_nfnet", "test_efficientnet", "test_byobnet",
        "test_coatnet", "test_maxvit", "ghostnet_050", "regnetx_002", "mobilevit_xxs", "mobilevitv2_050",
        "pvt_v2_b0", "edgenext_xx_small", "starnet_s050", "swiftformer_xs", "repvit_m1",
        "fastvit_t8",
    )},
    "efficientvit_m0": {"img_size": 64},
    "swin_tiny_patch4_window7_224": SWIN | {"window_size": 4},
    "swinv2_tiny_window8_256": SWIN | {"window_size": 4},
    "swinv2_cr_tiny_224": SWIN | {"window_size": 4},
    "cait_xxs24_224": VIT,
    "convit_tiny": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT | {"img_size": 56},
    "xcit_nano_12_p16_224": VIT,
    "mixer_s32_224": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 64},
    "coat_tiny": {"img_size": 64},
    "crossvit_tiny_240": {"depth": ((1, 1, 0),) * 3},
    "levit_128s": {"img_size": 224},
    "pit_ti_224": {"img_size": 64},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 24, "stages": (1, 1, 1, 1)},
    "davit_tiny": {"embed_dims": (24, 48, 48, 48), "depths": (1,) * 4},
    "tiny_vit_5m_224": {"depths": (1,) * 4},
    "tnt_s_patch16_224": {"img_size": 64, "embed_dim": 48, "inner_dim": 24, "depth": 2, "num_heads_outer": 2},
    "twins_svt_small": {"img_size": 64, "depths": (2,) * 4, "embed_dims": (16,) * 4, "num_heads": (2,) * 4},
    "mvitv2_tiny": {"img_size": 64},
    "botnet26t_256": {"img_size": 64},
    "sequencer2d_s": {"img_size": 64, "layers": (1,) * 4, "embed_dims": (24,) * 4, "hidden_sizes": (6,) * 4},
}
"""A class of each family that forms windows, blocks or several scales, and some convolutional ones."""
TORCHVISION: dict[str, dict[str, Any]] = {
    "VisionTransformer": {
        "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48,
    },
    "SwinTransformer": {
        "patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4],
    },
    "MaxVit": {
        "input_size": (64, 64), "stem_channels": 8, "partition_size": 2, "block_channels": [8, 8],
        "block_layers": [1, 1], "head_dim": 4, "stochastic_depth_prob": 0.0,
    },
    **{name: {} for name in (
        "raft_small", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121",
        "googlenet", "lraspp_mobilenet_v3_large",
    )},
}


# fmt: on


def of_timm(name: str) -> tuple[nn.Module, Inputs]:
    from timm import create_model

    options = TIMM[name]
    side = options.get("img_size", 64)
    for each in (side, 160, 224, 240, 256):
        try:
            model = create_model(name, **options).eval()
            model(T(1, 3, each, each))
        except Exception:  # it has one size
            continue
        return model, lambda n, side=each: {0: T(n, 3, side, side)}
    raise ValueError(name)


def of_torchvision(name: str) -> tuple[nn.Module, Inputs]:
    models = import_module("torchvision.models")

    def inputs(n: int) -> dict[Any, Any]:
        if name == "raft_small":
            return {0: T(n, 3, 128, 128), 1: T(n, 3, 128, 128), "num_flow_updates": 2}
        side = 32 if name == "VisionTransformer" else 64
        return {0: T(n, 3, side, side)}

    options = TORCHVISION[name]
    if options:
        return getattr(models if hasattr(models, name) else models.swin_transformer, name)(**options), inputs
    backbone = {"weights_backbone": None} if "mobilenet_v3_large" in name else {}
    return models.get_model(name, weights=None, **backbone), inputs


def of_diffusers(name: str) -> tuple[nn.Module, Inputs]:
    config, shapes = DIFFUSERS[name]
    model: nn.Module = getattr(import_module("diffusers"), name)(**config)
    if "timestep" in signature(model.forward).parameters:
        shapes = {"timestep": times, **shapes}

    def inputs(n: int) -> dict[Any, Any]:
        given = {key: each for key, each in shapes.items() if each is not None}
        return {key: T(n, *each) if isinstance(each, tuple) else each(n) for key, each in given.items()}

    return model, inputs


# fmt: off
TEXTS: dict[str, Any] = {"context_length": TOKENS, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
IMAGES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
OPEN_CLIP: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "CLIP with ViT": ("CLIP", IMAGES, TEXTS),
    "CLIP with ResNet": ("CLIP", IMAGES | {"layers": [1, 1, 1, 1], "patch_size": None}, TEXTS),
    "CLIP with timm": ("CLIP", {"timm_model_name": "test_vit", "image_size": 32}, TEXTS),
    "CLIP with pooled attention": ("CLIP", IMAGES | {"attentional_pool": True, "attn_pooler_heads": 2}, TEXTS),
    "CustomTextCLIP": ("CustomTextCLIP", IMAGES, TEXTS | {"embed_cls": True, "pad_id": 1}),
    "CoCa": (
        "CoCa", IMAGES | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        TEXTS | {"embed_cls": True, "output_tokens": True, "pad_id": 1},
    ),
}
# fmt: on


def of_open_clip(name: str) -> tuple[nn.Module, Inputs]:
    library = import_module("open_clip.model" if name != "CoCa" else "open_clip.coca_model")
    kind, images, texts = OPEN_CLIP[name]
    more = {"multimodal_cfg": TEXTS} if kind == "CoCa" else {}
    model = getattr(library, kind)(embed_dim=32, vision_cfg=images, text_cfg=texts, **more)
    return model, lambda n: {"image": T(n, 3, 32, 32), "text": ids(n, TOKENS)}


class Features(nn.Module):
    """Modules of sentence-transformers after one another, as its models call them."""

    def __init__(self, encoder: nn.Module, modules: list[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.others = encoder, nn.ModuleList(modules)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        features = {"token_embeddings": tokens, "attention_mask": attention_mask, "input_ids": input_ids}
        features["sentence_lengths"] = attention_mask.sum(1)
        for module in self.others:
            features = module(features)
        return features["sentence_embedding"]


def of_sentence_transformers(name: str) -> tuple[nn.Module, Inputs]:
    library = import_module("sentence_transformers.sentence_transformer.modules")
    model_type, _, more = name.partition("+")
    encoder = transformers_zoo.tiny(model_type, TYPES[model_type])
    assert encoder is not None
    width = encoder.config.hidden_size if hasattr(encoder.config, "hidden_size") else encoder.config.dim
    modules = {
        "": lambda: [library.Pooling(width, pooling_mode="mean")],
        "max": lambda: [library.Pooling(width, pooling_mode="max"), library.Dense(width, 8), library.Normalize()],
        "CNN": lambda: [library.CNN(width, 8), library.Pooling(24, pooling_mode="mean")],
        "LSTM": lambda: [library.LSTM(width, 8), library.Pooling(16, pooling_mode="mean")],
    }[more]()
    return Features(encoder, modules), lambda n: {
        "input_ids": ids(n, TOKENS),
        "attention_mask": torch.ones(n, TOKENS, dtype=torch.long),
    }


TYPES = {
    "bert": "BertModel",
    "mpnet": "MPNetModel",
    "distilbert": "DistilBertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "albert": "AlbertModel",
    "electra": "ElectraModel",
    "deberta-v2": "DebertaV2Model",
    "modernbert": "ModernBertModel",
    "nomic_bert": "NomicBertModel",
}
SENTENCE_TRANSFORMERS = [*TYPES, "bert+max", "bert+CNN", "bert+LSTM", "mpnet+max"]


class Around(nn.Module):
    def __init__(self, inner: nn.Module, *, axis: int = 0, into: int = 12, out: int = 12, times: int = 1) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(12, into), inner, nn.Linear(out, 12)
        self.axis, self.times = axis, times

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).transpose(0, self.axis)
        y = self.inner(*[x] * self.times)
        return self.last((y[0] if isinstance(y, tuple) else y).transpose(0, self.axis))


BATCH_FIRST: dict[str, tuple[tuple[int, ...], int]] = {
    "MultiheadAttention": ((12, 2), 3),
    "TransformerEncoderLayer": ((12, 2, 16), 1),
    "TransformerDecoderLayer": ((12, 2, 16), 2),
    "Transformer": ((12, 2, 1, 1, 16), 2),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), ((12, 12), 1)),
}
"""The arguments of a class, and how many inputs it takes."""


def with_batch(kind: str, axis: int) -> nn.Module:
    options, times = BATCH_FIRST[kind]
    return Around(getattr(nn, kind)(*options, batch_first=axis == 0), axis=axis, times=times)


TORCH: dict[str, Callable[[], nn.Module]] = {
    **{f"{kind}, {axis}": partial(with_batch, kind, axis) for kind in BATCH_FIRST for axis in (0, 1)},
    "TransformerEncoder": lambda: Around(nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16), 2), axis=1),
    "Conv1d": lambda: Around(nn.Conv1d(12, 12, 3, padding=1)),
    "ConvTranspose1d": lambda: Around(nn.ConvTranspose1d(12, 12, 3, padding=1)),
    "Bilinear": lambda: Around(nn.Bilinear(12, 12, 12), times=2),
    "BatchNorm1d": lambda: Around(nn.BatchNorm1d(12)),
    "GroupNorm": lambda: Around(nn.GroupNorm(3, 12)),
    "AdaptiveAvgPool1d": lambda: Around(nn.AdaptiveAvgPool1d(12)),
    "PReLU": lambda: Around(nn.PReLU()),
    "GLU": lambda: Around(nn.GLU(), into=24),
    "Flatten": lambda: Around(nn.Sequential(nn.Flatten(0, 1), nn.Linear(12, 12), nn.Unflatten(0, (-1, TOKENS)))),
}


def of_torch(name: str) -> tuple[nn.Module, Inputs]:
    return TORCH[name](), lambda n: {0: T(n, TOKENS, 12)}


def of_transformers(name: str) -> tuple[nn.Module, Inputs]:
    """Build a class; to six rows it is given as many tokens, so that sizes tell nothing."""
    task, model_type = CLASSES[name]
    model: Any = transformers_zoo.tiny(model_type, name)
    config = model.config
    for part in (config, config.get_text_config()):
        part.pad_token_id, part._experts_implementation = 1, "eager"  # several experts at once take no float64

    def inputs(n: int) -> dict[Any, Any]:
        if task == "vision":
            images = getattr(config, "vision_config", config)
            size = getattr(images, "image_size", 32)
            sides = [min(side, 224) for side in ((size, size) if isinstance(size, int) else size[:2])]
            return {"pixel_values": T(n, getattr(images, "num_channels", 3), *sides)}
        given = torch.randint(3, 100, (n, n if n == 6 else n + 1))
        return {"input_ids": given} | ({"decoder_input_ids": given[:, 1:]} if task == "encoder and decoder" else {})

    return model, inputs


CLASSES = {name: (task, model_type) for task, model_type, name in transformers_zoo.classes()}
FAMILIES: dict[str, tuple[Callable[[str], tuple[nn.Module, Inputs]], list[str]]] = {
    **{
        task: (of_transformers, [name for name in CLASSES if CLASSES[name][0] == task])
        for task in transformers_zoo.TASKS
    },
    "torch": (of_torch, [*TORCH]),
    "diffusers": (of_diffusers, [*DIFFUSERS]),
    "timm": (of_timm, [*TIMM]),
    "torchvision": (of_torchvision, [*TORCHVISION]),
    "open_clip": (of_open_clip, [*OPEN_CLIP]),
    "sentence_transformers": (of_sentence_transformers, SENTENCE_TRANSFORMERS),
}

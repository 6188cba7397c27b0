"""Small models of diffusers with random weights, and their inputs."""

from typing import Any

import torch
from torch import nn

from tests.models import reproducible

UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": [4, 4, 8],
}


def unet() -> nn.Module:
    """Build a UNet with cross-attention."""
    import diffusers

    return reproducible(lambda: diffusers.UNet2DConditionModel(**UNET))


def flux() -> nn.Module:
    """Build a transformer in which a name is the end of another."""
    import diffusers

    return reproducible(lambda: diffusers.FluxTransformer2DModel(**FLUX))


def noise() -> dict[str, Any]:
    """Draw inputs of `unet`."""
    steps, context = torch.tensor([3, 500]), torch.randn(2, 5, 16)
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": steps, "encoder_hidden_states": context}


def patches() -> dict[str, Any]:
    """Draw inputs of `flux`."""
    return {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }

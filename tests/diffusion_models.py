"""Small models of diffusers with random weights, and their inputs."""

from typing import Any

import torch
from torch import nn

from tests.models import reproducible


def unet() -> nn.Module:
    """Build a UNet with cross-attention."""
    import diffusers

    options: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return reproducible(lambda: diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=1, **options))


def flux() -> nn.Module:
    """Build a transformer in which a name is the end of another."""
    import diffusers

    options: dict[str, Any] = {
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "axes_dims_rope": [4, 4, 8],
    }
    return reproducible(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, **options
        )
    )


def noise() -> dict[str, Any]:
    """Draw inputs of `unet`."""
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }


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

"""The words that options take, for the library and the command line, without torch."""

from typing import Literal

BasisKind = Literal["dense", "sparse", "very_sparse", "block"]
Stream = Literal["torch", "torch-2.11", "portable"]
InProj = Literal["packed", "split"]
Experts = Literal["each", "shared"]

Init = Literal["lambda", "gamma"]
"""Which of Λ and Γ starts at zero and moves first."""

Strategy = Literal["ddp", "fsdp2", "tp"]

Format = Literal["peft", "native", "lora", "diff"]
Layout = Literal["peft", "diffusers", "mlx"]
Component = Literal["unet", "transformer", "text_encoder", "text_encoder_2", "diffusion_model"]
"""Attributes of diffusers' pipelines, and ``diffusion_model``, as ComfyUI calls a model with its authors' own names."""

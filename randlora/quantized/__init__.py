"""Adapter layers of bitsandbytes' linear layers, and preparing a model that has them for training."""

from randlora.quantized import bnb as bnb

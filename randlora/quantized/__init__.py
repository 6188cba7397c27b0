"""Adapter layers of what bitsandbytes and torchao quantized, and preparing a model that has them for training."""

from randlora.quantized import bnb as bnb
from randlora.quantized import torchao as torchao

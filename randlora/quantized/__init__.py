"""Adapter layers of what other libraries quantized, and preparing a model that has such layers for training."""

from randlora.quantized import bnb as bnb
from randlora.quantized import libraries as libraries
from randlora.quantized.layer import ForwardOnly as ForwardOnly
from randlora.quantized.layer import QuantizedLayer as QuantizedLayer

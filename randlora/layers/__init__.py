"""Adapter layers. Importing this package registers the linear kinds; features register others."""

from randlora.layers import linear as linear
from randlora.layers.base import AdapterLayer as AdapterLayer
from randlora.layers.registry import register_layer as register_layer

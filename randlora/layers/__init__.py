"""Adapter layers, one file per kind of base layer. Importing this package registers every kind."""

from randlora.layers import linear as linear
from randlora.layers.base import AdapterLayer as AdapterLayer
from randlora.layers.registry import register_layer as register_layer

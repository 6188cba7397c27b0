"""Adapter layers. Importing this package registers the linear ones; features register other kinds."""

from randlora.layers import linear as linear
from randlora.layers.base import AdapterLayer as AdapterLayer
from randlora.layers.registry import register_layer as register_layer

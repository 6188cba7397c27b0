"""One file per kind of base layer: how to read and write that kind of weight, nothing more."""

from randlora.layers import bnb as bnb
from randlora.layers import conv1d as conv1d
from randlora.layers import linear as linear

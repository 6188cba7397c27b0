"""Weights that code reads instead of calling their module, such as in attention, convolutions and experts."""

from randlora.readers import experts as experts
from randlora.readers import parents as parents
from randlora.readers.read_weight import ReadWeight as ReadWeight

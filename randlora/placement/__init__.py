"""Keepers of parameters that several processes hold: device meshes, DeepSpeed's ZeRO-3, and the first FSDP."""

from randlora.placement import dtensor as dtensor
from randlora.placement import flattened as flattened
from randlora.placement import zero3 as zero3

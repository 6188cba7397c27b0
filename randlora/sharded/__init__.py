"""Models with parameters or gradients spread over processes: device meshes, plans, ZeRO-3, FSDP and DDP."""

from randlora.sharded import engines as engines
from randlora.sharded import flattened as flattened
from randlora.sharded import plans as plans
from randlora.sharded import products as products
from randlora.sharded import zero3 as zero3

"""Models with parameters or gradients spread over processes: device meshes, plans, ZeRO-3, FSDP and DDP."""

from randlora.sharded import engines as engines
from randlora.sharded import places as places
from randlora.sharded import tensor_parallel as tensor_parallel

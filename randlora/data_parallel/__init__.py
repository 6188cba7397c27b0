"""Engines that average gradients over processes: `DistributedDataParallel`, `fully_shard` and DeepSpeed."""

from randlora.data_parallel import averaging as averaging
from randlora.data_parallel import reducers as reducers

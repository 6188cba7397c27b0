"""One adapter on disk, in PEFT's directory layout, or in memory.

`tensors` and `header` are what the file of the tensors holds, `peft_config` is PEFT's JSON, `read` reads and checks
both files, `fit` compares them with a model. `save`, `load` and `swap` are the verbs.
"""

from randlora.checkpoint.in_memory import AdapterState, adapter_state
from randlora.checkpoint.load import load
from randlora.checkpoint.save import save
from randlora.checkpoint.several import load_all, save_all
from randlora.checkpoint.swap import swap

__all__ = [
    "AdapterState",
    "adapter_state",
    "load",
    "load_all",
    "save",
    "save_all",
    "swap",
]

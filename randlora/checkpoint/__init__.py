"""One adapter on disk, in PEFT's directory layout, or in memory.

`peft_layout` has PEFT's names and fields, `header` our facts beside them. `read` reads and checks the files, `fit`
compares them with a model. `save`, `load` and `swap` are the verbs.
"""

from randlora.checkpoint.contents import AdapterState, adapter_state
from randlora.checkpoint.load import load, load_all, swap
from randlora.checkpoint.save import save, save_all

__all__ = [
    "AdapterState",
    "adapter_state",
    "load",
    "load_all",
    "save",
    "save_all",
    "swap",
]

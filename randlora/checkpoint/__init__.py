"""One adapter on disk, in PEFT's directory layout, or in memory.

`peft_layout` has PEFT's names and fields, `header` our facts beside them. `read` reads and checks the files, `fit`
compares them with a model. `save`, `load` and `swap` are the verbs.
"""

from randlora.checkpoint.contents import AdapterState as AdapterState
from randlora.checkpoint.contents import adapter_state as adapter_state
from randlora.checkpoint.load import load as load
from randlora.checkpoint.load import load_all as load_all
from randlora.checkpoint.load import swap as swap
from randlora.checkpoint.save import save as save
from randlora.checkpoint.save import save_all as save_all

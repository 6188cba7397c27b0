"""One adapter on disk, in PEFT's directory layout, or in memory.

`peft_layout` has PEFT's names and fields, `header` our facts beside them. `read` reads and checks the files, `fit`
compares them with a model. `save`, `load` and `swap` are the verbs.
"""

from randlora.checkpoint.contents import AdapterState as AdapterState

"""Adapters on disk, in PEFT's directory layout.

`layout` names the files and their keys, `peft_config` speaks PEFT's JSON, `header` is what the safetensors header adds,
`write` and `read` touch the disk, `save` and `load` are the verbs.
"""

from randlora.checkpoint.load import load
from randlora.checkpoint.save import save

__all__ = ["load", "save"]

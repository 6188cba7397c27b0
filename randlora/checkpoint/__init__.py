"""One adapter on disk, in PEFT's directory layout.

`format` names the files and keys and has our own header, `peft_config` reads and writes PEFT's JSON, `read` reads and
checks both files, `fit` compares them with a model, and `save` and `load` are the verbs. Integrations `restore`.
"""

from randlora.checkpoint.load import load
from randlora.checkpoint.restore import restore
from randlora.checkpoint.save import save

__all__ = ["load", "restore", "save"]

"""Verbs on files of models and adapters.

`plan`, `merge`, `inspect`, `verify` and `convert` are the commands of these names, and need no model in memory, as
`join` does not. `load_model` makes one of files, and `save_merged` writes the files of one.

`model_directory` reads the headers of a checkpoint, `transformers_model` builds the model that its ``config.json``
describes on the meta device, and `base_fit` finds an adapter's layers in the files. `adapter` opens an adapter layer by
layer, and `changes` are what adapters do to a checkpoint.
"""

import randlora.features as _features  # noqa: F401  (importing it registers what features have)
from randlora.files.convert import convert, join
from randlora.files.inspect import inspect, verify
from randlora.files.merge import merge
from randlora.files.plan import plan, training_memory
from randlora.files.save_merged import save_merged
from randlora.files.transformers_model import load_model
from randlora.report import Progress

__all__ = [
    "Progress",
    "convert",
    "inspect",
    "join",
    "load_model",
    "merge",
    "plan",
    "save_merged",
    "training_memory",
    "verify",
]

"""Verbs on files: what can be done with checkpoints and adapters without a model in memory.

Each verb is the command of its name: `plan`, `merge`, `inspect`, `verify`, `convert`. `join` has none.

`model_directory` reads the headers of a checkpoint, `transformers_model` builds the model that its ``config.json``
describes on the meta device, and `base_fit` finds an adapter's layers in the files. `adapter` opens an adapter layer by
layer, and `changes` are what adapters do to a checkpoint.
"""

from randlora.files.convert import convert
from randlora.files.inspect import inspect
from randlora.files.join import join
from randlora.files.merge import merge
from randlora.files.plan import plan, training_memory
from randlora.files.verify import verify
from randlora.report import Progress

__all__ = ["Progress", "convert", "inspect", "join", "merge", "plan", "training_memory", "verify"]

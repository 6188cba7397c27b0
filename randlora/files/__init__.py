"""Verbs on files: what can be done to checkpoints and adapters without a model in memory.

Each verb is the command of its name: `plan`, `merge`, `inspect`, `verify`, `convert`.

`model_directory` reads the headers of a checkpoint; `transformers_model` builds the model that its ``config.json``
describes on the meta device, and `base_fit` finds an adapter's layers in the files. `quantized` sees a checkpoint of
codes as the dense one that it stands for, `bnb_layout` finds the codes in it, and `codes` reads them. `tensor_file`
reads and writes tensors as bytes, `companions` are the files beside them, `staging` lets a directory appear complete or
not at all. `adapter` opens an adapter layer by layer, `low_rank` cuts its updates.
"""

from randlora.files.convert import convert
from randlora.files.inspect import inspect
from randlora.files.merge import merge
from randlora.files.plan import plan
from randlora.files.progress import Progress
from randlora.files.verify import verify

__all__ = ["Progress", "convert", "inspect", "merge", "plan", "verify"]

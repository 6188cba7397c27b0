"""Verbs on files: what can be done to checkpoints and adapters without a model in memory.

`model_directory` reads the headers of a checkpoint; `names`, `order` and `kinds` say what they mean; `skeleton`
builds a model of shapes after them. `quantized` sees a checkpoint of codes as the dense one that it stands for,
`bnb_layout` finds the codes in it, and `codes` reads them. `tensor_file` reads and writes tensors as bytes,
`companions` are the files beside them, `staging` lets a directory appear complete or not at all. `adapter` opens an
adapter layer by layer, `low_rank` cuts its updates.
"""

from randlora.files.convert import convert_adapter
from randlora.files.inspect import inspect_adapter
from randlora.files.merge import FileMergeReport, merge_files
from randlora.files.plan import plan_directory
from randlora.files.progress import Progress
from randlora.files.verify import verify_adapter

__all__ = [
    "FileMergeReport",
    "Progress",
    "convert_adapter",
    "inspect_adapter",
    "merge_files",
    "plan_directory",
    "verify_adapter",
]

"""Verbs on files of models and adapters.

`load_model` makes a model of files, and `save_merged` writes the files of one. The others need no model in memory.

Importing this package imports the features: folders or files that register themselves when they are imported, and that
no other file names. If one is deleted, the rest still works.
"""

from importlib import import_module
from importlib.util import find_spec

from randlora.files.convert import convert, join
from randlora.files.inspect import inspect, verify
from randlora.files.merge import merge
from randlora.files.model_directory import Progress
from randlora.files.plan import plan, training_memory
from randlora.files.save_merged import save_merged
from randlora.files.transformers_model import load_model

FEATURES = ("readers", "quantized", "offloaded", "sharded", "serving")

for _name in FEATURES:
    if find_spec(f"randlora.{_name}") is not None:
        import_module(f"randlora.{_name}")

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

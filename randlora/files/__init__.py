"""Verbs on files: what can be done to checkpoints and adapters without a model in memory.

`model_directory` reads the headers of a checkpoint; `names`, `order`, `kinds` and `quantised` say what they mean;
`skeleton` builds a model of shapes after them.
"""

from randlora.files.plan import plan_directory
from randlora.files.progress import Progress

__all__ = ["Progress", "plan_directory"]

"""The features: folders or files that register themselves when they are imported, and that no other file names.

If one is deleted, the rest still works.
"""

from importlib import import_module
from importlib.util import find_spec

FEATURES = ("readers", "quantized", "offloaded", "sharded", "serving")

for _name in FEATURES:
    if find_spec(f"randlora.{_name}") is not None:
        import_module(f"randlora.{_name}")

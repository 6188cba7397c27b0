"""Which files of the package are the core, and which are features: the one list, of today's and of former paths."""

from __future__ import annotations

from fnmatch import fnmatch

FEATURES: dict[str, tuple[str, ...]] = {
    "readers": (
        *("readers/*", "layers/attention.py", "layers/experts.py", "layers/adapted_stack.py", "layers/convolution.py"),
        *("layers/embedding.py", "layers/joined.py", "layers/read_weight.py", "layers/uncalled.py"),
    ),
    "quantized": (*("quantized/*", "layers/bnb*.py", "layers/quantized.py", "files/quantized.py", "model/prepare.py"),),
    "sharded": (
        *("sharded/*", "placement/averaged.py", "placement/dtensor.py", "placement/flattened.py", "placement/place.py"),
        *("placement/ranks.py", "placement/zero3.py", "layers/sharded.py", "layers/planned.py", "model/ranks.py"),
        *("data_parallel/*", "model/reducers.py", "model/averaging.py"),
    ),
    "offloaded": ("offloaded.py", "offloaded/*", "placement/offloaded.py"),
    "serving": (
        *("serving/*", "rows/*", "pool.py", "routing.py", "forwards.py", "layers/routed.py", "layers/kept.py"),
        *("layers/row_layouts.py", "layers/rows.py", "layers/combined.py", "model/routed.py", "model/entries.py"),
        *("model/combine.py", "checkpoint/swap.py"),
    ),
    "integrations": ("integrations/*",),
    "cli": ("cli/*",),
}
"""By the name of a feature its files, relative to the package. All other files are the core."""

COUNTS = {"core": 300, "features": 200}
"""How many mutants are sampled of each part."""


def feature_of(file: str) -> str | None:
    """Return the feature that a file, such as ``randlora/pool.py``, belongs to, or None for the core."""
    path = file.removeprefix("randlora/")
    return next((name for name, patterns in FEATURES.items() if any(fnmatch(path, one) for one in patterns)), None)


def part_of(file: str) -> str:
    """Return ``"core"`` or ``"features"``."""
    return "features" if feature_of(file) else "core"

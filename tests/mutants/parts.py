"""Which files of the package are the core, and which are features."""

FEATURES = ("readers", "quantized", "sharded", "offloaded", "serving", "integrations", "cli")
"""Folders, or files, of the package. All other files are the core."""

COUNTS = {"core": 300, "features": 200}
"""How many mutants are sampled of each part."""


def feature_of(file: str) -> str | None:
    """Return the feature that a file, such as ``randlora/serving/pool.py``, belongs to, or None for the core."""
    name = file.split("/")[1].removesuffix(".py")
    return name if name in FEATURES else None


def part_of(file: str) -> str:
    """Return ``"core"`` or ``"features"``."""
    return "features" if feature_of(file) else "core"

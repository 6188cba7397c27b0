"""The names of an adapter's tensors in a file: those of PEFT, and different ones for different tensors.

PEFT puts a module of its own around each adapted layer and keeps the layer in it as ``base_layer``. So the parameters
of the layer itself, such as its bias, are one level down. A child that is itself called ``base_layer`` is written one
level down too, so that no two names collide.
"""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Set as AbstractSet

MODEL_PREFIX = "base_model.model."
LAMBDA_SUFFIX = ".randlora_lambda"
GAMMA_SUFFIX = ".randlora_gamma"
BASIS_A = "randlora_A"
BASIS_B = "randlora_B"
TOP_BASIS_A = f"base_model.{BASIS_A}"
TOP_BASIS_B = f"base_model.{BASIS_B}"
BASE_LAYER = "base_layer"


def value_keys(fqn: str, targets: Container[str]) -> tuple[str, str]:
    """Return the keys of Λ and Γ of one of the targets."""
    path = MODEL_PREFIX + _descended(fqn, targets)
    return f"{path}{LAMBDA_SUFFIX}", f"{path}{GAMMA_SUFFIX}"


def trained_key(fqn: str, targets: Container[str]) -> str:
    """Return the key of a parameter trained with an adapter."""
    module, _, attribute = fqn.rpartition(".")
    if module not in targets:
        return MODEL_PREFIX + _descended(fqn, targets)
    return f"{MODEL_PREFIX}{_descended(module, targets)}.{BASE_LAYER}.{attribute}"


def trained_fqn(key: str, targets: Container[str]) -> str:
    """Return the FQN of a key of `trained_key`, or of PEFT, which has all children of a layer one level down."""
    parts: list[str] = []
    levels = -1  # number of parts before the last one that was left out
    for part in key.removeprefix(MODEL_PREFIX).split("."):
        if part == BASE_LAYER and levels != len(parts) and ".".join(parts) in targets:
            levels = len(parts)
        else:
            parts.append(part)
    return ".".join(parts)


def basis_keys(r: int, ranks: AbstractSet[int]) -> tuple[str, str]:
    """Return the keys of A and B of rank r: those of PEFT, or if there are bases of several ranks, these with r."""
    suffix = "" if ranks == {r} else f".r{r}"
    return f"{TOP_BASIS_A}{suffix}", f"{TOP_BASIS_B}{suffix}"


def _descended(fqn: str, targets: Container[str]) -> str:
    """Return a path with each child of a target that is called ``base_layer`` one level down."""
    parts = fqn.split(".")
    descended: list[str] = []
    for index, part in enumerate(parts):
        if part == BASE_LAYER and ".".join(parts[:index]) in targets:
            descended.append(BASE_LAYER)
        descended.append(part)
    return ".".join(descended)

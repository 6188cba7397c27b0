"""The tensors of an adapter's file: their names, their dtypes, and the requirements on their values.

The names are PEFT's, which puts a module around each adapted layer and keeps the layer in it as ``base_layer``: so the
layer's own parameters, such as its bias, are one level down. A child that is itself called ``base_layer`` is written
one level down too, so that no two names collide.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import torch
from torch import Tensor

from randlora.bases.spec import count_bases
from randlora.config import LayerOptions
from randlora.disk.formats import TORCH_DTYPES
from randlora.places import has_values, whole_only_inside

TENSORS_FILE = "adapter_model.safetensors"

METADATA = {"format": "pt"}
"""What transformers and PEFT expect in the metadata of every safetensors file."""

MODEL_PREFIX = "base_model.model."
LAMBDA_SUFFIX = ".randlora_lambda"
GAMMA_SUFFIX = ".randlora_gamma"
BASIS_A = "randlora_A"
BASIS_B = "randlora_B"
TOP_BASIS_A = f"base_model.{BASIS_A}"
TOP_BASIS_B = f"base_model.{BASIS_B}"
BASE_LAYER = "base_layer"

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """Return the FQN for a key from `trained_key` or PEFT, which puts all children of a layer one level down."""
    parts: list[str] = []
    levels = -1  # number of parts before the last one that was left out
    for part in key.removeprefix(MODEL_PREFIX).split("."):
        if part == BASE_LAYER and levels != len(parts) and ".".join(parts) in targets:
            levels = len(parts)
        else:
            parts.append(part)
    return ".".join(parts)


def basis_keys(r: int, ranks: AbstractSet[int]) -> tuple[str, str]:
    """Return the keys of A and B of rank r: PEFT's keys, followed by r if there are bases of several ranks."""
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


def master(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return Λ or Γ in float32, or in float64 if it is in float64."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.detach().to(device=device, dtype=dtype).contiguous()


def adapter_tensors(values: Mapping[str, tuple[Tensor, Tensor]], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Λ, Γ and the parameters trained with an adapter on the CPU, by key."""
    tensors = {}
    for fqn, diagonals in values.items():
        for key, diagonal in zip(value_keys(fqn, values), diagonals, strict=True):
            tensors[key] = master(diagonal, "cpu")
    for fqn, parameter in trained.items():
        tensors[trained_key(fqn, values)] = parameter.detach().to("cpu").contiguous()
    return tensors


class Value(NamedTuple):
    """A parameter or buffer to save."""

    name: str  # in messages
    parameter: Tensor  # which may be sharded
    shape: Sequence[int]  # which it must have
    is_buffer: bool = False
    is_diagonal: bool = False  # of Λ and Γ, which a file has in float32 or wider

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a file has it in."""
        own = self.parameter.dtype
        return torch.promote_types(own, torch.float32) if self.is_diagonal else own

    def problem(self, values: Tensor) -> str | None:
        """Return why values of it cannot be saved: not here, not whole, or not readable by `load`; else ``None``."""
        if not has_values(values):
            return f"{self.name} {_META}"
        if type(values.data) is not Tensor:
            return f"{self.name} is sharded, a {type(values.data).__name__}: gather it first"
        is_freed = values.untyped_storage().nbytes() < values.nbytes
        if is_freed or tuple(values.shape) != tuple(self.shape):
            found = "no memory" if is_freed else f"shape {tuple(values.shape)}"
            remedy = whole_only_inside(values) or "gather it if it is sharded, else adapt the model again"
            return f"{self.name} has {found} here, expected all of {tuple(self.shape)}: {remedy}"
        if (flaw := _flaw(values, is_buffer=self.is_buffer)) is not None:
            return f"{self.name} {flaw}, which cannot be loaded: go back to earlier values"
        return None

    def stored(self, values: Tensor) -> Tensor:
        """Return a copy of values of it as a file has them, on the CPU."""
        return values.detach().to("cpu", self.dtype, copy=True, memory_format=torch.contiguous_format)


def _flaw(tensor: Tensor, *, is_buffer: bool = False) -> str | None:
    """Return why no file may hold these values, as a phrase that follows the name, or ``None``."""
    dtypes = TORCH_DTYPES.values() if is_buffer else FLOATING
    if tensor.dtype not in dtypes:
        return f"holds {tensor.dtype}: expected one of {', '.join(map(str, dtypes))}"
    if is_buffer:  # such as a mask, which may be infinite
        return "holds NaN" if tensor.isnan().any() else None
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # in no further memory
        return "holds NaN or infinite values"
    return None


def is_text(name: str) -> bool:
    """Whether a name can be written to a file. Strings in Python may contain half of a character (a surrogate)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def meta_problems(values: Iterable[Value]) -> list[str]:
    """Return which parameters have no values."""
    return [f"{value.name} {_META}" for value in values if not has_values(value.parameter)]


_META = "holds no values to save (meta or fake): materialize the model first"


def file_problems(
    values: Mapping[str, tuple[Tensor, Tensor]],
    trained: Mapping[str, Tensor],
    bases: Mapping[int, tuple[Tensor, Tensor]],
    options: Mapping[str, LayerOptions],
    buffers: Container[str],
) -> list[str]:
    """Return what is wrong with the tensors in a file; ``buffers`` are the names in ``trained`` that are buffers."""
    named = {
        f"{fqn}{suffix}": part
        for fqn, pair in values.items()
        for suffix, part in zip((LAMBDA_SUFFIX, GAMMA_SUFFIX), pair, strict=True)
    }
    for r, pair in bases.items():
        named |= zip(basis_keys(r, bases.keys()), pair, strict=True)
    flaws = {name: _flaw(tensor) for name, tensor in named.items()}
    flaws |= {fqn: _flaw(tensor, is_buffer=fqn in buffers) for fqn, tensor in trained.items()}
    problems = [f"{name} {reason}" for name, reason in flaws.items() if reason is not None]
    return problems + _shape_problems(values, bases, options)


def _shape_problems(
    values: Mapping[str, tuple[Tensor, Tensor]],
    bases: Mapping[int, tuple[Tensor, Tensor]],
    options: Mapping[str, LayerOptions],
) -> list[str]:
    problems = []
    for fqn, (lam, gamma) in values.items():
        r = options[fqn].r
        if (
            lam.ndim not in (2, 3)  # 3 for a stack of matrices
            or gamma.ndim != lam.ndim
            or not lam.numel() * gamma.numel()
            or lam.shape != (*gamma.shape[:-2], r, gamma.shape[-2])
            or gamma.shape[-2] != count_bases(gamma.shape[-1], r)
        ):
            problems.append(
                f"{fqn} has randlora_lambda {tuple(lam.shape)} and randlora_gamma {tuple(gamma.shape)}: "
                f"expected ({r}, num_bases) and (num_bases, min_dim) with num_bases = ceil(min_dim / {r})"
            )
    for r, (basis_A, basis_B) in bases.items():
        shape_A, shape_B = tuple(basis_A.shape), tuple(basis_B.shape)
        min_dim = shape_A[-1] if shape_A else 0
        is_empty = not basis_A.numel() * basis_B.numel()
        if is_empty or shape_A != (r, 1, min_dim) or shape_B[1:] != (count_bases(min_dim, r), r) or len(shape_B) != 3:
            problems.append(f"the bases have shapes {shape_A} and {shape_B}, which do not fit r={r}")
    return problems

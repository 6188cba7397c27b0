"""What our files say beyond PEFT's fields, as one JSON text in the safetensors header."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor

from randlora.bases.spec import BasisSpec, drawn_dims, sliced_dims, spec_for
from randlora.checkpoint.layout import FORMAT_VERSION
from randlora.checkpoint.tensors_file import as_bytes
from randlora.config import RandLoRAConfig
from randlora.errors import CheckpointError

SEAL_WORD = "basis_sha256"  # stands in every header and in nothing else


@dataclass(frozen=True)
class Header:
    """The facts about an adapter that its tensors do not carry.

    Attributes:
        config: Its options, with the FQNs of its targets.
        spec: Its bases.
        shapes: ``(out_features, in_features)`` by target.
        basis_digest: SHA-256 of the values its layers use; see `Basis.digest`.
        is_reproducible: Whether ``spec`` brings the bases back; else the file must hold them.
    """

    config: RandLoRAConfig
    spec: BasisSpec
    shapes: dict[str, tuple[int, int]]
    basis_digest: str
    is_reproducible: bool

    @property
    def extent(self) -> tuple[int, int]:
        """``(max_dim, min_dim)`` that the targets slice."""
        return sliced_dims(self.shapes.values())

    @property
    def is_consistent(self) -> bool:
        """Whether the options name these bases, and the bases reach every target."""
        wanted = spec_for(self.config, *self.extent)
        drawn = self.spec.max_dim, self.spec.min_dim
        reached = self.spec.is_prefix_stable or all(map(operator.ge, drawn, self.extent))
        return wanted.family == self.spec.family and reached

    @property
    def rectangle(self) -> tuple[int, int]:
        """``(max_dim, min_dim)`` of the bases that PEFT would hold for the targets, at least `extent`."""
        return drawn_dims(self.shapes.values())


def dump_header(header: Header, tensors: Mapping[str, Tensor]) -> str:
    """Write a header as JSON, sealed with the SHA-256 of itself and of every tensor."""
    facts = {
        "basis": header.spec.to_dict(),
        "basis_sha256": header.basis_digest,
        "config": header.config.to_dict(),
        "format_version": FORMAT_VERSION,
        "is_reproducible": header.is_reproducible,
        "library_version": version("randlora"),
        "targets": {fqn: list(shape) for fqn, shape in header.shapes.items()},
    }
    return json.dumps({**facts, "sha256": _seal(facts, tensors)})


def parse_header(text: str, tensors: Mapping[str, Tensor]) -> Header:
    """Read a header back and check its seal.

    Args:
        text: What `dump_header` wrote.
        tensors: Every tensor of the file.

    Raises:
        CheckpointError: When it is of another format version, no header of ours, or something in the file was changed.
    """
    try:
        facts = json.loads(text)
        found = facts["format_version"]
        if found != FORMAT_VERSION:
            raise CheckpointError(
                f"the file has format version {found!r}, this library reads {FORMAT_VERSION}: install one that reads it"
            )
        seal = facts.pop("sha256")
        header = Header(
            config=RandLoRAConfig.from_dict(facts["config"]),
            spec=BasisSpec.from_dict(facts["basis"]),
            shapes={fqn: (int(out), int(in_)) for fqn, (out, in_) in facts["targets"].items()},
            basis_digest=facts["basis_sha256"],
            is_reproducible=bool(facts["is_reproducible"]),
        )
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"the file's header is damaged ({error}): get an undamaged copy") from error
    if seal != _seal(facts, tensors):
        raise CheckpointError("the file's contents do not match its checksum, it was damaged: get an undamaged copy")
    if not header.is_consistent:
        raise CheckpointError(
            f"the file's options, targets and {header.spec} contradict one another: it is no save of ours"
        )
    return header


def _seal(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(as_bytes(tensor.cpu().contiguous()).data)
    return digest.hexdigest()

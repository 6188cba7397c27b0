"""What an adapter's two files hold, from its options, its bases and its layers' shapes; no model is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from randlora.bases.basis import Basis
from randlora.checkpoint.header import Header, dump_header
from randlora.checkpoint.layout import CONFIG_FILE, HEADER_KEY, TENSORS_FILE, TOP_BASIS_A, TOP_BASIS_B
from randlora.checkpoint.write import Writer
from randlora.config import RandLoRAConfig

FORMAT = {"format": "pt"}
"""What transformers and PEFT want in the header of every safetensors file."""


def describe(
    config: RandLoRAConfig, basis: Basis, shapes: Mapping[str, tuple[int, int]], trained: Iterable[str]
) -> Header:
    """Make the header of an adapter.

    Args:
        config: Its options.
        basis: Its bases.
        shapes: ``(out_features, in_features)`` of its layers by FQN.
        trained: FQNs of the parameters trained beside it.
    """
    config = replace(config, targets=tuple(shapes), exclude=None, train_also=tuple(trained) or None)
    header = Header(config, basis.spec, dict(shapes), "", is_reproducible=basis.stored is None)
    if header.spec.is_prefix_stable:  # then what other adapters of the model made it grow to says nothing
        header = replace(header, spec=replace(header.spec, max_dim=header.rectangle[0], min_dim=header.rectangle[1]))
    return replace(header, basis_digest=basis.digest(*header.extent))


def stored_bases(basis: Basis, header: Header) -> dict[str, Tensor]:
    """Write the bases out over the rectangle that PEFT expects, as far as they were drawn."""
    basis = basis if basis.stored else Basis(basis.spec)  # so that the model's own do not grow
    written = basis.slices(*drawn_rectangle(basis, header), device="cpu", dtype=torch.float32)
    return {TOP_BASIS_A: written.A.contiguous(), TOP_BASIS_B: written.B.contiguous()}


def drawn_rectangle(basis: Basis, header: Header) -> tuple[int, int]:
    """Return what of PEFT's rectangle, ``(max_dim, min_dim)``, the bases can fill."""
    spec = basis.spec
    if spec.is_prefix_stable:
        return header.rectangle
    return min(spec.max_dim, header.rectangle[0]), min(spec.min_dim, header.rectangle[1])


def peft_can_draw(basis: Basis, header: Header) -> bool:
    """Whether PEFT draws these bases from the seed, for the adapter's layers alone."""
    spec = basis.spec
    return basis.stored is None and spec.stream == "torch" and (spec.max_dim, spec.min_dim) == header.rectangle


def file_writers(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Header | None = None
) -> dict[str, Writer]:
    """Say how both files are written.

    Args:
        fields: What ``adapter_config.json`` holds.
        tensors: Contiguous, on the CPU.
        header: What goes into the header of the tensors' file, if anything of ours does.
    """
    metadata = FORMAT | ({} if header is None else {HEADER_KEY: dump_header(header, tensors)})
    return {TENSORS_FILE: lambda path: write_tensors(path, tensors, metadata), CONFIG_FILE: json_writer(fields)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = FORMAT) -> None:
    """Write a safetensors file.

    Raises:
        OSError: When the disk refuses, for which safetensors has an exception of its own.
    """
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def json_writer(fields: Mapping[str, Any]) -> Writer:
    """Say how ``adapter_config.json`` is written."""
    text = json.dumps(dict(fields), indent=2)
    return lambda path: path.write_text(f"{text}\n", encoding="utf-8")

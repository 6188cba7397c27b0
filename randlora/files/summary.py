"""The summary that `randlora.files.inspect` returns, as fields and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from randlora.bases.spec import BasisSpec
from randlora.config import RandLoRAConfig
from randlora.report import as_bytes, table

DIGEST_SHOWN = 12

BasisSource = Literal["seed", "file"]


@dataclass(frozen=True)
class BasisSummary:
    """The bases of an adapter.

    Attributes:
        spec: Kind, stream, seed, rank, dims and blocks.
        source: ``"seed"`` if the spec reproduces them, ``"file"`` if only the file holds them.
        digest: SHA-256 of the values that the layers use; see `randlora.bases.basis.Basis.digest`.
        nbytes: Their size in memory, in bytes.
    """

    spec: BasisSpec
    source: BasisSource
    digest: str
    nbytes: int


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes:
        fqn: Its FQN.
        min_dim: Its smaller dim.
        num_bases: Number of bases.
        trainable: Number of entries of its Λ and Γ.
        out_features: Output width; ``None`` if not known, because PEFT does not store it.
        in_features: Input width, likewise.
        frobenius: Frobenius norm of its update ΔW; ``None`` if it was not computed.
        spectral: The largest singular value of ΔW, likewise. If both dims are above 1024, a lower bound within a few
            percent.
    """

    fqn: str
    min_dim: int
    num_bases: int
    trainable: int
    out_features: int | None = None
    in_features: int | None = None
    frobenius: float | None = None
    spectral: float | None = None

    @property
    def stable_rank(self) -> float | None:
        """``(frobenius / spectral)²``, about the number of significant directions of the update; 0 if it is zero."""
        if self.frobenius is None or self.spectral is None:
            return None
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter on disk; prints as a table.

    Attributes:
        directory: Its directory.
        writer: The library that wrote it, with versions.
        storage: A description of where its bases are.
        base_model: The name of its base model, if stored.
        config: Its options.
        bases: Its bases; ``None`` if the file does not hold them and the layers' shapes are not known.
        layers: Its layers.
        trained: Shapes of the parameters trained with it, by FQN.
        trainable_parameters: Number of entries of Λ, Γ and those parameters.
        nbytes: Size of its files in bytes.
        unknown_fields: Fields of its JSON that are kept but not understood.
        notes: Other notes for the user.
    """

    directory: Path
    writer: str
    storage: str
    base_model: str | None
    config: RandLoRAConfig
    bases: BasisSummary | None
    layers: tuple[LayerSummary, ...]
    trained: dict[str, tuple[int, ...]]
    trainable_parameters: int
    nbytes: int
    unknown_fields: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return facts, a table of layers, and totals."""
        return "\n".join([*self._facts(), *self._layers(), *self._totals(), *self.notes])

    def _facts(self) -> Iterator[str]:
        yield f"RandLoRA adapter in {self.directory}, {as_bytes(self.nbytes)}, written by {self.writer}"
        yield f"base model: {self.base_model or 'not stored'}"
        yield f"r={self.config.r}, alpha={self.config.effective_alpha:g}, dropout={self.config.dropout:g}"
        if self.bases is None:
            yield f"bases: {self.config.basis}, seed={self.config.seed}; {self.storage}"
        else:
            yield f"{self.bases.spec}; {self.storage}"
            yield f"SHA-256 of the bases {self.bases.digest[:DIGEST_SHOWN]}…, {as_bytes(self.bases.nbytes)} in memory"

    def _layers(self) -> list[str]:
        headings = ("layer", "in", "out", "num_bases", "trainable", "‖ΔW‖F", "‖ΔW‖2", "stable rank")
        rows = [
            (
                layer.fqn,
                "?" if layer.in_features is None else layer.in_features,
                "?" if layer.out_features is None else layer.out_features,
                layer.num_bases,
                layer.trainable,
                *(
                    "-" if norm is None else f"{norm:.3g}"
                    for norm in (layer.frobenius, layer.spectral, layer.stable_rank)
                ),
            )
            for layer in self.layers
        ]
        return table(headings, rows)

    def _totals(self) -> Iterator[str]:
        yield f"{len(self.layers)} layers, {self.trainable_parameters:,} trained parameters"
        for fqn, shape in self.trained.items():
            yield f"trained with it: {fqn} {'x'.join(map(str, shape)) or 'scalar'}"
        if self.unknown_fields:
            yield f"fields of the JSON that are not understood: {', '.join(self.unknown_fields)}"

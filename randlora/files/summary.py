"""What `randlora.files.inspect` found, as fields and as text."""

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
        source: ``"seed"`` where the spec brings them back, ``"file"`` where only the file holds them.
        digest: SHA-256 of the values that the layers use; see `randlora.bases.bank.Basis.digest`.
        nbytes: Bytes that they take in memory.
    """

    spec: BasisSpec
    source: BasisSource
    digest: str
    nbytes: int


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes:
        fqn: Its name.
        min_dim: Its smaller side.
        num_bases: Bases summed in it.
        trainable: Numbers in its Λ and Γ.
        out_features: Output width; ``None`` where the files do not say, as PEFT's do not.
        in_features: Input width, likewise.
        frobenius: Frobenius norm of its update ΔW; ``None`` where it was not computed.
        spectral: The largest singular value of ΔW, likewise; of a layer whose sides are all above 1024 a lower bound
            that is within a few percent.
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
        """``(frobenius / spectral)²``: how many directions carry the update; 0 for an update of zeros."""
        if self.frobenius is None or self.spectral is None:
            return None
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter on disk; prints as a table.

    Attributes:
        directory: Where it is.
        writer: What wrote it, with versions.
        storage: Where its bases are, in words.
        base_model: What it says it was trained on.
        config: Its options.
        bases: Its bases; ``None`` where neither the file holds them nor the layers' shapes are known.
        layers: Its layers.
        trained: Shapes of the parameters trained beside it, by FQN.
        trainable_parameters: Numbers in Λ, Γ and those parameters.
        nbytes: Bytes of its files.
        unknown_fields: Fields of its JSON that this library does not know, and keeps.
        notes: What else the user should know.
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
        """Lay it out: facts, a table of layers, totals."""
        return "\n".join([*self._facts(), *self._layers(), *self._totals(), *self.notes])

    def _facts(self) -> Iterator[str]:
        yield f"RandLoRA adapter in {self.directory}, {as_bytes(self.nbytes)}, written by {self.writer}"
        yield f"base model: {self.base_model or 'not said'}"
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
                *(_number(value) for value in (layer.frobenius, layer.spectral, layer.stable_rank)),
            )
            for layer in self.layers
        ]
        return table(headings, rows)

    def _totals(self) -> Iterator[str]:
        yield f"{len(self.layers)} layers, {self.trainable_parameters:,} trained parameters"
        for fqn, shape in self.trained.items():
            yield f"trained beside it: {fqn} {'x'.join(map(str, shape)) or 'scalar'}"
        if self.unknown_fields:
            yield f"fields of the JSON that are not understood: {', '.join(self.unknown_fields)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"

"""What a verb did or would do: figures as fields, and a table to print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from randlora.bases.spec import BasisSpec, count_bases
from randlora.config import RandLoRAConfig
from randlora.layers.folding import RoundingLoss
from randlora.layers.registry import find_layer
from randlora.targets.select import Selection, Target
from randlora.targets.walk import named_parameters

FLOAT32_BYTES = 4
HEADINGS = ("count", "in", "out", "r", "num_bases", "rank", "trainable")


@dataclass(frozen=True)
class ShapeRow:
    """All targets of one shape.

    Attributes:
        count: How many there are.
        in_features: Input width.
        out_features: Output width.
        r: Rank of one basis.
        num_bases: Bases summed in one layer.
        expected_rank: Rank a trained update can reach.
        trainable: Trainable parameters of all of them.
    """

    count: int
    in_features: int
    out_features: int
    r: int
    num_bases: int
    expected_rank: int
    trainable: int


@dataclass(frozen=True)
class Report:
    """What `randlora.inject` did, or `randlora.plan` and `randlora.load` found; prints as a table.

    Attributes:
        name: The adapter's name.
        config: Its options.
        rule: The rule that chose the targets, in words.
        targets: FQNs of the adapted layers.
        rows: One for each distinct shape.
        spec: The bases, dims included.
        trainable_parameters: Numbers that training changes once the adapter may train, with those of ``train_also``.
        total_parameters: Numbers of the model and this adapter together; a quantized weight counts as many as it
            stands for, however many it stores.
        basis_bytes: Bytes the bases take in memory, as stored; those shared with other adapters included.
        checkpoint_bytes: Bytes `randlora.save` writes of tensors, with ``bases="seed"``.
        train_also: FQNs of the parameters trained beside the adapter.
        skipped: Linear layers passed over, with the reason, by FQN.
        notes: What else the user should know.
    """

    name: str
    config: RandLoRAConfig
    rule: str
    targets: tuple[str, ...]
    rows: tuple[ShapeRow, ...]
    spec: BasisSpec
    trainable_parameters: int
    total_parameters: int
    basis_bytes: int
    checkpoint_bytes: int
    train_also: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable_parameters / self.total_parameters

    def __str__(self) -> str:
        """Lay the report out as a table of shapes, then the totals."""
        rows = [
            (row.count, row.in_features, row.out_features, row.r, row.num_bases, row.expected_rank, row.trainable)
            for row in self.rows
        ]
        lines = [
            f"RandLoRA adapter {self.name!r}: {self.spec}, alpha={self.config.effective_alpha:g}",
            f"targets: {self.rule}",
            *table(HEADINGS, rows),
            f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({self.share:.2%})",
            f"{len(self.targets)} layers adapted",
            f"bases {as_bytes(self.basis_bytes)} in memory, checkpoint {as_bytes(self.checkpoint_bytes)}",
        ]
        if self.train_also:
            lines.append(f"trained beside it: {shortened(self.train_also)}")
        lines += [f"left out: {shortened(fqns)} ({reason})" for reason, fqns in self._skipped_by_reason().items()]
        return "\n".join([*lines, *self.notes])

    def _skipped_by_reason(self) -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {}
        for fqn, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(fqn)
        return reasons


@dataclass(frozen=True)
class MergeReport:
    """What `randlora.merge` folded in.

    Attributes:
        adapters: Names and weights of the adapters folded in.
        targets: FQNs of the layers whose weight changed.
        kept: Whether `randlora.unmerge` can take it back.
        errors: What rounding to codes did to each layer that was quantized again, by FQN.
        notes: What else the user should know.
    """

    adapters: dict[str, float]
    targets: tuple[str, ...]
    kept: bool
    errors: dict[str, RoundingLoss] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it on one line, what rounding to codes did on two more, then the notes."""
        names = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in self.adapters.items())
        ending = "reversible with randlora.unmerge" if self.kept else "plain layers are back"
        return "\n".join([f"merged {names} into {len(self.targets)} layers; {ending}", *self._rounding(), *self.notes])

    def _rounding(self) -> list[str]:
        if not self.errors:
            return []
        shares = {fqn: error.relative for fqn, error in self.errors.items()}
        worst = max(shares, key=lambda fqn: shares[fqn])
        error, spread = self.errors[worst], f"{min(shares.values()):.1%} to {shares[worst]:.1%}"
        return [
            f"{len(self.errors)} layers quantized again: rounding took {spread} of the norm of what was merged in,",
            f"most in {worst}, by {error.largest:.3g} at most where levels lie {error.step:.3g} apart",
        ]


def adapter_report(
    model: nn.Module,
    name: str,
    config: RandLoRAConfig,
    selection: Selection,
    spec: BasisSpec,
    *,
    basis_bytes: int,
    train_also: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Count what one adapter of a model takes.

    Args:
        model: The model, adapted or not.
        name: The adapter's name.
        config: Its options.
        selection: Its targets.
        spec: Its bases.
        basis_bytes: Bytes of the bases it slices.
        train_also: FQNs of the parameters trained beside it.
        notes: Lines to print below the table.
    """
    rows = shape_rows(selection.targets, spec)
    adapter_size = sum(row.trainable for row in rows)
    own = {
        id(parameter): (fqn, parameter, count_numbers(module, attribute, parameter))
        for fqn, module, attribute, parameter in named_parameters(model)
        if not is_lazy(parameter)
    }
    beside = [parameter for fqn, parameter, _ in own.values() if fqn in set(train_also)]
    return Report(
        name=name,
        config=config,
        rule=selection.rule,
        targets=tuple(target.fqn for target in selection.targets),
        rows=rows,
        spec=spec,
        trainable_parameters=adapter_size + sum(parameter.numel() for parameter in beside),
        total_parameters=adapter_size + sum(count for _, _, count in own.values()),
        basis_bytes=basis_bytes,
        checkpoint_bytes=FLOAT32_BYTES * adapter_size + sum(parameter.nbytes for parameter in beside),
        train_also=tuple(train_also),
        skipped=selection.skipped,
        notes=tuple(notes),
    )


def count_numbers(module: nn.Module, attribute: str, parameter: nn.Parameter) -> int:
    """Count the numbers a parameter stands for: bytes of codes may hold two each, words more."""
    layer_class = find_layer(module)
    if attribute == "weight" and isinstance(layer_class, type):
        return math.prod(layer_class.features(module))
    if (state := getattr(parameter, "quant_state", None)) is not None:  # of an embedding of bitsandbytes
        return math.prod(state.shape)
    return parameter.numel()


def standing(name: str, *, is_active: bool, is_trainable: bool) -> list[str]:
    """Say what an adapter does not do yet, and how to let it."""
    notes = []
    if not is_active:
        notes.append(f"inactive for now: randlora.activate(model, {name!r}) lets it act")
    if not is_trainable:
        notes.append(f"frozen for now: randlora.activate(model, {name!r}, trainable=True) lets it train")
    return notes


def shape_rows(targets: Iterable[Target], spec: BasisSpec) -> tuple[ShapeRow, ...]:
    """Count targets by shape, in order of appearance."""
    counts = Counter((target.in_features, target.out_features) for target in targets)
    rows = []
    for (in_features, out_features), count in counts.items():
        min_dim = min(in_features, out_features)
        num_bases = count_bases(min_dim, spec.r)
        rank = spec.expected_rank(out_features, in_features)
        trainable = count * num_bases * (spec.r + min_dim)
        rows.append(ShapeRow(count, in_features, out_features, spec.r, num_bases, rank, trainable))
    return tuple(rows)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lay out rows right-aligned under their headings, numbers with separators."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [headings, *cells]
    ]


def as_bytes(count: float) -> str:
    """Write a number of bytes in the largest decimal unit that leaves at least one."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def shortened(fqns: Sequence[str], most: int = 4) -> str:
    """Name the first few layers, and count the others."""
    return ", ".join(fqns[:most]) + (f" and {len(fqns) - most} more" if len(fqns) > most else "")

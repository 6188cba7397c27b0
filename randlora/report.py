"""What a verb did or would do: figures as fields, and a table to print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.nn.parameter import is_lazy

from randlora.bases.spec import BasisSpec, count_bases
from randlora.config import RandLoRAConfig
from randlora.layers.folding import RoundingLoss
from randlora.layers.registry import find_layer
from randlora.targets.site import Shapes
from randlora.targets.walk import Census, Held

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
        is_active: Whether the adapter's update is added.
        is_trainable: Whether its parameters require grad.
        train_also: FQNs of the parameters trained beside the adapter.
        skipped: Layers passed over, with the reason, by FQN.
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
    is_active: bool = True
    is_trainable: bool = True
    train_also: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """Whether the adapter acts and trains, in words: ``"active, trainable"`` or ``"inactive, frozen"``, say."""
        return f"{'active' if self.is_active else 'inactive'}, {'trainable' if self.is_trainable else 'frozen'}"

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
        trains = "trainable" if self.is_trainable else "frozen"
        lines = [
            f"RandLoRA adapter {self.name!r}: {self.spec}, alpha={self.config.effective_alpha:g}",
            f"targets: {self.rule}",
            *table(HEADINGS, rows),
            f"{trains} {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({self.share:.2%})",
            f"{len(self.targets)} layers adapted, {self.status}",
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
        reversible: Whether `randlora.unmerge` can take it back.
        rounding: What rounding to codes did to each layer that was quantized again, by FQN.
        notes: What else the user should know.
    """

    adapters: dict[str, float]
    targets: tuple[str, ...]
    reversible: bool
    rounding: dict[str, RoundingLoss] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line, two more on what rounding to codes did, then the notes."""
        names = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in self.adapters.items())
        ending = "reversible with randlora.unmerge" if self.reversible else "plain layers are back"
        return "\n".join([
            f"merged {names} into {len(self.targets)} layers; {ending}",
            *self._rounding_lines(),
            *self.notes,
        ])

    def _rounding_lines(self) -> list[str]:
        if not self.rounding:
            return []
        shares = {fqn: loss.relative for fqn, loss in self.rounding.items()}
        worst = max(shares, key=lambda fqn: shares[fqn])
        loss, spread = self.rounding[worst], f"{min(shares.values()):.1%} to {shares[worst]:.1%}"
        return [
            f"{len(self.rounding)} layers quantized again: rounding took {spread} of the norm of what was merged in,",
            f"most in {worst}, by {loss.largest:.3g} at most where levels lie {loss.step:.3g} apart",
        ]


def adapter_report(
    census: Census,
    name: str,
    config: RandLoRAConfig,
    shapes: Shapes,
    spec: BasisSpec,
    *,
    rule: str,
    basis_bytes: int,
    is_active: bool = True,
    is_trainable: bool = True,
    skipped: Mapping[str, str] | None = None,
    train_also: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Count what one adapter of a model takes.

    Args:
        census: The model, adapted or not.
        name: The adapter's name.
        config: Its options.
        shapes: ``(out_features, in_features)`` of the weights it goes on, by FQN.
        spec: Its bases.
        rule: The rule that chose the weights, in words.
        basis_bytes: Bytes of the bases it slices.
        is_active: Whether its update is added.
        is_trainable: Whether its parameters require grad.
        skipped: Layers that were passed over, with the reason, by FQN.
        train_also: FQNs of the parameters trained beside it.
        notes: Lines to print below the table.
    """
    rows = shape_rows(shapes, spec)
    adapter_size = sum(row.trainable for row in rows)
    own = {id(held.parameter): held for held in reversed(census.parameters) if not is_lazy(held.parameter)}
    beside = [held.parameter for held in own.values() if held.fqn in set(train_also)]
    return Report(
        name=name,
        config=config,
        rule=rule,
        targets=tuple(shapes),
        rows=rows,
        spec=spec,
        trainable_parameters=adapter_size + sum(parameter.numel() for parameter in beside),
        total_parameters=adapter_size + sum(map(count_numbers, own.values())),
        basis_bytes=basis_bytes,
        checkpoint_bytes=FLOAT32_BYTES * adapter_size + sum(parameter.nbytes for parameter in beside),
        is_active=is_active,
        is_trainable=is_trainable,
        train_also=tuple(train_also),
        skipped=dict(skipped or {}),
        notes=tuple(notes),
    )


def count_numbers(held: Held) -> int:
    """Return how many numbers a parameter stands for: bytes of codes may hold two each, words more."""
    layer_class = find_layer(held.module)
    if held.attribute == "weight" and isinstance(layer_class, type):
        return math.prod(layer_class.features(held.module))
    if (state := getattr(held.parameter, "quant_state", None)) is not None:  # of an embedding of bitsandbytes
        return math.prod(state.shape)
    return held.parameter.numel()


def next_steps(name: str, *, is_active: bool, is_trainable: bool) -> list[str]:
    """Return how to let an adapter act and train, where it does not yet."""
    notes = []
    if not is_active:
        notes.append(f"inactive for now: randlora.activate(model, {name!r}) lets it act")
    if not is_trainable:
        notes.append(f"frozen for now: randlora.activate(model, {name!r}, trainable=True) lets it train")
    return notes


def shape_rows(shapes: Shapes, spec: BasisSpec) -> tuple[ShapeRow, ...]:
    """Count weights by shape, in order of appearance."""
    counts = Counter(shapes.values())
    rows = []
    for (out_features, in_features), count in counts.items():
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

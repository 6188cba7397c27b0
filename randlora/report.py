"""Reports of what a function did or would do. Figures are fields, and reports print as tables."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from itertools import accumulate

from torch.nn.parameter import is_lazy

from randlora.bases.spec import BasisSpec, count_bases, count_trainable, reach_all
from randlora.config import Factor, RandLoRAConfig
from randlora.errors import spelled
from randlora.hints import NotTheModel
from randlora.layers.weight import RoundingLoss
from randlora.replaced import whole_shape
from randlora.state import Adapter
from randlora.targets.census import Census, Shapes, is_norm
from randlora.targets.left_out import LeftOut
from randlora.targets.match import shortened
from randlora.targets.options import first_learning_rate, lora_parameters
from randlora.targets.select import NEW_HEADS

FLOAT32_BYTES = 4
WIDTH = 80
HEADINGS = ("kind", "count", "in", "out", "r", "alpha", "num_bases", "rank", "trainable")


@dataclass(frozen=True)
class ShapeRow:
    """All targets of one kind, shape, r and alpha.

    Attributes:
        kind: Their kind, as `AdapterLayer.kind`.
        count: Number of matrices, each with its own Λ and Γ.
        expected_rank: Rank that a trained update can reach.
        trainable: Number of trainable parameters in all of them.
    """

    kind: str
    count: int
    in_features: int
    out_features: int
    r: int
    alpha: float
    num_bases: int
    expected_rank: int
    trainable: int


@dataclass(frozen=True)
class Report(NotTheModel):
    """The report of `randlora.inject`, `randlora.plan` and `randlora.load`; prints as a table.

    Attributes:
        name: The adapter's name.
        config: Its options.
        rule: A description of the rule that chose the targets.
        targets: FQNs of the adapted layers.
        rows: One row for each distinct kind, shape, r and alpha.
        specs: The specs of the bases with their dims, one for each r.
        trainable_parameters: Number of parameters that the adapter trains, or would if it were not frozen, including
            those of ``train_also``; a Γ with ``train="lambda"`` is not among them.
        total_parameters: Number of parameters of the model and this adapter. A quantized weight counts with its
            dequantized size.
        basis_bytes: Bytes of the stored bases in memory, including those shared with other adapters.
        checkpoint_bytes: Bytes of the tensors that `randlora.save` writes with ``bases="seed"``.
        is_active: Whether the adapter's update is added.
        is_trainable: Whether its parameters require grad.
        train_also: FQNs of the parameters trained with the adapter.
        train_rows: Rows of tables trained with the adapter, by FQN.
        buffers: FQNs of the buffers that the adapter has copies of, such as those of norms that it trains.
        skipped: Reasons why layers were skipped, by FQN.
        left_out: Other matrices that default targets, ``"all-linear"`` or ``"all"`` leave out, by kind. Every parameter
            with two or more dimensions is adapted, trained with the adapter, skipped or left out. Empty if the user
            named or described the targets.
        warning: The warning of `randlora.inject` and `randlora.plan` if the default adapts only a head or almost
            nothing; else empty.
        learning_rate: The learning rate to try first, with Adam and a short warm-up. For long runs, use down to a tenth
            of it. ``None`` if the adapter is frozen.
        lora_rank: The rank of a LoRA on the same layers with as many parameters as are trained in Λ and Γ.
        notes: Other notes for the user.
    """

    name: str
    config: RandLoRAConfig
    rule: str
    targets: tuple[str, ...]
    rows: tuple[ShapeRow, ...]
    specs: tuple[BasisSpec, ...]
    trainable_parameters: int
    total_parameters: int
    basis_bytes: int
    checkpoint_bytes: int
    is_active: bool = True
    is_trainable: bool = True
    train_also: tuple[str, ...] = ()
    train_rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    warning: str = ""
    learning_rate: float | None = None
    lora_rank: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all parameters."""
        return self.trainable_parameters / self.total_parameters

    def __str__(self) -> str:
        acts, trains = "active" if self.is_active else "inactive", "trainable" if self.is_trainable else "frozen"
        layers = f"{len(self.targets)} layer{'s' * (len(self.targets) != 1)}"
        lora_rank = f"{self.lora_rank:,.0f}" if self.lora_rank >= 10 else f"{self.lora_rank:.2g}"
        alphas = dict.fromkeys(f"{row.alpha:g}" for row in self.rows)
        is_alone = self.config.train == "lambda"
        title = f"RandLoRA adapter {self.name!r}: alpha={', '.join(alphas)}"
        head = [title, *map(str, self.specs), f"targets: {self.rule}"]
        text = [
            f"{trains} {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({self.share:.2%})",
            f"{layers} adapted, about LoRA r = {lora_rank} in size, {acts}, {trains}" + ", Λ alone" * is_alone,
            f"bases {as_bytes(self.basis_bytes)} in memory, checkpoint {as_bytes(self.checkpoint_bytes)}",
        ]
        if also := [*self.train_also, *rows_in_words(self.train_rows)]:
            text.append(f"also trained: {shortened(also)}")
        if self.buffers:
            text.append(f"its own buffers: {shortened(self.buffers)}")
        if (rate := self.learning_rate) is not None:
            text.append(
                f"learning rate to try first: {rate:.2g}, after a short warm-up; for long runs down to a tenth (for "
                f"layers of width {typical_min_dim(self.rows):,}, the median)"
            )
        warning = [f"warning: {self.warning}"] if self.warning else []
        text += [*by_reason("left out", self.skipped), *map(str, self.left_out), *warning, *self.notes]
        return "\n".join([*wrapped(head), *_row_table(self.rows), *wrapped(text)])


@dataclass(frozen=True)
class MergeReport(NotTheModel):
    """The report of `randlora.merge`.

    Attributes:
        adapters: Names of the merged adapters, and their factors as in `AdapterInfo.weight`.
        targets: FQNs of the layers whose weight changed.
        reversible: Whether `randlora.unmerge` can undo the merge.
        rounding: The rounding error of each requantized layer, by FQN.
        notes: Other notes for the user.
    """

    adapters: dict[str, Factor]
    targets: tuple[str, ...]
    reversible: bool
    rounding: dict[str, RoundingLoss] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(with_factor(name, factor) for name, factor in self.adapters.items())
        ending = "reversible with randlora.unmerge" if self.reversible else "the layers are plain again"
        lines = [f"merged {names} into {len(self.targets)} layers; {ending}"]
        if self.rounding:
            worst = max(self.rounding, key=lambda fqn: self.rounding[fqn].relative)
            loss, least = self.rounding[worst], min(loss.relative for loss in self.rounding.values())
            spread = f"{least:.1%} to {loss.relative:.1%}"
            lines += [
                f"{len(self.rounding)} layers requantized: the rounding error is {spread} of the norm of the update,",
                f"largest in {worst}: up to {loss.largest:.3g}, with levels up to {loss.step:.3g} apart",
            ]
        return "\n".join([*lines, *self.notes])


def with_factor(name: str, factor: Factor) -> str:
    """Return the name of an adapter with the factor of its update."""
    if isinstance(factor, Mapping):
        acts = sum(map(bool, factor.values()))
        return f"{name} with a factor for each layer ({acts} of {len(factor)} are not 0)"
    return name if factor == 1 else f"{factor:g} x {name}"


def rows_in_words(rows: Mapping[str, Sequence[int]]) -> list[str]:
    """Return how many rows of each table are trained."""
    return [f"{len(own)} row{'s' * (len(own) != 1)} of {fqn}" for fqn, own in rows.items()]


def by_reason(what: str, reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with the first few of its names: ``"left out: a, b (too large)"``."""
    names: dict[str, list[str]] = {}
    for fqn, reason in reasons.items():
        names.setdefault(reason, []).append(fqn)
    return [f"{what}: {shortened(fqns)} ({reason})" for reason, fqns in names.items()]


def adapter_report(
    census: Census,
    adapter: Adapter,
    shapes: Shapes,
    *,
    is_active: bool = True,
    is_trainable: bool = True,
    notes: Sequence[str] = (),
) -> Report:
    """Return the report of one adapter of a model, with these layers, whether it has been added or not."""
    sites = {fqn: census.sites_by_fqn[fqn] for fqn in shapes}
    rows = shape_rows(shapes, {fqn: site.layer_class.kind for fqn, site in sites.items()}, adapter)
    trained = sum(row.trainable for row in rows)
    adapter_size = sum(count_trainable(shape, adapter.options[fqn].r) for fqn, shape in shapes.items())
    first = {id(held.tensor): held for held in reversed(census.parameters) if not is_lazy(held.tensor)}
    beside = [held.tensor for held in first.values() if held.fqn in adapter.trained]
    widths = {held.fqn: whole_shape(held.tensor)[-1] for held in census.parameters if held.fqn in adapter.rows}
    in_rows = sum(len(rows) * widths[fqn] for fqn, rows in adapter.rows.items())
    scaling = max((abs(options.scaling) for options in adapter.options.values()), default=0.0)
    lora_rank = trained / lora_parameters(sites.values()) if sites else 0.0
    lambda_rank = lora_rank if adapter.config.train == "lambda" else None
    return Report(
        name=adapter.name,
        config=adapter.config,
        rule=adapter.rule,
        targets=tuple(shapes),
        rows=rows,
        specs=tuple(basis.spec for basis in adapter.bases.values()),
        trainable_parameters=trained + in_rows + sum(math.prod(whole_shape(parameter)) for parameter in beside),
        total_parameters=adapter_size + in_rows + census.size,
        basis_bytes=sum(basis.nbytes for basis in adapter.bases.values()),
        checkpoint_bytes=FLOAT32_BYTES * (adapter_size + in_rows)
        + sum(math.prod(whole_shape(copy)) * copy.itemsize for copy in adapter.trained.values()),
        is_active=is_active,
        is_trainable=is_trainable,
        train_also=tuple(adapter.parameters),
        train_rows=dict(adapter.rows),
        buffers=tuple(adapter.buffers),
        learning_rate=first_learning_rate(scaling, typical_min_dim(rows), lambda_rank) if is_trainable else None,
        lora_rank=lora_rank,
        notes=(*notes, *_notes(census, adapter, shapes, is_trainable=is_trainable)),
    )


def typical_min_dim(rows: Sequence[ShapeRow]) -> int:
    """Return the median of the smaller sides of the adapted layers, each counted as often as it has parameters."""
    sides = sorted((min(row.in_features, row.out_features), row.trainable) for row in rows)
    upto = [*accumulate(trainable for _, trainable in sides)]
    return next((side for (side, _), count in zip(sides, upto, strict=True) if 2 * count >= upto[-1]), 1)


def next_steps(name: str, *, is_active: bool, is_trainable: bool) -> list[str]:
    """Return notes on how to activate and train an adapter that is inactive or frozen."""
    inactive = [] if is_active else [f"inactive: call randlora.activate(model, {name!r}) to add its update"]
    frozen = [] if is_trainable else [f"frozen: call randlora.set_trainable(model, {name!r}) to train it"]
    return inactive + frozen


def _notes(census: Census, adapter: Adapter, shapes: Shapes, *, is_trainable: bool) -> Iterator[str]:
    """Yield notes on what may not be meant: updates that stay partly zero, and new heads that are frozen."""
    for r, basis in adapter.bases.items():
        sides = {fqn: min(shape[-2:]) for fqn, shape in shapes.items() if adapter.options[fqn].r == r}
        blocks = basis.spec.blocks
        if blocks and (split := [fqn for fqn, side in sides.items() if not reach_all(blocks, count_bases(side, r))]):
            zero = f"blocks={blocks} leave entries of the update always zero in {shortened(split)}"
            yield f"{zero}, which have few bases: a new adapter leaves none by default"
    if is_trainable and any(census.sites_by_fqn[fqn].layer_class.is_quantized for fqn in shapes):
        if any(held.tensor.dtype.itemsize < FLOAT32_BYTES for held in census.parameters if is_norm(held.module)):
            yield "quantized, with norms in 16 bits: call randlora.prepare_quantized(model) before inject"
        if getattr(census.model, "is_quantized", False):  # as transformers says
            yield "quantized: transformers' Trainer refuses it; use randlora.integrations.transformers.AdapterTrainer"
    heads = dict.fromkeys(held.fqn.partition(".")[0] for held in census.parameters)
    changed = {fqn.partition(".")[0] for fqn in (*adapter.trained, *adapter.targets)}
    for head in heads if is_trainable else ():
        if head in NEW_HEADS - changed:
            yield f"frozen: {head}; if it is new, with random values, give {spelled('train_also', head)}"


def shape_rows(shapes: Shapes, kinds: Mapping[str, str], adapter: Adapter) -> tuple[ShapeRow, ...]:
    """Return a row for each kind and shape with its r and alpha, in order of appearance."""
    counts = Counter((kinds[fqn], shape, adapter.options[fqn]) for fqn, shape in shapes.items())
    return tuple(
        ShapeRow(
            kind,
            count * math.prod(stack),
            in_features,
            out_features,
            r,
            alpha,
            num_bases=count_bases(min(out_features, in_features), r),
            expected_rank=min(
                adapter.bases[r].spec.expected_rank(out_features, in_features),
                r if adapter.config.train == "lambda" else min(out_features, in_features),
            ),
            trainable=count * count_trainable((*stack, out_features, in_features), r, adapter.config.train),
        )
        for (kind, (*stack, out_features, in_features), (r, alpha)), count in counts.items()
    )


def _row_table(rows: Sequence[ShapeRow]) -> list[str]:
    """Return the table of rows, without the columns of kinds and alphas where these would say nothing."""
    says = {"kind": any(row.kind != "linear" for row in rows), "alpha": len({row.alpha for row in rows}) != 1}
    cells = [dict(zip(HEADINGS, astuple(row), strict=True)) | {"alpha": f"{row.alpha:g}"} for row in rows]
    shown = [heading for heading in HEADINGS if says.get(heading, True)]
    return table(shown, [[row[heading] for heading in shown] for row in cells])


def wrapped(lines: Iterable[str]) -> list[str]:
    """Return lines of at most 80 columns, continued in indented lines. No name is broken."""
    fill = partial(textwrap.wrap, width=WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [part for line in lines for part in fill(line)]


def as_lines(parts: Iterable[str]) -> str:
    """Return text with one line for each part. Line breaks in names are escaped."""
    return "\n".join(part.replace("\n", "\\n") for part in parts)


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a table, right-aligned, with thousands separators."""
    lines = [headings, *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.rjust, line, widths)) for line in lines]


def as_bytes(count: float) -> str:
    """Return a number of bytes in the largest decimal unit in which it is at least 1."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"

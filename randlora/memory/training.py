"""`TrainingMemory`: the bytes that training an adapter takes on each device, and the formulas."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_type_hints

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from randlora.bases.basis import Basis
from randlora.errors import ConfigError, raise_collected
from randlora.hints import mistyped
from randlora.layers.diagonals import diagonal_shapes
from randlora.layers.read_weight import ReadWeight
from randlora.memory.parts import SHARED_INPUT, SPLIT_DIMS, Part, style_of
from randlora.memory.pieces import Piece, pieces_by_device
from randlora.memory.temporary import pair_of, peak_beside
from randlora.memory.work import Work, block_bases, work_of
from randlora.options import Strategy
from randlora.report import FLOAT32_BYTES, as_bytes, table
from randlora.state import Adapter
from randlora.targets.site import Site
from randlora.targets.walk import Census

SIZES = (
    *("weights", "parameters", "gradients", "optimizer", "bases", "communication"),
    *("inputs", "block_inputs", "logits", "temporary"),
)
META = torch.device("meta")
GATHERED_BLOCKS = 2
"""Blocks that FSDP2 has gathered at once: the one that computes, and the next, which arrives meanwhile."""

BESIDE_A_LOGIT = 3 * FLOAT32_BYTES
"""Bytes that a loss in float32 has beside each logit at its height: the logarithm of a probability, two gradients."""


@dataclass(frozen=True)
class TrainingMemory:
    """The bytes that training an adapter takes on each device; prints as a table.

    What depends on the model's own code is not counted: see `UNKNOWN`. Not all rows are at their height at once.

    Attributes:
        devices: The number of devices.
        strategy: How parameters are divided among them.
        tokens: Tokens of a step on each device; 0 if not given, and then nothing that depends on them is counted.
        dtype: The dtype that the model is held and computed in.
        weights: The model's parameters, also those that are trained copies of, and its buffers.
        parameters: Λ and Γ in float32, and the copies of ``train_also``, also in float32 at least.
        gradients: The same size.
        optimizer: That size ``optimizer_states`` times.
        bases: The random bases in the form that is computed with. All of them on every device, however it is divided,
            and with ``"tp"`` what is made of them for its parts of the layers: the most of any device.
        communication: With ``"fsdp2"`` the parameters outside of blocks and two blocks, gathered, with the gradients of
            one; with ``"ddp"`` the buckets, which are as large as the gradients.
        inputs: What adapted layers keep from forward to backward: their inputs, and the sum of weight and update where
            other code reads that.
        block_inputs: With activation checkpointing the input of each block, from which it is computed again.
        logits: The output of the model's head at the height of transformers' loss, which is in float32. None without
            ``get_output_embeddings``, by which transformers' language models name their head.
        temporary: The most that an adapted layer takes at the height of its step beyond what the frozen one takes.
        host: The bases as drawn, in the memory of each process, from which the copies on a device are made.
        optimizer_states: Numbers that the optimizer keeps for each trained one, two for AdamW.
        work: The work of a step in the adapted layers, in multiples of LoRA's; ``None`` without tokens.
    """

    devices: int
    strategy: Strategy
    tokens: int
    dtype: torch.dtype
    weights: int
    parameters: int
    gradients: int
    optimizer: int
    bases: int
    communication: int
    inputs: int
    temporary: int
    host: int
    optimizer_states: int = 2
    block_inputs: int = 0
    logits: int = 0
    work: Work | None = None

    @property
    def total(self) -> int:
        """The sum of what a device holds, without ``host``."""
        return sum(getattr(self, name) for name in SIZES)

    def __str__(self) -> str:
        """Return a table, and what is not in it."""
        return "\n".join([self.title, *table(("", ""), self.lines)[1:], *self.notes])

    @property
    def title(self) -> str:
        """What the sizes are of."""
        spread = f"each of {self.devices} devices, {self.strategy}" if self.devices > 1 else "one device"
        return f"memory for training on {spread}, {str(self.dtype).removeprefix('torch.')}:"

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The rows of the table."""
        gathered = "gathered" if self.strategy == "fsdp2" else "buckets of DDP"
        sizes = {
            "the model": self.weights,
            "the adapter": self.parameters,
            "its gradients": self.gradients,
            f"optimizer, {self.optimizer_states} numbers for each": self.optimizer,
            "bases": self.bases,
            gathered: self.communication,
            f"kept by layers for {self.tokens:,} tokens": self.inputs,
            "inputs of blocks": self.block_inputs,
            "logits and their loss": self.logits,
            "most of one layer": self.temporary,
            "together": self.total,
        }
        always = ("the model", "the adapter", "its gradients", "optimizer", "bases", "together")
        return [(name, as_bytes(size)) for name, size in sizes.items() if size or name.startswith(always)]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the table leaves out."""
        kept = () if self.tokens else ("not counted without tokens: what layers keep for backward, logits, work",)
        work = () if self.work is None else (str(self.work),)
        return (*kept, UNKNOWN, f"beside the devices: bases as drawn, {as_bytes(self.host)} for each process", *work)


UNKNOWN = "not counted: what else the model itself keeps for backward, fragmentation, the context of a GPU"


@dataclass(frozen=True)
class Setup:
    """How an adapter is trained: the options of `randlora.training_memory`, which describes them."""

    devices: int = 1
    strategy: Strategy = "ddp"
    tokens: int = 0
    dtype: torch.dtype | None = None
    tp_plan: Mapping[str, str] | None = None
    optimizer_states: int = 2
    checkpointing: bool = False
    device_type: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        """Check the options."""
        hints, doing = get_type_hints(Setup), "plan the memory of training"
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = [problem for name, value in given.items() for problem in mistyped(value, hints[name], name)]
        raise_collected(ConfigError, wrong, doing=doing)
        least = {"devices": 1, "tokens": 0, "optimizer_states": 0}
        problems = [
            f"{name} must be at least {low}, got {given[name]}" for name, low in least.items() if given[name] < low
        ]
        if self.dtype is not None and not self.dtype.is_floating_point:
            problems.append(f"dtype must be a floating one, got {self.dtype}")
        raise_collected(ConfigError, problems, doing=doing)


@dataclass(frozen=True, eq=False)
class Training:
    """An adapter of a model and how it is trained: everything that the formulas depend on.

    Attributes:
        census: The model.
        adapter: The adapter, with bases that need not be drawn.
        sites: The weights that it adapts.
        setup: How it is trained.
        stored: Bytes of the parameters that are not held in their own dtype, as quantized ones, by FQN.
    """

    census: Census
    adapter: Adapter
    sites: tuple[Site, ...]
    setup: Setup
    stored: Mapping[str, int]

    def memory(self) -> TrainingMemory:
        """Return the sizes."""
        trained = sum(map(self.held, self.trained))
        whole = sum(map(self.held, self.frozen)) + sum(each.nbytes for each in self.census.model.buffers())
        bases, host = self._bases()
        return TrainingMemory(
            self.setup.devices,
            self.setup.strategy,
            self.setup.tokens,
            self.compute_dtype,
            weights=whole,
            parameters=trained,
            gradients=trained,
            optimizer=self.setup.optimizer_states * trained,
            bases=bases,
            communication=self._communication(trained) if self.setup.devices > 1 else 0,
            inputs=self._inputs() if self.setup.tokens else 0,
            temporary=self._temporary() if self.setup.tokens else 0,
            block_inputs=self._block_inputs() if self.setup.checkpointing else 0,
            logits=self._logits(),
            work=self._work() if self.setup.tokens else None,
            host=host,
            optimizer_states=self.setup.optimizer_states,
        )

    @cached_property
    def tp_plan(self) -> Mapping[str, str]:
        """The style of each layer under tensor parallelism: as given, or the model's own."""
        own: Mapping[str, str] = getattr(self.census.model, "tp_plan", None) or {}
        styles = own if self.setup.tp_plan is None else self.setup.tp_plan
        if self.setup.strategy == "tp" and not styles:
            raise ConfigError("strategy='tp' needs tp_plan, because the model has no plan of its own")
        return styles

    def held(self, part: Part) -> int:
        """Return the bytes of a parameter that a device holds."""
        if self.setup.strategy == "fsdp2" and part.is_registered:
            return part.shard_bytes(self.setup.devices)
        if self.setup.strategy == "tp":
            return part.split_bytes(self.setup.devices, style_of(part.fqn, self.tp_plan))
        return part.nbytes

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        """The dtype given, or that of the first adapted weight that has a floating one."""
        dtypes = [site.weight.dtype for site in self.sites if site.weight is not None]
        return self.setup.dtype or next((each for each in dtypes if each.is_floating_point), torch.bfloat16)

    @cached_property
    def frozen(self) -> tuple[Part, ...]:
        """The model's own parameters, each once."""
        own = {id(held.parameter): held for held in reversed(self.census.parameters) if not is_lazy(held.parameter)}
        parts = []
        for held in own.values():
            shape, itemsize = tuple(held.parameter.shape), self._itemsize(held.parameter)
            if held.fqn in self.stored:
                shape, itemsize = (self.stored[held.fqn],), 1
            parts.append(Part(held.fqn, shape, itemsize, self._group(held.fqn), held.fqn not in self.adapter.trained))
        return tuple(parts)

    @cached_property
    def trained(self) -> tuple[Part, ...]:
        """Λ and Γ of every layer, and the copies of the parameters that are trained with them."""
        diagonals = [
            Part("", shape, FLOAT32_BYTES, self._group(site.fqn))
            for site in self.sites
            for shape in diagonal_shapes(site.shape_with(self.adapter.config), self.adapter.options[site.fqn].r)
        ]
        return (
            *diagonals,
            *(
                Part(fqn, tuple(parameter.shape), max(self._itemsize(parameter), FLOAT32_BYTES), self._group(fqn))
                for fqn, parameter in self.adapter.parameters.items()
            ),
        )

    @cached_property
    def pieces(self) -> frozenset[frozenset[Piece]]:
        """What the devices compute of the updates, for those that differ in that."""
        bases = self.adapter.bases
        return pieces_by_device(self._matrices, self.setup.devices, lambda r: bases[r].spec.blocks or (1, 1))

    @cached_property
    def _matrices(self) -> frozenset[tuple[Piece, int | None]]:
        """The different matrices of updates, with the dimension that a plan of tensor parallelism splits."""
        found = set()
        for site in self.sites:
            *_, out_features, in_features = site.shape_with(self.adapter.config)
            rows = math.ceil(self._rows_of(site) / _matrices(site))
            dim = SPLIT_DIMS.get(style_of(site.fqn, self.tp_plan) or "") if self.setup.strategy == "tp" else None
            if dim is not None:
                dim = (dim + site.layer_class.is_transposed) % 2
            found.add((Piece((out_features, in_features), self.adapter.options[site.fqn].r, rows), dim))
        return frozenset(found)

    def _itemsize(self, tensor: torch.Tensor) -> int:
        converted = self.setup.dtype is not None and tensor.dtype.is_floating_point
        return self.compute_dtype.itemsize if converted else tensor.dtype.itemsize

    @cached_property
    def _blocks(self) -> frozenset[str]:
        """The FQNs of the entries of outermost module lists: what is gathered, or computed again, at once."""
        lists = [visit.fqn for visit in self.census.visits if isinstance(visit.module, nn.ModuleList)]
        outer = [fqn for fqn in lists if not any(fqn.startswith(f"{other}.") for other in lists)]
        return frozenset(
            visit.fqn for visit in self.census.visits for fqn in outer if visit.fqn.rpartition(".")[0] == fqn
        )

    def _group(self, fqn: str) -> str:
        parts = fqn.split(".")
        names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return next((name for name in names if name in self._blocks), "")

    def _bases(self) -> tuple[int, int]:
        """Return the bytes of the bases on a device, the most of any, and in the memory of the process."""
        working = 0
        for pieces in self.pieces:
            bases = self._on_meta()
            for piece in pieces:
                pair_of(piece, bases[piece.r], self.compute_dtype)
            working = max(working, sum(basis.working_nbytes for basis in bases.values()))
        return working, sum(basis.nbytes for basis in self.adapter.bases.values())

    def _on_meta(self) -> dict[int, Basis]:
        """Return bases of the same specs that have no values."""
        return {r: Basis(basis.spec, basis.extent) for r, basis in self.adapter.bases.items()}

    def _communication(self, trained: int) -> int:
        """Return what the engine holds beside what is the device's own."""
        if self.setup.strategy == "ddp":
            return trained
        if self.setup.strategy == "tp":
            return 0
        groups: dict[str, int] = defaultdict(int)
        for part in (*self.frozen, *self.trained):
            groups[part.group] += part.nbytes * part.is_registered
        gradients: dict[str, int] = defaultdict(int)
        for part in self.trained:
            gradients[part.group] += part.nbytes
        root, blocks = groups.pop("", 0), sorted(groups.values(), reverse=True)
        return root + sum(blocks[:GATHERED_BLOCKS]) + max(gradients.values(), default=0)

    def _inputs(self) -> int:
        """Return what adapted layers keep; those that a plan of tensor parallelism gives one input keep it once."""
        kept: dict[str, dict[Any, int]] = defaultdict(dict)
        for site in self.sites:
            key, size = self._kept(site)
            kept[self._group(site.fqn)][key] = size
        sizes = {group: sum(found.values()) for group, found in kept.items()}
        if not self.setup.checkpointing:
            return sum(sizes.values())
        return sizes.pop("", 0) + max(sizes.values(), default=0)

    def _kept(self, site: Site) -> tuple[Any, int]:
        """Return what an adapted layer keeps, with a key that is equal for layers that keep the same."""
        shape, kind = site.shape_with(self.adapter.config), site.layer_class.kind
        style = style_of(site.fqn, self.tp_plan)
        itemsize = self.compute_dtype.itemsize
        part = Part(site.fqn, (self._rows_of(site), shape[-1]), itemsize)
        is_row = self.setup.strategy == "tp" and (style or "").startswith("rowwise")
        size = part.split_bytes(self.setup.devices, "rowwise") if is_row else part.nbytes
        if kind in ("embedding", "convolution"):
            size = 0  # of an embedding the ids, which are the model's; how large a convolution's input is, is not known
        is_read = issubclass(site.layer_class, ReadWeight) and kind in ("attention", "convolution", "linear")
        if is_read and (kind != "linear" or self._is_read(site)):
            size += math.prod(shape) * itemsize  # weight + update, formed where it is read
        parent = site.fqn.rpartition(".")[0]
        return ((parent, shape[-1]) if style == SHARED_INPUT else site.fqn), size

    def _is_read(self, site: Site) -> bool:
        """Whether code reads a linear layer's weight, other than a trainer, which may read an output head's."""
        return site.key in self.census.read or not site.layer_class.takes_dropout(site.owner)

    def _rows_of(self, site: Site) -> int:
        """Return the rows that a weight is multiplied by: each token once for each expert of a stack it is sent to."""
        if site.layer_class.kind != "experts":
            return self.setup.tokens
        routes = getattr(getattr(self.census.model, "config", None), "num_experts_per_tok", None)
        return self.setup.tokens * (routes if isinstance(routes, int) else _matrices(site))

    def _block_inputs(self) -> int:
        """Return the bytes of the inputs of all blocks, each as wide as its first weight or norm."""
        widths = {part.group: part.shape[-1] for part in reversed(self.frozen) if part.group and part.shape}
        return self.setup.tokens * sum(widths.values()) * self.compute_dtype.itemsize

    def _logits(self) -> int:
        """Return the bytes of the logits and of what a loss makes of them."""
        head = getattr(self.census.model, "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        words = weight.shape[0] if isinstance(weight, torch.Tensor) else 0
        return self.setup.tokens * words * (self.compute_dtype.itemsize + BESIDE_A_LOGIT)

    def _work(self) -> Work | None:
        """Return the work of a step, without embeddings, which have none, and convolutions, of inputs not known."""
        matrices: Counter[Piece] = Counter()
        shapes = {site.fqn: site.shape_with(self.adapter.config) for site in self.sites}
        for site in self.sites:
            if site.layer_class.kind not in ("embedding", "convolution"):
                *_, out_features, in_features = shapes[site.fqn]
                rows = math.ceil(self._rows_of(site) / _matrices(site))
                piece = Piece((out_features, in_features), self.adapter.options[site.fqn].r, rows)
                matrices[piece] += _matrices(site)
        bases = self._on_meta(), block_bases(self.adapter, shapes)
        forwards = 2 if self.setup.checkpointing else 1
        return work_of(matrices, *bases, self.compute_dtype, self.setup.device_type, forwards=forwards)

    def _temporary(self) -> int:
        bases, dtype, device_type = self._on_meta(), self.compute_dtype, self.setup.device_type
        pieces = frozenset[Piece]().union(*self.pieces)
        return max((peak_beside(piece, bases[piece.r], dtype, device_type) for piece in pieces), default=0)


def _matrices(site: Site) -> int:
    """Return the number of matrices that a weight is made of."""
    if site.layer_class.kind != "experts" or site.weight is None:
        return 1
    return site.weight.shape[0]

"""`training_memory`: the bytes that training an adapter takes on each device, as sums over the layers of a model.

Nothing is run. `tests/test_model_memory.py` compares the sums with measurements.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from randlora.bases.spec import Shape, count_bases
from randlora.config import RandLoRAConfig, Strategy, further_options
from randlora.errors import ConfigError, raise_collected, spelled
from randlora.hints import mistyped
from randlora.layers.diagonals import diagonal_shapes
from randlora.layers.in_place import plain_class
from randlora.layers.linear import Conv1DAdapter, LinearAdapter
from randlora.model.activations import kept_by_block, logits_and_backward, products_of
from randlora.model.inject import Plan, make_plan
from randlora.model.view import opened_to_add
from randlora.report import FLOAT32_BYTES, as_bytes, table
from randlora.targets.census import Census, Site
from randlora.targets.obstacles import tied_names

GATHERED_BLOCKS = 2
"""Blocks that FSDP2 has gathered at once: the one that computes, and the next one, which is on its way."""
HELD = ("weights", "parameters", "gradients", "optimizer", "bases", "communication", "activations")
UNKNOWN = "not counted: attention that keeps its weights, convolutions' inputs, fragmentation, the context of a GPU"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How an adapter is trained: the options of `training_memory`, which describes them."""

    devices: int = 1
    strategy: Strategy = "ddp"
    tokens: int = 0
    dtype: torch.dtype | None = None
    optimizer_states: int = 2
    checkpointing: bool = False
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        hints, least = get_type_hints(Setup), {"devices": 1, "tokens": 0, "optimizer_states": 0}
        given = {field.name: getattr(self, field.name) for field in fields(Setup)}
        problems = [problem for name, value in given.items() for problem in mistyped(value, hints[name], name)]
        problems = problems or [
            f"{name} must be at least {low}, got {given[name]}" for name, low in least.items() if given[name] < low
        ]
        if isinstance(self.dtype, torch.dtype) and not self.dtype.is_floating_point:
            problems.append(f"dtype must be a floating one, got {self.dtype}")
        raise_collected(ConfigError, problems, doing="plan the memory of training")


@dataclass(frozen=True, kw_only=True)
class TrainingMemory(Setup):
    """The bytes that training an adapter takes on each device, within about 15 %; prints as a table.

    The options of `training_memory` are fields too; ``dtype`` is the one in which the model computes.

    Attributes:
        weights: The model's parameters, including those that an adapter trains copies of, and its buffers.
        parameters: Λ and Γ in float32, and the copies of ``train_also`` in float32 or wider.
        gradients: As large as ``parameters``.
        optimizer: ``optimizer_states`` times as large as ``parameters``.
        bases: All random bases on every device, in the form in which they are multiplied.
        communication: With ``"fsdp2"``, the gathered parameters outside of blocks and of two blocks, and the gradients
            of one block. With ``"ddp"``, the buckets, which are as large as the gradients.
        activations: Tensors kept from forward to backward. With activation checkpointing, the input of each block.
        logits: The output of the model's head, and the float32 tensors of transformers' loss.
        backward: The most that the backward of a block takes. With activation checkpointing, this includes the
            activations of the block.
    """

    weights: int
    parameters: int
    gradients: int
    optimizer: int
    bases: int
    communication: int
    activations: int
    logits: int
    backward: int

    @property
    def total(self) -> int:
        """The most that a device holds at once. Logits are freed before a block computes backward."""
        held: list[int] = [getattr(self, name) for name in HELD]
        return sum(held) + max(self.logits, self.backward)

    def __str__(self) -> str:
        """Return a table, and what is not in it."""
        spread = f"each of {self.devices} devices, {self.strategy}" if self.devices > 1 else "one device"
        how_well = ", within 15 %" if self.tokens else ""
        last = "logits and their loss" if self.logits > self.backward else "backward of a block"
        rows = {
            "the model": self.weights,
            "the adapter": self.parameters,
            "its gradients": self.gradients,
            f"optimizer, {self.optimizer_states} numbers for each": self.optimizer,
            "bases": self.bases,
            "gathered" if self.strategy == "fsdp2" else "buckets of DDP": self.communication,
            f"kept for backward of {self.tokens:,} tokens": self.activations,
            last: max(self.logits, self.backward),
            "together": self.total,
        }
        shown = [(name, as_bytes(size)) for name, size in rows.items() if size or "optimizer" in name]
        dtype = str(self.dtype).removeprefix("torch.") + ", weights in 4 bits" * self.load_in_4bit
        lines = [f"memory for training on {spread}, {dtype}{how_well}:", *table(("", ""), shown)[1:]]
        if not self.tokens:
            lines.append("not counted without tokens: what is kept for backward, logits")
        return "\n".join([*lines, UNKNOWN])


@further_options(RandLoRAConfig)
def training_memory(
    model: nn.Module,
    r: int | Mapping[str, int] | None = None,
    *,
    like_lora: int | None = None,
    devices: int = 1,
    strategy: Strategy = "ddp",
    tokens: int = 0,
    dtype: torch.dtype | None = None,
    optimizer_states: int = 2,
    checkpointing: bool = False,
    load_in_4bit: bool = False,
    config: RandLoRAConfig | None = None,
    **options: Any,
) -> TrainingMemory:
    """Return the memory that training a new adapter takes on each device, estimated within about 15 %.

    The estimate is computed from sizes, so the model may be on the meta device.

    Args:
        model: A model, which is not changed.
        r: As for `randlora.inject`.
        like_lora: As for `randlora.inject`.
        devices: The number of devices.
        strategy: ``"ddp"``: each device has everything. ``"fsdp2"``: each has a shard of every parameter, and blocks
            (the entries of module lists) are gathered when they compute.
        tokens: Tokens of a step on each device, to count activations and logits.
        dtype: The dtype in which the model is held and computes. ``None`` means the dtype of each parameter.
        optimizer_states: Numbers that the optimizer keeps for each trained parameter: two for AdamW, one for SGD with
            momentum.
        checkpointing: Whether backward recomputes blocks, so that only one block at a time keeps its activations.
        load_in_4bit: Whether bitsandbytes holds linear layers in 4 bits, as in a model that transformers loads with
            ``BitsAndBytesConfig(load_in_4bit=True)``. Embeddings and the output head are not quantized.
        config: As for `randlora.inject`.
        **options: The other options of `RandLoRAConfig`.

    Returns:
        The sizes as fields. Prints as a table that also says what is not counted.

    Raises:
        ConfigError: If numbers are negative, or ``load_in_4bit`` is given for a model that is quantized already.
        RandLoRAError: Any error that `randlora.plan` would raise.
    """
    asked = locals()
    setup = Setup(**{name: value for name, value in asked.items() if name in Setup.__dataclass_fields__})
    return memory_of(model, r, setup, {}, like_lora=like_lora, config=config, **options)


def memory_of(
    model: nn.Module, r: int | Mapping[str, int] | None, setup: Setup, stored: Mapping[str, int], **options: Any
) -> TrainingMemory:
    """Return the result of `training_memory`; ``stored`` has the bytes of quantized parameters, by FQN."""
    asked = {"name": "default", "active": True, "trainable": True, "r": r, **options}
    with opened_to_add(model, ["default"], "inject") as view:
        plan = make_plan(view, asked)
    census = plan.census
    stored = {**held_codes(census), **stored}
    if setup.load_in_4bit:
        if stored or any(site.layer_class.is_quantized for site in census.sites):  # codes may be buffers
            option = spelled("load_in_4bit", value=True)
            raise ConfigError(f"{option} is for a model that is not quantized, but this one is: leave it out")
        stored = planned_codes(census)
    dtypes = [site.weight.dtype for site in plan.selection.sites if site.weight is not None]
    dtype = setup.dtype or next((each for each in dtypes if each.is_floating_point), torch.bfloat16)
    block = _block_of(census)
    own, trained = _own_parts(plan, setup, stored, block), _trained_parts(plan, setup, block)
    trained_size = sum(_held(part, setup) for part in trained)
    products = products_of(plan, setup.tokens)
    activations = kept_by_block(plan, products, setup.tokens, dtype, block)
    logits, backward = logits_and_backward(plan, products, setup.tokens, dtype, stored.keys())
    kept = activations.total()
    if setup.checkpointing:
        widths = {part.block: part.shape[-1] for part in reversed(own) if part.block and part.shape}
        backward += max((size for name, size in activations.items() if name), default=0)
        kept = activations[""] + setup.tokens * sum(widths.values()) * dtype.itemsize
    return TrainingMemory(
        **{**vars(setup), "dtype": dtype},
        weights=sum(_held(part, setup) for part in own) + sum(buffer.nbytes for buffer in model.buffers()),
        parameters=trained_size,
        gradients=trained_size,
        optimizer=setup.optimizer_states * trained_size,
        bases=_bases(plan, dtype),
        communication=_communication(own, trained, setup),
        activations=kept,
        logits=logits,
        backward=backward,
    )


class _Part(NamedTuple):
    """A parameter of a block. FSDP2 shards those that are registered."""

    block: str
    shape: Shape
    itemsize: int
    is_registered: bool = True

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def _itemsize(tensor: torch.Tensor, setup: Setup) -> int:
    return (setup.dtype if setup.dtype and tensor.dtype.is_floating_point else tensor.dtype).itemsize


def _own_parts(plan: Plan, setup: Setup, stored: Mapping[str, int], block: Callable[[str], str]) -> list[_Part]:
    """Return the model's own parameters, each once."""
    return [
        _Part(block(fqn), (stored[fqn],), 1)
        if fqn in stored
        else _Part(block(fqn), tuple(each.shape), _itemsize(each, setup), fqn not in plan.adapter.trained)
        for fqn, _, _, each in {id(held.tensor): held for held in reversed(plan.census.parameters)}.values()
        if not is_lazy(each)
    ]


def _trained_parts(plan: Plan, setup: Setup, block: Callable[[str], str]) -> list[_Part]:
    """Return Λ and Γ, and the copies of the model's parameters."""
    adapter = plan.adapter
    diagonals = [
        _Part(block(site.fqn), shape, FLOAT32_BYTES)
        for site in plan.selection.sites
        for shape in diagonal_shapes(site.shape_with(adapter.config), adapter.options[site.fqn].r)
    ]
    return diagonals + [
        _Part(block(fqn), tuple(each.shape), max(_itemsize(each, setup), FLOAT32_BYTES))
        for fqn, each in adapter.parameters.items()
    ]


def _held(part: _Part, setup: Setup) -> int:
    """Return the bytes of a parameter that a device holds."""
    if setup.strategy == "ddp" or not part.is_registered or not part.nbytes:
        return part.nbytes
    rows = part.shape[0] if part.shape else 1  # equally many on all devices
    return math.ceil(rows / setup.devices) * (part.nbytes // rows)


def _communication(own: list[_Part], trained: list[_Part], setup: Setup) -> int:
    """Return what the engine holds beside what is the device's own."""
    if setup.devices == 1:
        return 0
    if setup.strategy == "ddp":
        return sum(part.nbytes for part in trained)
    gathered, gradients = Counter[str](), Counter[str]()
    for part in (*own, *trained):
        gathered[part.block] += part.nbytes * part.is_registered
    for part in trained:
        gradients[part.block] += part.nbytes
    root = gathered.pop("", 0)
    return root + sum(size for _, size in gathered.most_common(GATHERED_BLOCKS)) + max(gradients.values(), default=0)


def _bases(plan: Plan, dtype: torch.dtype) -> int:
    """Return the bytes of the copies of the bases that are computed with: A in float32 at least, B in the dtype."""
    total = 0
    for r, basis in plan.adapter.bases.items():
        (c, b), (max_dim, min_dim) = basis.spec.blocks or (1, 1), basis.extent
        total += max(dtype.itemsize, FLOAT32_BYTES) * r * math.ceil(min_dim / c)
        total += dtype.itemsize * max_dim * r * count_bases(min_dim, r) // b
    return total


def _block_of(census: Census) -> Callable[[str], str]:
    """Return a function that gives the block of a layer or a parameter: an entry of an outermost module list, or ""."""
    lists = [visit.fqn for visit in census.visits if isinstance(visit.module, nn.ModuleList)]
    outer = [re.escape(fqn) for fqn in lists if not any(fqn.startswith(f"{other}.") for other in lists)]
    entry = re.compile(rf"(?:{'|'.join(outer)})\.\d+(?=\.|$)")
    return lambda fqn: "" if (found := entry.match(fqn)) is None else found[0]


BLOCK, LEVELS = 64, 16
"""In bitsandbytes, 64 weights share a scale and a layer has 16 levels, both in float32. This is its default; scales may
also be quantized."""


def held_codes(census: Census) -> dict[str, int]:
    """Return the bytes of the quantized weights of a model, with their scales, by the FQN of a parameter."""
    fqns = {id(held.tensor): held.fqn for held in reversed(census.parameters)}
    sites = (site for site in census.sites if site.layer_class.is_quantized and id(site.weight) in fqns)
    return {fqns[id(site.weight)]: site.layer_class.nbytes_of(site.owner) for site in sites}


def planned_codes(census: Census) -> dict[str, int]:
    """Return the bytes that weights would have that transformers loads in 4 bits, with their scales, by FQN.

    These are the linear layers but for the head, the last layer, tied ones, and what the class keeps in float32.
    """
    last = census.parameters[-1].fqn.removesuffix(".weight") if census.parameters else ""
    kept: Any = getattr(census.model, "_keep_in_fp32_modules", None)
    names = [last, *(kept or ())]
    sites = [site for site in census.sites if _is_linear(site) and site.owner is not census.head]
    tied = tied_names(census, sites)
    counts = {
        f"{site.fqn}.weight": math.prod(site.shape)
        for site in sites
        if site.key not in tied
        and not any(site.fqn.endswith(name) or f"{site.fqn}.".startswith(f"{name}.") for name in names)
    }
    scales = {fqn: math.ceil(count / BLOCK) + LEVELS for fqn, count in counts.items()}
    return {fqn: math.ceil(count / 2) + FLOAT32_BYTES * scales[fqn] for fqn, count in counts.items()}


def _is_linear(site: Site) -> bool:
    kind, is_linear = site.layer_class, plain_class(site.owner) is nn.Linear
    return issubclass(kind, Conv1DAdapter) or (
        is_linear and (issubclass(kind, LinearAdapter) or kind is LinearAdapter.as_read)
    )

"""`training_memory`: the bytes that training an adapter takes on each device, as sums over the layers of a model."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import dropwhile
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from randlora.bases.spec import Shape, count_bases
from randlora.config import RandLoRAConfig, Strategy, further_options
from randlora.errors import ConfigError, named, raise_collected, spelled
from randlora.hints import mistyped
from randlora.layers.diagonals import diagonal_shapes
from randlora.layers.in_place import plain_class
from randlora.layers.linear import Conv1DAdapter
from randlora.model.inject import Plan, make_plan
from randlora.model.view import opened_to_add
from randlora.report import FLOAT32_BYTES, as_bytes, table
from randlora.targets.census import Census
from randlora.targets.left_out import tied_names

GATHERED_BLOCKS = 2  # that FSDP2 has at once: the one that computes, and the next one, which is on its way
IN_FLIGHT = 2  # gradients as wide as the widest layer that backward has at once
BESIDE_A_LOGIT = 3 * FLOAT32_BYTES  # at the peak of a loss in float32: the logarithm of a probability, two gradients
BLOCK, LEVELS = 64, 16  # of bitsandbytes: weights that share a scale, levels of a layer, all in float32 by default
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
        given = {field.name: getattr(self, field.name) for field in fields(Setup)}
        hints, least = get_type_hints(Setup), {"devices": 1, "tokens": 0, "optimizer_states": 0}
        problems = [problem for name, value in given.items() for problem in mistyped(value, hints[name], named(name))]
        few = {name: low for name, low in least.items() if not problems and given[name] < low}
        problems += [f"{named(name)} must be at least {low}, got {given[name]}" for name, low in few.items()]
        if isinstance(self.dtype, torch.dtype) and not self.dtype.is_floating_point:
            problems.append(f"dtype must be a floating one, got {self.dtype}")
        raise_collected(ConfigError, problems, doing="plan the memory of training")


@dataclass(frozen=True, kw_only=True)
class TrainingMemory(Setup):
    """The bytes that training an adapter takes on each device, within about 15 %; prints as a table.

    The options of `training_memory` are fields too; ``dtype`` is the one in which the model computes.

    Attributes:
        weights: The model's parameters, including those that an adapter trains copies of, and its buffers.
        parameters: Λ, Γ and rows in float32, and the copies of ``train_also`` in float32 or wider.
        gradients: As large as ``parameters``.
        optimizer: ``optimizer_states`` times as large as ``parameters``.
        bases: All random bases on every device, in the form in which they are multiplied.
        communication: With ``"fsdp2"``, the gathered parameters outside of blocks and of two blocks, and the gradients
            of one block. With ``"ddp"``, the buckets, which are as large as the gradients.
        activations: Tensors kept from forward to backward. With activation checkpointing, the input of each block.
        logits: The output of the model's head, and the float32 tensors of transformers' loss.
        backward: The most that the backward of a block takes, with its activations if they are checkpointed.
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
        trained = self.parameters + self.gradients + self.optimizer
        held = self.weights + trained + self.bases + self.communication + self.activations
        return held + max(self.logits, self.backward)

    def __str__(self) -> str:
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
        optimizer_states: Numbers that the optimizer has per trained parameter: 2 for AdamW, 1 for SGD with momentum.
        checkpointing: Whether backward recomputes blocks, so that only one block at a time keeps its activations.
        load_in_4bit: Whether bitsandbytes holds linear layers in 4 bits, as in a model that transformers loads with
            ``BitsAndBytesConfig(load_in_4bit=True)``. Embeddings and the output head are not quantized.
        config: As for `randlora.inject`.
        **options: The other options of `RandLoRAConfig`.

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
    with opened_to_add(model, [], "plan") as view:
        while asked["name"] in view.state.adapters:  # which may stay beside it
            asked["name"] += "_"
        plan = make_plan(view, asked)
    census = plan.census
    fqns = {id(held.tensor): held.fqn for held in reversed(census.parameters)}
    coded = {id(site.weight): site for site in census.sites if site.layer_class.is_quantized}
    sizes = {fqns[key]: site.layer_class.nbytes_of(site.owner) for key, site in coded.items() if key in fqns}
    stored = sizes | {**stored}
    if setup.load_in_4bit:
        if stored or coded:  # codes may be buffers
            option = spelled("load_in_4bit", value=True)
            raise ConfigError(f"{option} is for a model that is not quantized, but this one is: leave it out")
        stored = planned_codes(census)
    dtypes = [site.weight.dtype for site in plan.selection.sites if site.weight is not None]
    dtype = setup.dtype or next((each for each in dtypes if each.is_floating_point), torch.bfloat16)
    block = _block_of(census)
    own, trained = _parts_of(plan, setup, stored, block)
    trained_size = sum(part.held(setup) for part in trained)
    activations, logits, backward = _activation_bytes(plan, setup.tokens, dtype, block)
    kept = activations.total()
    if setup.checkpointing:
        widths = {part.block: part.shape[-1] for part in reversed(own) if part.block and part.shape}
        backward += max((size for name, size in activations.items() if name), default=0)
        kept = activations[""] + setup.tokens * sum(widths.values()) * dtype.itemsize
    return TrainingMemory(
        **{**vars(setup), "dtype": dtype},
        weights=sum(part.held(setup) for part in own) + sum(buffer.nbytes for buffer in model.buffers()),
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

    def held(self, setup: Setup) -> int:
        if setup.strategy == "ddp" or not self.is_registered or not self.nbytes:
            return self.nbytes
        rows = self.shape[0] if self.shape else 1  # equally many on all devices
        return math.ceil(rows / setup.devices) * (self.nbytes // rows)


def _parts_of(
    plan: Plan, setup: Setup, stored: Mapping[str, int], block: Callable[[str], str]
) -> tuple[list[_Part], list[_Part]]:
    """Return the parameters that are frozen, each once, and those that are trained."""

    def itemsize(tensor: Tensor) -> int:
        return (setup.dtype if setup.dtype and tensor.dtype.is_floating_point else tensor.dtype).itemsize

    adapter = plan.adapter
    own = [
        _Part(block(fqn), (stored[fqn],), 1)
        if fqn in stored
        else _Part(block(fqn), tuple(each.shape), itemsize(each), fqn not in adapter.trained)
        for fqn, _, _, each in {id(held.tensor): held for held in reversed(plan.census.parameters)}.values()
        if not is_lazy(each)
    ]
    diagonals = [
        _Part(block(site.fqn), shape, FLOAT32_BYTES)
        for site in plan.selection.sites
        for shape in diagonal_shapes(site.shape_with(adapter.config), adapter.options[site.fqn].r)
    ]
    sizes = {fqn: max(itemsize(each), FLOAT32_BYTES) for fqn, each in adapter.parameters.items()}
    copies = [_Part(block(fqn), tuple(adapter.parameters[fqn].shape), size) for fqn, size in sizes.items()]
    rows = [_Part(block(each.fqn), (len(each.rows), each.weight.shape[-1]), FLOAT32_BYTES) for each in plan.tables]
    if adapter.config.train == "lambda":  # each Γ follows its Λ
        own, diagonals = own + diagonals[1::2], diagonals[::2]
    return own, diagonals + copies + rows


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


def _activation_bytes(
    plan: Plan, tokens: int, dtype: torch.dtype, block: Callable[[str], str]
) -> tuple[Counter[str], int, int]:
    """Return the bytes kept from forward to backward, by block, those of the logits, and the most in backward.

    This assumes the usual: each layer's output is kept by the next operation, the last layer of a module keeps its
    input, a gated MLP its gate, and norms written in Python their input in float32. Layers before the first that is
    trained keep nothing.
    """
    kept, widest, beside = Counter[str](), 0, 0
    if not tokens:
        return kept, 0, 0
    head, adapted = plan.census.head, plan.adapter.options
    trained = {*adapted, *(fqn.removesuffix(".weight") for fqn in plan.adapter.trained)}
    routes = getattr(getattr(plan.census.model, "config", None), "num_experts_per_tok", None)
    modules = defaultdict[str, list[_Product]](list)
    for site in dropwhile(lambda site: site.fqn not in trained, plan.census.sites):
        is_lost = site.owner is head or (site.weight is not None and is_lazy(site.weight))
        if is_lost or site.layer_class.kind in ("embedding", "convolution"):
            continue  # an embedding keeps ids; how large a convolution's input is, is not known
        *matrices, out_features, in_features = site.shape
        rows = tokens * (routes if matrices and isinstance(routes, int) else math.prod(matrices))
        small, large = sorted((out_features, in_features))
        widest = max(widest, rows * large)
        if site.fqn in adapted:  # the factor UA with two gradients in float32, and the update or what is between both
            factor = small * small * (2 * FLOAT32_BYTES + dtype.itemsize)
            beside = max(beside, factor + dtype.itemsize * small * min(large, rows))
        product = _Product(block(site.fqn), rows, out_features, in_features, site.fqn in trained)
        modules[site.fqn.rpartition(".")[0]].append(product)
    for *first, last in modules.values():
        between = sum(product.out_features for product in first)
        width = between + last.out_features
        width += sum({product.in_features for product in first if product.keeps_input})  # q, k and v have one input
        # what attention computes and a gate are kept for any last layer, which if trained keeps its own input too
        computes, is_gated = between not in (0, last.in_features), between == 2 * last.in_features and len(first) < 3
        width += last.in_features * (computes + (last.keeps_input and (is_gated or not computes)))
        kept[last.block] += dtype.itemsize * last.rows * width
    for visit in plan.census.first_visits:
        if "RMSNorm" not in type(visit.module).__name__:
            continue
        if (weight := visit.module._parameters.get("weight")) is not None:
            kept[block(visit.fqn)] += tokens * weight.numel() * max(0, FLOAT32_BYTES - dtype.itemsize)
    weight = getattr(head, "weight", None)
    words = weight.shape[0] if isinstance(weight, Tensor) else 0
    return kept, tokens * words * (dtype.itemsize + BESIDE_A_LOGIT), dtype.itemsize * IN_FLIGHT * widest + beside


class _Product(NamedTuple):
    """The product of tokens, ``rows`` for all matrices of a stack together, with the weight of a layer."""

    block: str
    rows: int
    out_features: int
    in_features: int
    keeps_input: bool  # because the weight has an update, or is trained itself


def _block_of(census: Census) -> Callable[[str], str]:
    """Return a function that gives the block of a layer or a parameter: an entry of an outermost module list, or ""."""
    lists = [visit.fqn for visit in census.visits if isinstance(visit.module, nn.ModuleList)]
    outer = [re.escape(fqn) for fqn in lists if not any(fqn.startswith(f"{other}.") for other in lists)]
    entry = re.compile(rf"(?:{'|'.join(outer)})\.\d+(?=\.|$)")
    return lambda fqn: "" if (found := entry.match(fqn)) is None else found[0]


def planned_codes(census: Census) -> dict[str, int]:
    """Return the bytes that weights would have that transformers loads in 4 bits, with their scales, by FQN."""
    # not the head, the last layer, tied ones, and what the class keeps in float32
    last = census.parameters[-1].fqn.removesuffix(".weight") if census.parameters else ""
    kept: Any = getattr(census.model, "_keep_in_fp32_modules", None)
    names, planned = [last, *(kept or ())], dict[str, int]()
    inner = [site for site in census.sites if site.owner is not census.head]
    sites = [
        each for each in inner if plain_class(each.owner) is nn.Linear or issubclass(each.layer_class, Conv1DAdapter)
    ]
    tied = tied_names(census, sites)
    for site in sites:
        is_kept = any(site.fqn.endswith(name) or f"{site.fqn}.".startswith(f"{name}.") for name in names)
        if not is_kept and site.key not in tied:
            count = math.prod(site.shape)
            scales = math.ceil(count / BLOCK) + LEVELS
            planned[f"{site.fqn}.weight"] = math.ceil(count / 2) + FLOAT32_BYTES * scales
    return planned

"""The state of an adapted model: its adapters, their bases, and the parameters trained with them.

One `ModelState` is a plain attribute of the module that `inject` was called on, so it is not in ``state_dict``, and it
is copied and pickled with the model. Every adapted layer refers to it, so disabling all adapters is one assignment.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing.context import get_spawning_popen
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from randlora.bases.basis import Basis, BasisBank
from randlora.bases.spec import Shape
from randlora.blocks import BLOCKS, Run
from randlora.config import Factor, Init, LayerOptions, RandLoRAConfig
from randlora.errors import AdapterError, TargetError, raise_collected, warn
from randlora.functional import Compute
from randlora.functional.scratch import is_in_backward
from randlora.hints import IN_PLACE, NotTheModel, shortly
from randlora.places import converted, loaded_modules, place_at, settle
from randlora.ranks import run_collectives
from randlora.replaced import ReplacedParameter, like, path_to

ATTRIBUTE = "randlora_state"

SavePretrained = Literal["adapter", "error", "model"]  # what it does for an adapted model: see `randlora.inject`

CHANGING = threading.RLock()
"""Held by the thread that checks and changes a model. Two threads merging one model at once would lose its weights."""


@dataclass(eq=False)
class Adapter:
    """One adapter of a model, shared by all its layers: bases by r, and options by FQN."""

    name: str
    config: RandLoRAConfig
    bases: dict[int, Basis]
    options: dict[str, LayerOptions]
    rule: str
    left_out: tuple[str, ...] = ()  # lines about layers that were left out, for its model card
    init: Init = "lambda"  # which of Λ and Γ started at zero; not in files, because no result depends on it
    weight: Factor | None = None  # the factor of its update while active, for each layer if they differ
    trained: dict[str, Tensor] = field(default_factory=dict)  # copies of parameters and of their modules' buffers
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)  # which of tables it trains, in order, by FQN
    peft_fields: dict[str, Any] = field(default_factory=dict)  # of its adapter_config.json, not used here, for saving

    @property
    def targets(self) -> tuple[str, ...]:
        """FQNs of its layers."""
        return tuple(self.options)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in ``trained``."""
        return {fqn: copy for fqn, copy in self.trained.items() if isinstance(copy, nn.Parameter)}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers in ``trained``."""
        return {fqn: copy for fqn, copy in self.trained.items() if not isinstance(copy, nn.Parameter)}

    @property
    def is_active(self) -> bool:
        """Whether its update is added."""
        return self.weight is not None

    def at(self, fqn: str, shape: Shape) -> SiteAdapter:
        """Return the adapter at one of its weights, given the shape of its update there."""
        options = self.options[fqn]
        return SiteAdapter(self, fqn, self.bases[options.r], shape, options)


@dataclass(eq=False)
class SiteAdapter:
    """One adapter at one adapted weight, with its bases there and the shape of its update."""

    adapter: Adapter
    fqn: str
    basis: Basis
    shape: Shape
    options: LayerOptions
    scaling: float = field(init=False)  # alpha / r, which each forward reads
    position: int | None = field(init=False, default=None)  # among the acting adapters of the weight

    def __post_init__(self) -> None:
        self.scaling = self.options.scaling

    @property
    def weight(self) -> float | None:
        """The factor of its update of this weight, or ``None`` if it does not act (inactive, or factor 0)."""
        weight = self.adapter.weight
        return (weight.get(self.fqn) if isinstance(weight, Mapping) else weight) or None


@dataclass(eq=False)
class Activation:
    """One choice of the active adapters, which layers prepare for."""

    is_current: bool = True  # by which a layer that was outside of the model can tell that there is a newer choice


class ExchangedWeight(NamedTuple):
    """A parameter of a module in place of which there is a merged one."""

    parameters: dict[str, Any]  # of the module
    layer: Any  # the adapter layer
    merged: Any  # the merged parameter


@dataclass(eq=False)
class ModelState:
    """The state of one adapted model."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    bank: BasisBank = field(default_factory=BasisBank)
    required_grad: dict[str, bool] = field(default_factory=dict)  # of parameters before the first adapter, by FQN
    replaced: dict[str, ReplacedParameter] = field(default_factory=dict)  # what adapters have copies of, by FQN
    buffers_before: dict[str, Tensor] = field(default_factory=dict)  # small ones, before the first adapter, by FQN
    disabled: list[object] = field(default_factory=list)  # open blocks of `randlora.disabled`, and of features
    runs: list[Run] = field(default_factory=list)  # those of these that are a `Run`, each of one thread or task
    around: dict[object, tuple[object, ...]] = field(default_factory=dict)  # of each, the blocks of its thread or task
    ended: list[object] = field(default_factory=list)  # closed blocks whose parameters are not restored yet
    merge_guards: list[RemovableHandle] = field(default_factory=list)  # hooks against losing or missing merged weights
    exchanged: list[ExchangedWeight] = field(default_factory=list)  # by the merge
    merged: dict[str, Factor] = field(default_factory=dict)  # the merged adapters, which stay active, with factors
    merge_options: Any = None  # of `randlora.merge`, as given: quantized and dtype
    merge_report: Any = None
    merged_block: list[str] | None = None  # the adapters that the open block of `randlora.merged` merged
    averaging: Any = None  # averages gradients of adapters that an engine does not know: see `randlora.sharded`
    compute: Compute = "auto"
    places: dict[tuple[str, ...], list[str]] | None = None  # of adapted modules in the last forward: names by path
    save_pretrained: SavePretrained | None = None  # what `save_pretrained` of the model does, if a caller has chosen
    activation: Activation = field(default_factory=Activation)

    def __getstate__(self) -> dict[str, Any]:
        # No `Run` goes on in a copy or a pickle. A spawned process gets a pickle.
        if self.runs and isinstance(self._innermost, Run | None):
            left = f"in a block of {self.runs[-1].words} the adapters of a copy or a pickle of the model are inactive"
            if get_spawning_popen() is not None:
                advice = "start it before the block, and open a block in it"
                raise AdapterError(f"{left}, so that a process spawned here would run the model without them: {advice}")
            warn(f"{left}: make it outside of the block, or activate or route them in the copy")
        return {**self.__dict__, "disabled": [None] * len(self.disabled), "runs": [], "around": {}, "ended": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import_module("randlora.api")  # registers all features, also in a process that only unpickles a model
        self.__dict__.update(state)  # no block is open in a copy, because none would end there
        if self.is_disabled:
            self.activate({})
        self.disabled, self.merged_block = [], None

    @property
    def is_merged(self) -> bool:
        """Whether any adapters are merged into the weights."""
        return bool(self.merged)

    @property
    def active_unmerged(self) -> dict[str, Factor]:
        """The names and factors of the active adapters that are not merged."""
        return {name: weight for name, weight in self.active.items() if name not in self.merged}

    @property
    def is_disabled(self) -> bool:
        """Whether all adapters are disabled."""
        return len(self.disabled) > 0  # which the compiler of torch 2.9 reads, and not bool() of a list

    @property
    def disabled_by(self) -> str:
        """The function that opened the innermost block in which adapters are disabled, for messages."""
        return f"{self.runs[-1].words if self.runs else 'randlora.disabled'}(model)"

    def open_block(self, block: object) -> None:
        """Begin a block in which the active adapters do not act: one of `disabled`, or a `Run`."""
        self.around[block] = BLOCKS.get()
        self._set_blocks([*self.disabled, block])

    def _set_blocks(self, blocks: list[object]) -> None:
        self.disabled, self.runs = blocks, [block for block in blocks if isinstance(block, Run)]
        self.around = {block: self.around[block] for block in blocks}

    @property
    def _innermost(self) -> object | None:
        """The innermost open block of this thread or task."""
        return next((block for block in reversed(BLOCKS.get()) if block in self.disabled), None)

    @property
    def run(self) -> Run | None:
        """What the innermost block of this thread or task runs instead of the active adapters, if anything."""
        if not self.runs:
            return None
        block, last = self._innermost, self.disabled[-1]
        if block is None and is_in_backward() and {*self.disabled} <= {last, *self.around[last]}:
            block = last  # autograd's threads have no blocks, and all that are open were opened around the last one
        if block is not None:
            return block if isinstance(block, Run) else None
        raise AdapterError(  # a call here could be of its rows
            f"a block of {self.runs[0].words} is open in another thread or task, and none here: open a block here too, "
            "or call the model with contextvars.copy_context().run, as asyncio.to_thread does"
        )

    @property
    def active(self) -> dict[str, Factor]:
        """The active adapters' names and factors."""
        return {name: adapter.weight for name, adapter in self.adapters.items() if adapter.weight is not None}

    def activate(self, weights: Mapping[str, Factor]) -> None:
        """Activate the adapters with these names and factors, and no others. Call `seat` of the layers afterwards."""
        self.activation.is_current = False
        self.activation = Activation()
        for adapter in self.adapters.values():
            adapter.weight = weights.get(adapter.name)

    def adapter(self, name: str | None) -> Adapter:
        """Return the adapter with a name, or the only one for the name ``None``; otherwise raise an `AdapterError`."""
        if name is None and len(self.adapters) > 1:
            raise AdapterError(f"the model has several adapters ({', '.join(self.adapters)}): give name= to choose one")
        name = next(iter(self.adapters), "") if name is None else name
        if problems := self.unknown([name]):
            raise AdapterError(problems[0])
        return self.adapters[name]

    def unknown(self, names: Iterable[object]) -> list[str]:
        """Return messages about names (of any type) that no adapter has."""
        known = ", ".join(self.adapters) or "none"
        return [
            f"the model has no adapter named {shortly(name)}: it has {known}"
            for name in names
            if not isinstance(name, str) or name not in self.adapters
        ]

    def adopt_parameters(self, root: nn.Module) -> None:
        """Follow the parameters that adapters train copies of, if code has replaced them or their modules."""
        self._require_loaded(root)
        with CHANGING:  # another thread may be between the model's parameter and what is known of it
            if not self.is_merged:  # when the model has different parameters for a time
                if self.replaced:
                    settle(root)
                self._adopt(root)
            if self.ended:
                self._set_blocks([block for block in self.disabled if block not in self.ended])
                self.ended = []
                self.install_parameters()

    def _adopt(self, root: nn.Module) -> None:
        was = {fqn: entry.installed for fqn, entry in self.replaced.items()}
        followed = {fqn: entry.followed(root) for fqn, entry in self.replaced.items()}
        self.replaced = {part.name: part for parts in followed.values() for part in parts}
        for part in self.replaced.values():
            if not part.is_lost:
                part.adopt()
        for adapter in self.adapters.values():
            trained = {}
            for fqn, copy in adapter.trained.items():
                first, *untied = followed[fqn]
                is_installed = copy is was[fqn]
                trained[first.name] = first.installed if is_installed else copy
                for part in untied:
                    with torch.inference_mode(mode=False):
                        own = like(copy, copy.detach().clone(), requires_grad=copy.requires_grad)
                    trained[part.name] = part.installed if is_installed else own
            adapter.trained = trained

    def install_parameters(self) -> None:
        """Install the copies of the active adapters, and the model's own elsewhere; a collective under ZeRO-3."""
        run_collectives(
            partial(self._install_values, replaced, version)
            if place_at(replaced.live).exchanges == "values"
            else partial(replaced.install, version)
            for replaced, version in list(self._versions([] if self.is_disabled else self.active))
        )

    def convert_aside(self, convert: Any) -> None:
        """Convert what adapters or the model have of parameters and do not use now, as `nn.Module._apply` converts."""
        with CHANGING:
            for fqn, entry in self.replaced.items():
                sharing = [adapter for adapter in self.adapters.values() if fqn in adapter.trained]
                versions = [entry.original, *(adapter.trained[fqn] for adapter in sharing)]
                now = {id(each): each for each in versions}
                now |= {key: converted(each, convert) for key, each in now.items() if each is not entry.installed}
                entry.original = now[id(entry.original)]
                for adapter in sharing:
                    adapter.trained[fqn] = now[id(adapter.trained[fqn])]

    def would_exchange(self, active: Iterable[str]) -> bool:
        """Whether parameters would be exchanged if these adapters were active."""
        pairs = zip(self._versions(self.active), self._versions(active), strict=True)
        return any(version is not wanted for (_, version), (_, wanted) in pairs)

    def require_exchangeable(self, active: Iterable[str], doing: str) -> None:
        """Raise an `AdapterError` unless `install_parameters` could install the copies of these adapters."""
        problems = [
            f"{replaced.name} would have to become a different parameter object, but an engine of DeepSpeed's ZeRO-3 "
            "runs the model and expects the object that it started with: use ZeRO-2, or an adapter without train_also"
            for replaced, version in self._versions(active)
            if version is not replaced.live and replaced.is_fixed
        ]
        raise_collected(AdapterError, problems, doing=doing)

    def _require_loaded(self, root: nn.Module) -> None:
        """Raise an `AdapterError` if accelerate offloads a copy, which it replaces by parameters without gradients."""
        around = [module for entry in self.replaced.values() for fqn in entry.slots for module in path_to(root, fqn)]
        loaded = loaded_modules(around)
        problems = [
            f"{part.name}, which adapters train copies of, was offloaded by accelerate: call "
            "accelerate.hooks.remove_hook_from_submodules(model), and keep its module on a device with the device map"
            for entry in (self.replaced.values() if loaded else ())
            for part in entry.followed(root)
            if not part.is_lost and any(id(module) in loaded for module, _ in part.slots.values())
        ]
        raise_collected(AdapterError, problems, doing="use the adapters")

    def _versions(self, active: Iterable[str]) -> Iterator[tuple[ReplacedParameter, Tensor]]:
        """Yield what adapters have copies of, each with the version that is installed if these adapters are active."""
        trained = [self.adapters[name].trained for name in active]
        for fqn, replaced in self.replaced.items():
            if not replaced.is_lost:
                copies = [copies[fqn] for copies in trained if fqn in copies and replaced.fits(copies[fqn])]
                yield replaced, copies[0] if copies else replaced.original

    def _install_values(self, replaced: ReplacedParameter, wanted: Tensor) -> None:
        """Install a trained copy, or the model's own, where a sharded parameter must stay: it becomes that one."""
        slot = replaced.live
        if wanted is slot:
            return
        left = replaced.exchange_values(wanted)
        becomes = {id(slot): left, id(wanted): slot}
        replaced.original = becomes.get(id(replaced.original), replaced.original)
        for adapter in self.adapters.values():
            if (copy := adapter.trained.get(replaced.name)) is not None:
                adapter.trained[replaced.name] = becomes.get(id(copy), copy)

    def forget_unused(self) -> None:
        """Remove the bases and the replaced parameters that no adapter uses."""
        self.install_parameters()
        used = {fqn for adapter in self.adapters.values() for fqn in adapter.trained}
        self.replaced = {fqn: replaced for fqn, replaced in self.replaced.items() if fqn in used}
        self.bank.keep_only(basis for adapter in self.adapters.values() for basis in adapter.bases.values())


def attached_state(model: nn.Module) -> ModelState | None:
    """Return the state attached to this module itself, or ``None``."""
    state = model.__dict__.get(ATTRIBUTE)
    return state if isinstance(state, ModelState) else None


def require_module(model: object) -> None:
    """Raise a `TargetError` unless the argument is a model."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        advice = f": {IN_PLACE}" if isinstance(model, NotTheModel) else ""
        raise TargetError(f"expected a model, a torch.nn.Module, got {what}{advice}")


def is_adapted(model: nn.Module) -> bool:
    """Whether the model or one of its submodules has adapters."""
    require_module(model)
    return any(attached_state(module) is not None for module in model.modules())


def adapted_root(model: nn.Module) -> tuple[nn.Module, ModelState]:
    """Return the module with the adapters and its state: ``model``, or a submodule, such as in a DDP wrapper."""
    require_module(model)
    modules = [("", model)] if attached_state(model) is not None else model.named_modules()
    carriers = [(fqn, module, state) for fqn, module in modules if (state := attached_state(module)) is not None]
    if not carriers and any("randlora" in vars(module) for module in model.modules()):
        raise AdapterError("the adapters of its layers were added to a different module: call this on that module")
    if not carriers:
        raise AdapterError(
            "the model has no adapter: call randlora.inject(model) or randlora.load(model, path) first; if it had one, "
            "a merge that is not reversible removed it"
        )
    if len(carriers) > 1:
        names = ", ".join(fqn or "the model itself" for fqn, _, _ in carriers)
        raise AdapterError(f"several submodules have adapters ({names}): call this on one of them")
    _, root, state = carriers[0]
    state.adopt_parameters(root)
    return root, state


def require_unused(state: ModelState, name: str | None, doing: str) -> None:
    """Raise an `AdapterError` if an adapter acts in an open `Run`, or for the name ``None`` if any `Run` is open."""
    for run in state.runs:
        if name is None or name in run.adapters:
            which = "" if name is None else ", which uses it"
            raise AdapterError(f"cannot {doing} in an open block of {run.words}{which}: call it after the block")


def require_unmerged(state: ModelState, doing: str) -> None:
    """Raise an `AdapterError` if the adapters are merged."""
    if state.is_merged:
        raise AdapterError(f"cannot {doing} while the adapters are merged: call randlora.unmerge(model) first")

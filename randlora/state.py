"""What a model carries while it is adapted: its adapters, their bases, and the parameters trained beside them.

One `ModelState` hangs on the module that `inject` was called on, as a plain attribute: it is no module, so it stays out
of ``state_dict``, and copying or pickling the model takes it along. Every adapted layer refers to it, so switching an
adapter is one assignment, not a walk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from randlora.bases.bank import BasisBank
from randlora.bases.basis import Basis
from randlora.config import RandLoRAConfig
from randlora.errors import AdapterError
from randlora.functional import Compute

ATTRIBUTE = "randlora_state"


@dataclass(eq=False)
class Adapter:
    """One adapter of a model, shared by all its layers.

    Attributes:
        name: The name it was given.
        config: The options it was made with.
        basis: The bases its layers slice.
        targets: FQNs of its layers.
        rule: How the targets were chosen, for reports.
        weight: Factor of its delta while active; ``None`` while it is not.
        trained: The parameters trained beside it, by FQN.
        peft_fields: Fields of the ``adapter_config.json`` it was loaded from that mean nothing here, kept for saving.
    """

    name: str
    config: RandLoRAConfig
    basis: Basis
    targets: tuple[str, ...]
    rule: str
    weight: float | None = None
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    peft_fields: dict[str, Any] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        """Whether its delta is added."""
        return self.weight is not None


@dataclass(eq=False)
class ReplacedParameter:
    """A parameter of the model in whose place an adapter trains one of its own.

    Attributes:
        places: The modules that hold it, each with the attribute's name; several where it is tied.
        original: The model's own parameter.
        installed: The version that was put in its place last.
    """

    places: tuple[tuple[nn.Module, str], ...]
    original: nn.Parameter
    installed: nn.Parameter

    @property
    def live(self) -> nn.Parameter:
        """The version that the model reads now."""
        module, attribute = self.places[0]
        parameter = module._parameters[attribute]
        assert parameter is not None, f"{attribute} was deleted while an adapter trains a version of it"
        return parameter

    @torch.inference_mode(mode=False)  # parameters outlive the mode the caller is in
    def install(self, parameter: nn.Parameter) -> None:
        """Put ``parameter`` where the model reads, on the device and in the dtype of the one that leaves."""
        leaving = self.live
        if leaving is not parameter and not leaving.is_meta:
            parameter.data = parameter.data.to(device=leaving.device, dtype=leaving.dtype)
        for module, attribute in self.places:
            module._parameters[attribute] = parameter
        self.installed = parameter


@dataclass(eq=False)
class ModelState:
    """All that one model carries while it is adapted.

    Attributes:
        adapters: By name, in the order they were added.
        bank: The bases they share.
        required_grad: Whether each parameter required grad when the first adapter came, by FQN.
        replaced: The parameters that some adapter trains a version of, by FQN.
        disabled: How many blocks that switch all adapters off are entered.
        merge_report: The `randlora.report.MergeReport` of the merge that is in force, while there is one.
        compute: How layers compute.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    bank: BasisBank = field(default_factory=BasisBank)
    required_grad: dict[str, bool] = field(default_factory=dict)
    replaced: dict[str, ReplacedParameter] = field(default_factory=dict)
    disabled: int = 0
    merge_report: Any = None
    compute: Compute = "auto"

    @property
    def is_merged(self) -> bool:
        """Whether the active adapters are folded into the weights for now."""
        return self.merge_report is not None

    @property
    def is_disabled(self) -> bool:
        """Whether all adapters are switched off for now."""
        return self.disabled > 0

    @property
    def active(self) -> dict[str, float]:
        """The active adapters' names and weights."""
        return {name: adapter.weight for name, adapter in self.adapters.items() if adapter.weight is not None}

    def adapter(self, name: str | None) -> Adapter:
        """Look one adapter up.

        Args:
            name: Its name; ``None`` means the only one.

        Raises:
            AdapterError: When there is no such adapter, or ``None`` does not say which.
        """
        known = ", ".join(self.adapters)
        if name is None and len(self.adapters) > 1:
            raise AdapterError(f"the model carries several adapters ({known}): say which one with name=")
        found = next(iter(self.adapters.values()), None) if name is None else self.adapters.get(name)
        if found is None:
            raise AdapterError(f"the model has no adapter named {name!r}: it has {known or 'none'}")
        return found

    def adopt_parameters(self) -> None:
        """Note the objects that torch put in place of ours, as ``load_state_dict(assign=True)`` and ``to_empty`` do.

        Not while a merge is in force, which puts parameters of its own in place for a while.
        """
        if self.is_merged:
            return
        for fqn, replaced in self.replaced.items():
            was, live = replaced.installed, replaced.live
            if replaced.original is was:
                replaced.original = live
            for adapter in self.adapters.values():
                if adapter.trained.get(fqn) is was:
                    adapter.trained[fqn] = live
            replaced.installed = live

    def install_parameters(self) -> None:
        """Let the model read the parameters that belong to the active adapters, and its own everywhere else."""
        active = [] if self.is_disabled else [adapter for adapter in self.adapters.values() if adapter.is_active]
        for fqn, replaced in self.replaced.items():
            versions = [adapter.trained[fqn] for adapter in active if fqn in adapter.trained]
            replaced.install(versions[0] if versions else replaced.original)

    def forget_unused(self) -> None:
        """Drop the bases and the replaced parameters that no adapter refers to."""
        self.install_parameters()
        used = {fqn for adapter in self.adapters.values() for fqn in adapter.trained}
        self.replaced = {fqn: replaced for fqn, replaced in self.replaced.items() if fqn in used}
        self.bank.keep_only(adapter.basis for adapter in self.adapters.values())


def attached_state(model: nn.Module) -> ModelState | None:
    """Return the state that hangs on this very module, or ``None``."""
    state = model.__dict__.get(ATTRIBUTE)
    return state if isinstance(state, ModelState) else None


def is_adapted(model: nn.Module) -> bool:
    """Whether the model, or a part of it, carries adapters."""
    return attached_state(model) is not None or any(attached_state(module) is not None for module in model.modules())


def adapted_root(model: nn.Module) -> tuple[nn.Module, ModelState]:
    """Find the module that carries the adapters: ``model``, or the one inside a wrapper such as DDP's.

    Raises:
        AdapterError: When there is none, or more than one.
    """
    if (own := attached_state(model)) is not None:
        own.adopt_parameters()
        return model, own
    carriers = [(fqn, module, state) for fqn, module in model.named_modules() if (state := attached_state(module))]
    if not carriers:
        if any("randlora" in vars(module) for module in model.modules()):
            raise AdapterError(
                "the adapters of this model's layers are kept on another module, one that this is, or was, a part of: "
                "call this on that module"
            )
        raise AdapterError(
            "the model carries no adapter: call randlora.inject(model) or randlora.load(model, path) first"
        )
    if len(carriers) > 1:
        names = ", ".join(fqn or "the model itself" for fqn, _, _ in carriers)
        raise AdapterError(f"adapters were injected into several parts ({names}): call this on one of them")
    _, root, state = carriers[0]
    state.adopt_parameters()
    return root, state


def require_unmerged(state: ModelState, doing: str) -> None:
    """Refuse what would go wrong while the adapters are folded into the weights.

    Raises:
        AdapterError: When they are.
    """
    if state.is_merged:
        raise AdapterError(f"cannot {doing} while the adapters are merged: call randlora.unmerge(model) first")

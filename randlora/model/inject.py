"""`inject`, `plan` and `eject`: put an adapter on a model's layers, and take all of them off.

Planning finds everything out and touches nothing; checking collects what is wrong and raises once; only then layers
change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from randlora.bases.basis import Basis
from randlora.bases.spec import BasisSpec, drawn_dims, sliced_dims, spec_for
from randlora.config import BasisKind, Pattern, RandLoRAConfig, Stream, explain_options
from randlora.errors import ConfigError, TargetError, raise_collected
from randlora.model.install import (
    commit,
    detach_all,
    or_if_first,
    owned_state,
    prepare,
    require_detachable,
    require_own,
)
from randlora.model.train_also import own_copies, replacements, select_parameters, train_also_problems
from randlora.report import Report, adapter_report, next_steps
from randlora.state import Adapter, ModelState, adapted_root
from randlora.targets.select import Selection, obstacles, select
from randlora.targets.site import shapes_of
from randlora.targets.walk import Census


@dataclass(frozen=True, eq=False)
class Plan:
    """All that adding one adapter needs to know.

    Attributes:
        census: The model.
        name: The adapter's name.
        config: Its options.
        state: What the model carries already, if anything.
        selection: The weights it goes on.
        spec: The bases it asks for.
        shared: Bases of the model that serve, if any.
        train_also: FQNs of the parameters trained beside it.
    """

    census: Census
    name: str
    config: RandLoRAConfig
    state: ModelState | None
    selection: Selection
    spec: BasisSpec
    shared: Basis | None
    train_also: tuple[str, ...]

    @property
    def used(self) -> tuple[int, int]:
        """``(max_dim, min_dim)`` that the weights slice of the bases."""
        return sliced_dims(site.shape for site in self.selection.sites)


@explain_options
def plan(
    model: nn.Module,
    r: int | None = None,
    *,
    targets: Pattern | None = None,
    exclude: Pattern | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    basis: BasisKind = "dense",
    stream: Stream | None = None,
    blocks: tuple[int, int] | None = None,
    seed: int = 0,
    train_also: str | Sequence[str] | None = None,
    name: str = "default",
    config: RandLoRAConfig | None = None,
) -> Report:
    """Return the report of what `inject` would do with the same arguments, and touch nothing.

    Works on a model on the meta device too, and takes no memory for weights or bases.

    Returns:
        The report that `inject` would return.

    Raises:
        RandLoRAError: Whatever `inject` would raise before it draws bases.
    """
    options = _one_config(
        config,
        r,
        targets=targets,
        exclude=exclude,
        alpha=alpha,
        dropout=dropout,
        basis=basis,
        stream=stream,
        blocks=blocks,
        seed=seed,
        train_also=train_also,
    )
    planned = _plan(Census.of(model), name, options)
    is_first = or_if_first(planned.state, wanted=None)
    return _report(planned, active=is_first, trainable=is_first)


@explain_options
@torch.inference_mode(mode=False)  # what is made here is trained, whatever mode the caller is in
def inject(
    model: nn.Module,
    r: int | None = None,
    *,
    targets: Pattern | None = None,
    exclude: Pattern | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    basis: BasisKind = "dense",
    stream: Stream | None = None,
    blocks: tuple[int, int] | None = None,
    seed: int = 0,
    train_also: str | Sequence[str] | None = None,
    name: str = "default",
    config: RandLoRAConfig | None = None,
    active: bool | None = None,
    trainable: bool | None = None,
) -> Report:
    """Add an adapter to a model, in place, and freeze everything else.

    The output does not change: Λ starts at zero. Without ``targets`` the preset of the model's type applies, else
    every linear layer but the output head is adapted.

    Args:
        model: Any module that holds linear layers; it is changed in place.
        r: Rank of one random basis, 32 unless given. A smaller r trains more parameters.
        targets: Which layers; see `RandLoRAConfig` for this and the next eight.
        exclude: Which of them not.
        alpha: The update is scaled by ``alpha / r``; 20·r unless given.
        dropout: Dropout on the adapter's input in training.
        basis: Kind of the random bases.
        stream: Where the bases are drawn from.
        blocks: Blocks of ``block`` bases.
        seed: Seed of the bases.
        train_also: Modules or parameters trained beside the adapter and saved with it.
        name: The adapter's name.
        config: All of the options above in one object, instead of them.
        active: Make it the only active adapter. ``None``: if it is the model's first.
        trainable: Let its parameters require grad. ``None``: if it is the model's first.

    Returns:
        A report with the figures as fields; it prints as a table.

    Raises:
        ConfigError: For options that cannot work.
        OptionError: For an option that there is not, with our name for it; it is a `TypeError` too.
        TargetError: When the targets match nothing, or something that cannot be adapted.
        AdapterError: When the name is taken, or the model's adapters are merged.
    """
    options = _one_config(
        config,
        r,
        targets=targets,
        exclude=exclude,
        alpha=alpha,
        dropout=dropout,
        basis=basis,
        stream=stream,
        blocks=blocks,
        seed=seed,
        train_also=train_also,
    )
    planned = _plan(Census.of(model), name, options)
    active, trainable = or_if_first(planned.state, wanted=active), or_if_first(planned.state, wanted=trainable)
    report = _report(planned, active=active, trainable=trainable)
    held = planned.shared or _new_basis(planned)
    replaced = replacements(planned.census, planned.state or ModelState(), planned.train_also)
    adapter = Adapter(name, _with_names(planned.config, report.targets), held, report.targets, planned.selection.rule)
    adapter.trained = own_copies(replaced, trainable=trainable)
    addition = prepare(planned.state, adapter, planned.selection.sites, replaced=replaced, trainable=trainable)
    commit(planned.census, addition, active=active)
    return report


def eject(model: nn.Module) -> tuple[str, ...]:
    """Take every adapter off, in place: every module has its own class again, and the values it came with.

    What was merged is unmerged first, what ``train_also`` replaced is put back, and parameters require grad as before.

    Args:
        model: A model that carries adapters.

    Returns:
        FQNs of the layers that were adapted.

    Raises:
        AdapterError: When the model carries none, or something else changed the class of an adapted module meanwhile.
    """
    root, state = adapted_root(model)
    census = Census.of(root)
    require_own(census, state, "eject")
    require_detachable(census, "eject")
    for site in census.adapted:
        site.layer.unfold(site.owner)
    state.adapters.clear()
    state.install_parameters()
    restored = detach_all(census, state)
    state.replaced.clear()
    state.merge_report, state.disabled = None, 0  # for a `with merged(model)` that this call is inside of
    return restored


def _one_config(config: RandLoRAConfig | None, r: int | None, **given: Any) -> RandLoRAConfig:
    """Build the config from single options, or take the one given, but not both."""
    options = given if r is None else {**given, "r": r}
    built = RandLoRAConfig(**options)
    if config is None:
        return built
    if r is not None or built != RandLoRAConfig():
        raise ConfigError(
            "give either config= or single options, not both: dataclasses.replace(config, r=16) changes one"
        )
    return config


def _plan(census: Census, name: str, config: RandLoRAConfig) -> Plan:
    """Find out what an adapter would need, and check all of it."""
    state = owned_state(census, name, "inject")
    selection = select(census, config.targets, config.exclude)
    problems = obstacles(census, selection.sites, config.dropout)
    also: list[str] = []
    if config.train_also is not None:
        also = select_parameters(census, config.train_also)
        problems += train_also_problems(census, config.train_also, also, selection.sites)
    raise_collected(TargetError, problems, doing=f"inject {name!r}")
    shapes = [site.shape for site in selection.sites]
    spec, used = spec_for(config, *drawn_dims(shapes)), sliced_dims(shapes)
    shared = state.bank.find(spec, used=used) if state else None
    if shared is not None:
        dims = max(shared.spec.max_dim, used[0]), max(shared.spec.min_dim, used[1])
        spec = replace(shared.spec, max_dim=dims[0], min_dim=dims[1])
    return Plan(census, name, config, state, selection, spec, shared, tuple(also))


def _with_names(config: RandLoRAConfig, fqns: tuple[str, ...]) -> RandLoRAConfig:
    """Put names in the place of callables, which no pickle and no file can hold."""
    return (
        replace(config, targets=fqns, exclude=None) if callable(config.targets) or callable(config.exclude) else config
    )


def _new_basis(planned: Plan) -> Basis:
    """Draw bases at once, so that what cannot be drawn is refused here; for a model without values draw nothing."""
    basis = Basis(planned.spec)
    basis.extend(*planned.used)
    if not all(parameter.is_meta for site in planned.selection.sites for parameter in site.owner.parameters()):
        basis.matrices()
    return basis


def _report(planned: Plan, *, active: bool, trainable: bool) -> Report:
    used, extent = planned.used, planned.shared.extent if planned.shared else (0, 0)
    notes = next_steps(planned.name, is_active=active, is_trainable=trainable)
    if planned.shared is None and planned.state is not None and (held := [*planned.state.bank]):
        others = "; ".join(f"{basis.spec}, {basis.nbytes:,} bytes" for basis in held)
        notes.append(f"its bases come beside those of the other adapters, which do not fit: {others}")
    return adapter_report(
        planned.census,
        planned.name,
        planned.config,
        shapes_of(planned.selection.sites),
        planned.spec,
        rule=planned.selection.rule,
        skipped=planned.selection.skipped,
        basis_bytes=planned.spec.nbytes(max(used[0], extent[0]), max(used[1], extent[1])),
        is_active=active,
        is_trainable=trainable,
        train_also=planned.train_also,
        notes=notes,
    )

"""`inject`, `plan` and `eject`: adding an adapter to a model's layers, and removing all adapters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from randlora.bases.basis import Basis
from randlora.bases.kinds import block_share
from randlora.bases.spec import sliced_dims, spec_for
from randlora.config import (
    BasisKind,
    Experts,
    Init,
    InProj,
    Names,
    Pattern,
    RandLoRAConfig,
    Stream,
    TableRows,
    Train,
    by_rank,
    explain_options,
    same_options,
)
from randlora.errors import ConfigError, TargetError, raise_collected, spelled, warn
from randlora.hints import require_types
from randlora.model.install import add, detach_all, require_detachable, restore_originals
from randlora.model.train_also import (
    Table,
    find_tables,
    first_values,
    misplaced_copies,
    planned_copies,
    replacements,
    select_buffers,
    select_parameters,
    table_problems,
    train_also_problems,
    trained_copies,
    training_notes,
)
from randlora.model.view import View, all_or_nothing, collective, opened, opened_to_add
from randlora.places import has_values
from randlora.ranks import agree
from randlora.replaced import ReplacedParameter
from randlora.report import Report, adapter_report, by_reason, next_steps
from randlora.state import Adapter, ModelState, SavePretrained, require_unused
from randlora.targets.census import Census, Shapes, shapes_of
from randlora.targets.left_out import doubt, obstacles, offloaded_copies
from randlora.targets.match import shortened
from randlora.targets.options import one_config, r_like_lora, resolve, useless_options
from randlora.targets.select import Selection, select

CHECKED = ("active", "init", "save_pretrained", "trainable")  # arguments of `inject` that are not in `OPTIONS`
FEW = 0.8  # the share of the work of dense bases below which a report names block bases


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything needed to add one adapter."""

    census: Census
    state: ModelState  # possibly not attached yet
    adapter: Adapter  # without drawn bases or values
    selection: Selection
    shared: dict[int, Basis]  # existing bases of the model that it can use, by r
    replaced: dict[str, ReplacedParameter]  # of which it trains copies, by FQN
    tables: list[Table]  # of which it trains rows
    active: bool
    trainable: bool

    def report(self) -> Report:
        """Return the report of the adapter, before it is added."""
        notes = next_steps(self.adapter.name, is_active=self.active, is_trainable=self.trainable)
        new = [str(r) for r in self.adapter.bases if r not in self.shared]
        if new and len(self.state.bank):
            others = "; ".join(f"{basis.spec}, {basis.nbytes:,} bytes" for basis in self.state.bank)
            which = f" of r={', '.join(new)}" if self.shared else ""
            notes.append(f"its bases{which} are additional: those of the other adapters cannot be shared: {others}")
        if self.trainable:
            notes += training_notes(self.census, self.adapter)
        shapes = shapes_of(self.selection.sites, self.adapter.config)
        if self.trainable and self.adapter.config.basis == "dense" and (share := self._block_share(shapes)) < FEW:
            notes.append(f"dense bases: basis='block' would take about {share:.1f} of the work")
        acts, trains, left_out = self.active, self.trainable, self.selection.left_out
        report = adapter_report(self.census, self.adapter, shapes, is_active=acts, is_trainable=trains, notes=notes)
        warning = doubt(self.census, self.selection.sites, left_out) if self.selection.is_default else ""
        return replace(report, skipped=dict(self.selection.skipped), left_out=left_out, warning=warning)

    def _block_share(self, shapes: Shapes) -> float:
        """Return how much of the work of its dense bases block bases would take, except in tables."""
        layers = Counter[tuple[int, int, int]]()
        for site in self.selection.sites:
            *stack, out_features, in_features = shapes[site.fqn]
            if site.layer_class.kind != "embedding":
                layers[in_features, out_features, self.adapter.options[site.fqn].r] += math.prod(stack)
        return block_share(layers)


@collective(writes=True)
@explain_options
@torch.inference_mode(mode=False)  # trainable parameters must not be inference tensors
def inject(
    model: nn.Module,
    r: int | Mapping[str, int] | None = None,
    *,
    like_lora: int | None = None,
    targets: Pattern | None = None,
    exclude: Pattern | None = None,
    alpha: float | Mapping[str, float] | None = None,
    dropout: float = 0.0,
    basis: BasisKind = "dense",
    stream: Stream | None = None,
    blocks: tuple[int, int] | None = None,
    seed: int = 0,
    train: Train = "both",
    train_also: Names | None = None,
    train_rows: TableRows | None = None,
    in_proj: InProj = "packed",
    experts: Experts = "each",
    init: Init = "lambda",
    name: str = "default",
    config: RandLoRAConfig | None = None,
    active: bool | None = None,
    trainable: bool | None = None,
    save_pretrained: SavePretrained | None = None,
) -> Report:
    """Add an adapter to a model, in place, and freeze everything else.

    The output does not change at first, because Λ or Γ starts at zero. Without ``targets``, attention is adapted in
    models of transformers and diffusers; if none is found, all linear layers except the output head are adapted. The
    report says what is left out. If the model is sharded, all processes call this together.

    Args:
        model: Any module with layers that can be adapted; it is changed in place.
        r: Rank of one random basis, 32 by default. A smaller r trains more parameters. A mapping from patterns gives
            layers different ranks: ``{"q_proj": 16, ".*": 32}``.
        like_lora: The rank of a LoRA on the same layers, instead of ``r``. r is then chosen so that about as many
            parameters are trained as with that LoRA. With ``block`` bases, r is a multiple of 8, or of 120 if Λ alone
            is trained, if one is within a tenth.
        targets: Layers to adapt: names or suffixes, a regex, ``"all-linear"`` or ``"all"``. `RandLoRAConfig`
            describes this and the options up to ``experts`` in more detail.
        exclude: Layers to exclude from ``targets``.
        alpha: The update is scaled by ``alpha / r``; 20·r by default. A number, or a mapping as for ``r``.
        dropout: Dropout on the adapter's input in training.
        basis: Kind of the random bases.
        stream: Random stream of the bases.
        blocks: Numbers of blocks of ``block`` bases.
        seed: Seed of the bases.
        train: Whether Λ and Γ are trained, or ``"lambda"`` alone.
        train_also: Modules or parameters that are trained and saved with the adapter.
        train_rows: Rows of embeddings, and of heads tied to them, that are trained and saved with the adapter, by name:
            ``{"embed_tokens": [128256, 128257]}``.
        in_proj: Whether ``in_proj_weight`` of `nn.MultiheadAttention` is adapted as one matrix or split into three.
        experts: Whether each expert of a stack has its own Λ and Γ, or all experts share them.
        init: Which of Λ and Γ starts at zero and moves first: ``"lambda"``, as in PEFT, with Γ = 1 / min_dim, or
            ``"gamma"``, with Λ = 1 / min_dim. Files do not record it.
        name: The adapter's name.
        config: The options from ``r`` to ``experts`` as one object, instead of single options.
        active: Whether to make it the only active adapter. ``None`` means only if it is the model's first.
        trainable: Whether its parameters require grad. ``None`` means only if it is the model's first.
        save_pretrained: What ``model.save_pretrained()`` does while adapters are attached: ``"adapter"`` writes the
            adapter, as `randlora.save` does; ``"error"`` raises an error that says what to call; ``"model"`` writes the
            base model. ``None`` uses the choice of the model's other adapters, or else ``"adapter"`` with a warning at
            each call. While the adapters are merged, all but ``"model"`` raise an error.

    Raises:
        ConfigError: For invalid options.
        OptionError: For an unknown option, with a suggestion. It is also a `TypeError`.
        TargetError: If the targets match nothing, or something that cannot be adapted.
        AdapterError: If the name is taken, the model's adapters are merged, or a parameter is not a leaf tensor.

    Warns:
        UserWarning: If the default ``targets`` adapt almost nothing, or only one layer that looks like a head, as in a
            ResNet. Also if the model is already in a `DistributedDataParallel`, which would not average the adapter's
            gradients.
    """
    asked = locals()
    with opened_to_add(model, [name], "inject") as view:
        planned = make_plan(view, asked)
        report, adapter, sites = planned.report(), planned.adapter, planned.selection.sites
        report = replace(report, notes=(*report.notes, *_valueless_note(view.census)))
        _warn(report)
        adapter.init = init
        adapter.left_out = *by_reason("left out", report.skipped), *map(str, report.left_out)
        adapter.bases |= planned.shared
        if any(has_values(parameter) for site in sites for parameter in site.owner.parameters()):
            for rank in adapter.bases.keys() - planned.shared.keys():
                adapter.bases[rank].matrices()  # drawn now, so that errors are raised before the model changes
        if callable(adapter.config.targets) or callable(adapter.config.exclude):  # which cannot be pickled or saved
            adapter.config = replace(adapter.config, targets=report.targets, exclude=None)
        adapter.trained |= trained_copies(planned.replaced, requires_grad=planned.trainable)
        add(
            view.census,
            view.state,
            adapter,
            sites,
            replaced=planned.replaced,
            rows=zip(planned.tables, first_values(planned.tables), strict=True),
            active=planned.active,
            trainable=planned.trainable,
            save_pretrained=save_pretrained,
        )
        return report


def _valueless_note(census: Census) -> list[str]:
    """Return a note on buffers on the meta device that no state dict has, and so nothing gives values."""
    names = [
        f"{prefix}{name}"
        for prefix, module in census.prefixed
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set  # private
    ]
    advice = "set it after to_empty, or build the model under accelerate's init_empty_weights"
    return [f"no values: {shortened(names)} on the meta device, and state dicts leave it out; {advice}"] * bool(names)


@same_options(inject)
def plan(model: nn.Module, r: int | Mapping[str, int] | None = None, **asked: Any) -> Report:
    """Return the report that `inject` would return for the same arguments, without changing the model.

    This also works with a model on the meta device. It allocates no weights or bases.

    Raises:
        RandLoRAError: Any error that `inject` would raise before it draws bases.
    """
    with opened_to_add(model, [asked["name"]], "inject") as view:
        report = make_plan(view, {"r": r, **asked}).report()
    _warn(report)
    return report


@collective(writes=True)
def eject(model: nn.Module) -> tuple[str, ...]:
    """Remove all adapters, in place, and restore the original classes and values.

    Merged adapters are unmerged first. Parameters replaced by ``train_also`` and ``requires_grad`` flags are restored.
    If the model is sharded, all processes call this together.

    Args:
        model: A model with adapters.

    Returns:
        FQNs of the layers that were adapted.

    Raises:
        AdapterError: If the model has no adapter, a block of `randlora.serving.routed` is open, or something else has
            changed the class of an adapted module.
        MergeError: If a weight that is merged into is computed from other parameters since, as by pruning.
    """
    with opened(model, "eject") as view:
        state, census = view.state, view.census
        require_unused(state, None, "eject")
        require_detachable(census, "eject")
        misplaced = misplaced_copies(census, state)
        agree()  # before copies are exchanged
        with all_or_nothing(census, state, replaced=misplaced):
            restore_originals(census, state)  # in case this is called inside `with merged(model)`
            state.adapters.clear()
            state.install_parameters()
            for entry in misplaced:
                entry.install(entry.original)
            restored = detach_all(census, state)
            state.replaced.clear()
            state.disabled, state.runs, state.around = [], [], {}
        return restored


def _warn(report: Report) -> None:
    """Warn of a default that adapts next to nothing."""
    if report.warning:
        warn("; ".join([report.warning, *map(str, report.left_out)]))


def make_plan(view: View, asked: Mapping[str, Any]) -> Plan:
    """Return the plan of the adapter that arguments of `inject` ask for, or raise one error for all problems."""
    require_types(inject, {name: asked[name] for name in CHECKED if name in asked})
    config, doing = one_config(asked), f"inject {asked['name']!r}"
    if config.train == "lambda" and asked.get("init") == "gamma":
        alone, first = spelled("train", "lambda"), spelled("init", "gamma")
        raise ConfigError(f"cannot {doing}: {alone} leaves Γ as it is, and with {first} that is zero: omit one of both")
    census, state = view.census, view.state
    also = [] if config.train_also is None else select_parameters(census, config.train_also)
    tables, problems = find_tables(census, config.train_rows or {})
    selection = select(census, config.targets, config.exclude, [*also, *(table.fqn for table in tables)])
    problems += obstacles(census, selection.sites, config.dropout)
    problems += table_problems(census, tables, selection.sites, also)
    if config.train_also is not None:
        problems += train_also_problems(census, config.train_also, also, selection.sites)
        also += select_buffers(census, config.train_also)
        problems += offloaded_copies(census, also)
    if (like_lora := asked.get("like_lora")) is not None:
        raise_collected(TargetError, problems, doing=doing)
        config = replace(config, r=r_like_lora(selection.sites, like_lora, config))
    options, unresolved = resolve(config, [site.fqn for site in selection.sites])
    raise_collected(TargetError, problems + unresolved, doing=doing)
    shapes = shapes_of(selection.sites, config)
    raise_collected(ConfigError, useless_options(shapes, options, config.train), doing=doing)
    bases, shared = dict[int, Basis](), dict[int, Basis]()
    for r, of_rank in by_rank(shapes, options).items():
        spec, used = spec_for(config, r, of_rank), sliced_dims(of_rank)
        if (known := state.bank.find(spec, used=used)) is not None:
            shared[r] = known
        bases[r] = Basis(spec) if known is None else Basis(known.spec, known.extent)  # not drawn
        bases[r].extend(*used)
    replaced = replacements(census, state, also)
    adapter = Adapter(asked["name"], config, bases, options, selection.rule, trained=planned_copies(replaced))
    adapter.rows |= {table.fqn: table.rows for table in tables}
    is_first = not state.adapters
    active, trainable = (is_first if asked[name] is None else asked[name] for name in ("active", "trainable"))
    return Plan(census, state, adapter, selection, shared, replaced, tables, active=active, trainable=trainable)

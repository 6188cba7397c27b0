"""The adapters of a model: their states, and their trained parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field

from torch import nn

from randlora.bases.spec import BasisSpec
from randlora.config import Factor, LayerOptions, RandLoRAConfig, described
from randlora.errors import AdapterError, raise_collected, warn
from randlora.hints import listed, require_types
from randlora.model.install import ENGINES, lost_parts, offloaded_diagonals
from randlora.model.train_also import copy_dtype
from randlora.model.view import all_or_nothing, collective, opened, set_requires_grad
from randlora.report import FLOAT32_BYTES, as_lines, rows_in_words, wrapped
from randlora.state import Adapter, adapted_root, is_adapted
from randlora.targets.census import Census
from randlora.targets.match import shortened


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model; prints as a few lines.

    Attributes:
        name: Its name.
        config: Its options.
        specs: The specs of its bases, one for each r.
        options: r and alpha of its layers, by FQN.
        train_also: FQNs of the parameters trained with it.
        weight: The factor of its update while active, else ``None``. If factors differ between layers, a mapping from
            FQNs to factors. `activate` takes either.
        is_trainable: Whether any of its parameters requires grad.
        is_merged: Whether it is merged into the weights.
        problems: Its parts that the model no longer has, because a module was replaced, removed or resized.
        buffers: FQNs of the buffers that it has copies of, such as those of norms that it trains.
        train_rows: Rows of tables trained with it, by FQN.
    """

    name: str
    config: RandLoRAConfig
    specs: tuple[BasisSpec, ...]
    options: dict[str, LayerOptions]
    train_also: tuple[str, ...]
    weight: Factor | None
    is_trainable: bool
    is_merged: bool
    problems: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    train_rows: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """FQNs of its layers."""
        return tuple(self.options)

    @property
    def is_active(self) -> bool:
        """Whether its update is added."""
        return self.weight is not None

    def __repr__(self) -> str:
        """Return its options and state in one line, as a notebook shows a list of adapters."""
        return f"<adapter {next(self._lines())}>"

    def __str__(self) -> str:
        return "\n".join(wrapped(as_lines([line]) for line in self._lines()))

    def _lines(self) -> Iterator[str]:
        options, factor = described(self.options), "inactive" if self.weight is None else "active"
        if isinstance(self.weight, Mapping):
            factor += " with a factor for each layer"
        elif self.weight is not None and self.weight != 1:
            factor += f" with the factor {self.weight:g}"
        state = [factor, "trainable" if self.is_trainable else "frozen", *["merged"] * self.is_merged]
        state += ["Λ alone"] * (self.config.train == "lambda")
        layers = f"{len(self.options)} layer{'s' * (len(self.options) != 1)}"
        yield f"{self.name!r}: r={options['r']}, alpha={options['alpha']}, {layers}, {', '.join(state)}"
        if also := [*self.train_also, *rows_in_words(self.train_rows)]:
            yield f"also trained: {shortened(also)}"
        if self.buffers:
            yield f"its own buffers: {shortened(self.buffers)}"
        yield from self.problems


def adapters(model: nn.Module) -> list[AdapterInfo]:
    """Return a model's adapters in the order they were added; an empty list for a plain model.

    Args:
        model: Any model.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _ = randlora.inject(model, r=8)
        >>> print(*randlora.adapters(model))
        'default': r=8, alpha=160, 1 layer, active, trainable
    """
    if not is_adapted(model):
        return []
    root, state = adapted_root(model)
    census = Census.of(root)
    return [
        AdapterInfo(
            name=adapter.name,
            config=adapter.config,
            specs=tuple(basis.spec for basis in adapter.bases.values()),
            options=dict(adapter.options),
            train_also=tuple(adapter.parameters),
            buffers=tuple(adapter.buffers),
            train_rows=dict(adapter.rows),
            weight=copy(adapter.weight),
            is_trainable=any(parameter.requires_grad for parameter in adapter_parameters(census, adapter)),
            is_merged=adapter.name in state.merged,
            problems=tuple(lost_parts(census, state, [adapter])),
        )
        for adapter in state.adapters.values()
    ]


def trainable_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the parameters to train: Λ and Γ of the trainable adapters, and what they train beside.

    Args:
        model: A model with adapters.
        name: The name of one adapter, for an optimizer of its own; ``None`` means all.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4)
        >>> optimizer = torch.optim.AdamW(randlora.trainable_parameters(model), lr=1e-3)

    Raises:
        AdapterError: If the model has no adapter, or none of this name, none is trainable, accelerate offloads Λ and Γ,
            or something that an adapter trains is missing because a module was replaced, removed or resized.

    Warns:
        UserWarning: If Λ and Γ are no longer in float32 (such as after ``model.half()``), so that small steps are lost,
            or if parameters of ``train_also`` no longer are (such as after their module was replaced).
    """
    with opened(model, "train the adapters") as view:
        state, census = view.state, view.census
        adapters = [*state.adapters.values()] if name is None else [state.adapter(name)]
        lost = lost_parts(census, state, adapters)
        raise_collected(AdapterError, [*lost, *offloaded_diagonals(census)], doing="train the adapters")
        every = (parameter for adapter in adapters for parameter in adapter_parameters(census, adapter))
        trained = [parameter for parameter in every if parameter.requires_grad]
        if not trained:
            names = ", ".join(adapter.name for adapter in adapters)
            advice = f"call randlora.set_trainable(model, {adapters[0].name!r})"
            raise AdapterError(f"no adapter is trainable, so an optimizer would have nothing to do ({names}): {advice}")
        copies = {id(copy): fqn for adapter in adapters for fqn, copy in adapter.parameters.items()}
        halves = [(copies.get(id(each)), each.dtype) for each in trained if each.dtype.itemsize < FLOAT32_BYTES]
        dtypes = {dtype for fqn, dtype in halves if fqn is None}
        narrow = [fqn for fqn, dtype in halves if fqn is not None and dtype != copy_dtype(state.replaced[fqn])]
        if dtypes:
            warn(
                f"Λ and Γ are in {', '.join(map(str, dtypes))}, as after model.half(), where small steps are lost: "
                "convert the model before inject, or convert back with `for each in "
                "randlora.trainable_parameters(model): each.data = each.data.float()`"
            )
        elif narrow:
            warn(
                f"{shortened(narrow)}: the trained copies were float32 and have 16 bits now, such as after a module "
                "was replaced: save the adapter, eject it, and load it again"
            )
        return trained


@collective(writes=True)
def set_trainable(model: nn.Module, names: str | Iterable[str], trainable: bool = True) -> None:  # noqa: FBT001, FBT002
    """Set whether the parameters of some adapters require grad, whether active or not. Other adapters do not change.

    A trainable adapter gets no gradients until it is active or routed. If the model is sharded, all processes call this
    together.

    Args:
        model: A model with adapters.
        names: One name, or several.
        trainable: Whether Λ, Γ and what these adapters train beside require grad; not a Γ with ``train="lambda"``.

    Raises:
        AdapterError: For an unknown name, or if `fully_shard` has sharded parts of the model, but not the copies of
            parameters that would be trained.

    Warns:
        UserWarning: If parameters require grad that the `DistributedDataParallel` around the model does not know; see
            `randlora.activate`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = randlora.inject(model, r=4, name="a")
        >>> _ = randlora.inject(model, r=4, name="b")
        >>> randlora.set_trainable(model, ["a", "b"])
        >>> len(list(randlora.trainable_parameters(model)))
        4
    """
    require_types(set_trainable, {"trainable": trainable})
    named, doing = listed(names), "set what is trainable"
    with opened(model, doing) as view:
        census, state = view.census, view.state
        raise_collected(AdapterError, state.unknown(named), doing=doing)
        chosen = [state.adapters[name] for name in named]
        sites = [(site, name) for site in census.adapted for name in named if name in site.layer.adapters]
        if trainable:
            parts = [(site.owner, site.layer, name) for site, name in sites]
            copies = [state.replaced[fqn] for adapter in chosen for fqn in adapter.parameters]
            for engine in ENGINES:
                engine.require_averaged(census.model, parts, copies)
        parameters = [*adapter_parameters(census, *chosen)]
        alone = {adapter.name for adapter in chosen if adapter.config.train == "lambda"}
        gammas = [site.layer.diagonals_of(site.owner, name)[1:] for site, name in sites if name in alone]
        fixed = {id(parameter) for each in gammas for parameter in each}
        with all_or_nothing(census, state, flags=parameters):
            for parameter in parameters:
                set_requires_grad(parameter, trainable and id(parameter) not in fixed)
            if state.averaging is not None:
                state.averaging(census.model)
            for engine in ENGINES:
                engine.changed(view.root)


def adapter_parameters(census: Census, *adapters: Adapter) -> Iterator[nn.Parameter]:
    """Yield the parameters of some adapters: Λ and Γ of each weight, then the parameters trained with them."""
    for site in census.adapted:
        for name in [adapter.name for adapter in adapters if adapter.name in site.layer.adapters]:
            yield from site.layer.diagonals_of(site.owner, name)
    for adapter in adapters:
        yield from adapter.parameters.values()

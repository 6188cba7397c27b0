"""`adapters`, `AdapterInfo`: what adapters a model has, and in which state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass

from torch import nn

from randlora.bases.spec import BasisSpec
from randlora.config import RandLoRAConfig
from randlora.model.install import lost_sites
from randlora.model.train_also import lost_parameters
from randlora.model.trainable import adapter_parameters
from randlora.options import Factor, LayerOptions, described
from randlora.report import as_lines, wrapped
from randlora.state import adapted_root, is_adapted
from randlora.targets.match import shortened
from randlora.targets.walk import Census


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model; prints as a few lines.

    Attributes:
        name: Its name.
        config: Its options.
        specs: The specs of its bases, one for each r.
        options: r and alpha of its layers, by FQN.
        train_also: FQNs of the parameters trained with it.
        weight: The factor of its update while active, else ``None``. If it differs between layers, a mapping with that
            of each by FQN. `activate` takes either.
        is_trainable: Whether any of its parameters requires grad.
        is_merged: Whether it is merged into the weights.
        problems: What of it the model no longer has, because a module was replaced, removed or resized.
        buffers: FQNs of the buffers that it has copies of, as of norms that it trains.
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

    @property
    def targets(self) -> tuple[str, ...]:
        """FQNs of its layers."""
        return tuple(self.options)

    @property
    def is_active(self) -> bool:
        """Whether its update is added."""
        return self.weight is not None

    def __str__(self) -> str:
        """Return its options and state in one line, and others for what else there is to say."""
        return "\n".join(wrapped(as_lines([line]) for line in self._lines()))

    def _lines(self) -> Iterator[str]:
        options = described(self.options)
        state = ["inactive" if self.weight is None else f"active{_with_factor(self.weight)}"]
        state += ["trainable" if self.is_trainable else "frozen", *(["merged"] if self.is_merged else [])]
        layers = f"{len(self.options)} layer{'s' * (len(self.options) != 1)}"
        yield f"{self.name!r}: r={options['r']}, alpha={options['alpha']}, {layers}, {', '.join(state)}"
        if self.train_also:
            yield f"also trained: {shortened(self.train_also)}"
        if self.buffers:
            yield f"buffers of its own: {shortened(self.buffers)}"
        yield from self.problems


def adapters(model: nn.Module) -> list[AdapterInfo]:
    """Return a model's adapters in the order they were added; an empty list for a plain model.

    Example:
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
            weight=copy(adapter.weight),
            is_trainable=any(parameter.requires_grad for parameter in adapter_parameters(census, adapter)),
            is_merged=adapter.name in state.merged,
            problems=(*lost_sites(census, [adapter]), *lost_parameters(state, [adapter])),
        )
        for adapter in state.adapters.values()
    ]


def _with_factor(factor: Factor) -> str:
    if isinstance(factor, Mapping):
        return " with a factor for each layer"
    return "" if factor == 1 else f" with the factor {factor:g}"

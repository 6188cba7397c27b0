"""Weights that transformers computes when it loads a checkpoint: one from all experts', several from a fused one.

Objects of transformers do this, and undo it. What they do is never guessed: it is watched on tensors with few values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Read = Callable[[str], Tensor]

PROBE = 2, 3
"""The shape of the tensors that show how weights are joined."""


@dataclass(frozen=True, eq=False)
class Joined:
    """How a stack of matrices is made if each matrix is made of a few tensors of its own, joined along ``dim``.

    ``names`` are those of the tensors of each matrix, in order.
    """

    names: tuple[tuple[str, ...], ...]
    dim: int

    @cached_property
    def places(self) -> dict[str, int]:
        """The index of the matrix that each tensor belongs to."""
        return {name: index for index, names in enumerate(self.names) for name in names}


@dataclass(frozen=True, eq=False)
class Conversion:
    """How transformers computes parameters from tensors in files.

    ``model`` and ``converter`` are objects of transformers, ``undo`` its function that reverts conversions, and ``fqn``
    is the first of the parameters. ``sources`` are the names of the tensors, with the patterns that they match.
    """

    model: Any
    converter: Any
    undo: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]
    fqn: str
    sources: dict[str, str] = field(default_factory=dict)

    def convert(self, read: Read) -> dict[str, Tensor]:
        """Return the parameters, by FQN, that tensors become. Each is read when it is needed."""
        converter = deepcopy(self.converter)
        for name, pattern in self.sources.items():
            converter.add_tensor(self.fqn, name, pattern, lambda name=name: read(name))
        found = converter.convert(self.fqn, model=self.model, config=self.model.config)
        return {fqn: part[0] if isinstance(part, list) else part for fqn, part in found.items()}

    def revert(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors, by name, that all of the parameters become when they are saved."""
        found = self.undo(self.model, dict(parameters))
        if len(self.sources) == 1 == len(found):  # whatever name it would get now
            return dict(zip(self.sources, found.values(), strict=True))
        return found

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Return why tensors of some shapes, by name, are not what the parameters are made of, or ``None``."""
        try:
            found = self.convert(lambda name: torch.empty(shapes[name], device="meta"))
        except Exception as error:  # whatever an operation raises for unsuitable shapes
            return f"transformers cannot convert them ({error})"
        for fqn, parameter in found.items():
            if parameter.shape != (expected := self.model.get_parameter(fqn).shape):
                return f"they give {fqn} the shape {tuple(parameter.shape)}, expected {tuple(expected)}"
        if self.joined is not None:
            return None
        reverted = {name: tuple(tensor.shape) for name, tensor in self.revert(found).items()}
        if reverted != {name: shapes[name] for name in self.sources}:
            return "transformers would save it under other names or in other shapes"
        return None

    @cached_property
    def joined(self) -> Joined | None:
        """How one stack is made matrix by matrix, or ``None`` if it is made in another way."""
        by_pattern = [
            [name for name, its in self.sources.items() if its == pattern] for pattern in self.converter.source_patterns
        ]
        if len({len(names) for names in by_pattern}) != 1:
            return None
        count = PROBE[0] * PROBE[1]
        values = torch.arange(float(len(self.sources) * count), device="cpu").reshape(-1, *PROBE)
        probes = dict(zip(self.sources, values, strict=True))
        try:
            found = self.convert(probes.__getitem__)
        except Exception:  # an operation for weights of certain shapes
            return None
        names = tuple(zip(*by_pattern, strict=True))
        for dim in (0, 1) if len(found) == 1 else ():
            expected = torch.stack([torch.cat([probes[name] for name in own], dim) for own in names])
            if torch.equal(found[self.fqn], expected):
                return Joined(names, dim)
        return None

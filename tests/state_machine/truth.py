"""What a model must be: plain values, and by the formula and a plain twin in float64 its outputs and gradients."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from randlora.bases import BasisSpec
from randlora.bases.basis import Basis
from tests.state_machine.models import Kind, Weight

Pair = tuple[Tensor, Tensor]


@cache
def drawn(spec: BasisSpec, max_dim: int, min_dim: int) -> Pair:
    A, B = Basis(spec).slices(max_dim, min_dim, device="cpu", dtype=torch.float64)
    return A[:, 0].clone(), B.clone()


def update(bases: Pair, lam: Tensor, gamma: Tensor, scaling: float, shape: tuple[int, int]) -> Tensor:
    A, B = bases
    num_bases, (min_dim, max_dim) = len(gamma), sorted(shape)
    factors = torch.einsum("kj,kc,jc->kjc", lam, A[:, :min_dim], gamma).flatten(end_dim=1)
    delta = scaling * torch.einsum("ip,pc->ic", B[:max_dim, :num_bases].flatten(start_dim=1), factors)
    return delta if shape[1] == min_dim else delta.T


@dataclass
class Adapter:
    """One adapter: what it was injected with, and ``(r, alpha)``, Λ and Γ of each weight by FQN.

    ``factor`` is ``None`` while it is inactive, and by FQN where it differs, 0 where it is left out.
    """

    options: dict[str, Any]
    scales: dict[str, tuple[int, float]]
    bases: dict[int, Pair]
    values: dict[str, Pair]
    copies: dict[str, Tensor]
    factor: float | dict[str, float] | None
    trains: bool

    def factor_of(self, weight: Weight) -> float:
        return self.factor[weight.fqn] if isinstance(self.factor, dict) else self.factor or 0.0

    def update(self, weight: Weight, values: Pair | None = None) -> Tensor:
        lam, gamma = (part.double() for part in values or self.values[weight.fqn])
        count, shape = weight.matrices(self.options)
        r, alpha = self.scales[weight.fqn]
        pairs = zip(lam, gamma, strict=True) if count else [(lam, gamma)]
        found = torch.stack([update(self.bases[r], a, b, alpha / r, shape) for a, b in pairs])
        return found if count else found[0]


@dataclass
class Truth:
    """What the model must be.

    Of ``own``, the model's own parameters, one that is displaced by an adapter's copy or a merged weight keeps its bits
    until it is put back, and is converted when the model is. ``life`` counts up whenever the model becomes plain.
    """

    kind: Kind
    dtype: torch.dtype
    twin: nn.Module = field(init=False)
    inputs: tuple[Tensor, ...] = field(init=False)
    own: dict[str, Tensor] = field(init=False)
    own_grad: dict[str, bool] = field(init=False)
    aliases: dict[str, str] = field(init=False)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    merged: dict[str, Tensor] | None = None
    merged_names: set[str] = field(default_factory=set)
    disabled: int = 0
    life: int = 0
    training: bool = False

    def __post_init__(self) -> None:
        plain, self.inputs = self.kind.build(self.dtype)
        self.own = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
        self.own_grad = dict.fromkeys(self.own, True)
        first = {id(parameter): name for name, parameter in plain.named_parameters()}
        self.aliases = {name: first[id(held)] for name, held in plain.named_parameters(remove_duplicate=False)}
        self.twin = self.kind.build(torch.float64)[0].train()  # so that torch takes no fast path

    @property  # whose updates are added, merged or not
    def active(self) -> dict[str, Adapter]:
        return {} if self.disabled else {name: each for name, each in self.adapters.items() if each.factor is not None}

    @property  # whose updates are added and not merged
    def on_top(self) -> dict[str, Adapter]:
        return {name: each for name, each in self.active.items() if name not in self.merged_names}

    @property
    def installed(self) -> dict[str, tuple[Adapter, Tensor]]:
        """The copies that the model uses instead of its own parameters, with their adapters."""
        return {name: (each, value) for each in self.active.values() for name, value in each.copies.items()}

    @property
    def is_random(self) -> bool:
        return self.training and any(each.options["dropout"] for each in self.on_top.values())

    def arguments(self) -> tuple[Tensor, ...]:
        return _cast(self.inputs, self.dtype)

    def weights_of(self, adapter: Adapter) -> list[Weight]:
        return [weight for weight in self.kind.weights if weight.fqn in adapter.values]

    def is_alone_in_attention(self, name: str) -> bool:
        """Whether a weight is the ``out_proj`` of an attention of which no adapter adapts anything else."""
        attention, is_out, _ = name.rpartition(".out_proj.")
        adapted = {weight.name for each in self.adapters.values() for weight in self.weights_of(each)}
        return bool(is_out) and not any(other.startswith(f"{attention}.") for other in adapted - {name})

    def acted_on(self, adapter: Adapter) -> list[Weight]:
        return [weight for weight in self.weights_of(adapter) if adapter.factor_of(weight)]

    def unmerged(self) -> dict[str, Tensor]:
        return self.own | {name: value for name, (_, value) in self.installed.items()}

    def live(self) -> dict[str, Tensor]:
        return self.unmerged() | (self.merged or {})

    def sums(
        self, adapters: Mapping[str, Adapter], values: Mapping[str, Mapping[str, Pair]] | None = None
    ) -> dict[str, Tensor]:
        """Sum the updates of some active adapters, by name of parameter and in its layout, in float64."""
        total: dict[str, Tensor] = {}
        for name, adapter in adapters.items():
            for weight in self.acted_on(adapter):
                delta = adapter.update(weight, values[name][weight.fqn] if values else None)
                placed = weight.placed(delta, self.own[weight.name]) * adapter.factor_of(weight)
                total[weight.name] = placed + total.get(weight.name, 0)
        return total

    def merging(self, names: Iterable[str]) -> dict[str, Tensor]:
        sums = self.sums({name: self.active[name] for name in self.active if name in {*names}})
        return {name: self.unmerged()[name].double() + delta for name, delta in sums.items()}

    def output(self, parameters: dict[str, Tensor] | None = None) -> Tensor:
        if parameters is None:
            parameters = {name: value.double() for name, value in self.live().items()}
            parameters |= {name: parameters[name] + delta for name, delta in self.sums(self.on_top).items()}
        output: Tensor = functional_call(self.twin, parameters, _cast(self.arguments(), torch.float64))
        return output

    def rows(self, names: Sequence[str | None]) -> Tensor:
        """Run the twin once for each of the names, with the update of that adapter alone, and take its rows."""
        outputs, plain = {}, {name: value.double() for name, value in self.own.items()}
        for name in {*names}:
            sums = {} if name is None else self.sums({name: replace(self.adapters[name], factor=1.0)})
            outputs[name] = self.output(plain | {own: plain[own] + delta for own, delta in sums.items()})
        return torch.stack([outputs[name][row] for row, name in enumerate(names)])

    def gradients(self) -> dict[str, Tensor]:
        """Differentiate the sum of the squared output, by name of the parameters that must get a gradient."""
        on_top = self.on_top
        values = {
            name: {fqn: (_leaf(lam), _leaf(gamma)) for fqn, (lam, gamma) in adapter.values.items()}
            for name, adapter in on_top.items()
        }
        live, needs_grad = self.live(), self.requires_grad()
        leaves = {name: _leaf(value) for name, value in live.items() if needs_grad[name]}
        parameters = {name: value.double() for name, value in live.items()} | leaves
        parameters |= {name: parameters[name] + delta for name, delta in self.sums(on_top, values).items()}
        for name, adapter in on_top.items():
            for weight in self.acted_on(adapter) if adapter.trains else ():
                leaves |= zip(diagonal_names(weight.name, name), values[name][weight.fqn], strict=True)
        loss = self.output(parameters).square().sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if leaves else ()
        return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}

    def state(self) -> dict[str, Tensor]:
        """Return the state dict: original weights, even while merged, under every name, and every Λ and Γ."""
        unmerged = self.unmerged()
        found = {name: unmerged[first] for name, first in self.aliases.items()}
        for name, adapter in self.adapters.items():
            for weight in self.weights_of(adapter):
                for alias in (alias for alias, first in self.aliases.items() if first == weight.name):
                    found |= zip(diagonal_names(alias, name), adapter.values[weight.fqn], strict=True)
        return found

    def requires_grad(self) -> dict[str, bool]:
        if not self.adapters:
            return dict(self.own_grad)
        found = dict.fromkeys(self.own, False) | {name: each.trains for name, (each, _) in self.installed.items()}
        found |= dict.fromkeys(self.merged or {}, False)
        for name, adapter in self.adapters.items():
            for weight in self.weights_of(adapter):
                found |= dict.fromkeys(diagonal_names(weight.name, name), adapter.trains)
        return found

    # what the verbs do

    def add(self, name: str, adapter: Adapter, *, is_active: bool) -> None:
        if is_active:
            self.activate({name: 1.0} if name in self.adapters else {})
            adapter.factor = 1.0
        self.adapters[name] = adapter

    def activate(self, factors: Mapping[str, float | dict[str, float]]) -> None:
        for name, adapter in self.adapters.items():
            adapter.factor = factors.get(name)

    def merge(self, names: Iterable[str], found: Mapping[str, Tensor]) -> None:
        """Put the weights merged with the adapters of these names, which were found right, in the place of others."""
        self.merged_names = {*names}
        self.merged = (
            {name: found[name].detach().clone() for name in self.merging(names)} if self.merged_names else None
        )

    def become_plain(self, *, keep: bool) -> None:
        if keep:
            self.own |= self.live()
        self.adapters, self.disabled, self.life = {}, 0, self.life + 1
        self.merge([], {})

    def cast(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.own = {name: value.to(dtype) for name, value in self.own.items()}
        if self.merged is not None:
            self.merged = {name: value.to(dtype) for name, value in self.merged.items()}
        for adapter in self.adapters.values():
            adapter.values = {fqn: (lam.to(dtype), gamma.to(dtype)) for fqn, (lam, gamma) in adapter.values.items()}
            adapter.copies = {fqn: value.to(dtype) for fqn, value in adapter.copies.items()}

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Take over what a state dict of this model holds, in the dtype that each value has."""
        for name, value in state.items():
            if (first := self.aliases.get(name)) is not None:
                own = self.installed[first][0].copies if first in self.installed else self.own
                own[first] = value.detach().to(self.dtype, copy=True)
        for name, adapter in self.adapters.items():
            for weight in self.weights_of(adapter):
                held = zip(diagonal_names(weight.name, name), adapter.values[weight.fqn], strict=True)
                lam, gamma = (state.get(key, part).detach().to(part, copy=True) for key, part in held)
                adapter.values[weight.fqn] = lam, gamma


def first_values(adapter_options: Mapping[str, Any], weight: Weight, r: int) -> Pair:
    """Return the Λ and Γ that training starts from: 0 and 1 / max(n, m)."""
    count, shape = weight.matrices(adapter_options)
    num_bases = math.ceil(min(shape) / r)
    stack = (count,) if count else ()
    gamma = torch.full((*stack, num_bases, min(shape)), 1 / max(num_bases, min(shape)))
    return torch.zeros(*stack, r, num_bases), gamma


def diagonal_names(parameter: str, adapter: str) -> tuple[str, str]:
    owner, _, attribute = parameter.rpartition(".")
    before = f"{owner}." if attribute == "weight" else f"{owner}.{attribute}_"
    return f"{before}randlora_lambda.{adapter}", f"{before}randlora_gamma.{adapter}"


def _leaf(value: Tensor) -> Tensor:
    return value.double().requires_grad_()


def _cast(arguments: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in arguments)

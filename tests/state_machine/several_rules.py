"""The rules of several adapters in one model: renaming, combining, a row each, other values in their place, a pool."""

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor

import randlora
from randlora.errors import AdapterError
from tests.kit import assert_unchanged, snapshot, untouched
from tests.state_machine.base import ModelMachine, is_adapted, is_free
from tests.state_machine.invariants import assert_near
from tests.state_machine.recipes import names, which
from tests.state_machine.truth import Adapter, diagonal_names, drawn

EXACT = 1e-5
"""The largest error of a sum that is said to be exact, relative to the norms of its terms: float32 Λ and Γ."""


class SeveralRules(ModelMachine):
    """One rule for each verb on adapters beside one another."""

    @is_adapted
    @rule(which=which, to=names)
    def rename(self, which: int, to: str) -> None:
        name, truth = self.name(which), self.truth
        refused = AdapterError if to in truth.adapters or truth.merged is not None else None
        self.ask(refused, randlora.rename, name, to)
        if refused is None:
            renamed = dict(_renamed(self, name, to))
            self.held = {renamed.get(key, key): parameter for key, parameter in self.held.items()}
            truth.rename(name, to)

    @is_adapted
    @rule(which=which, flag=st.booleans())
    def set_trainable(self, which: int, flag: bool) -> None:
        name = self.name(which)
        randlora.set_trainable(self.model, name, flag)
        self.truth.adapters[name].trains = flag

    @is_free
    @rule(of=st.tuples(which, which), by=st.sampled_from([(1.0, 0.0), (0.5, -2.0), (-1.0, 1.0)]), name=names)
    def combine(self, of: tuple[int, int], by: tuple[float, float], name: str) -> None:
        """A sum that no adapter on these bases has is refused, by a table of tests."""
        factors = dict(zip(map(self.name, of), by, strict=True))
        before = snapshot(self.model)
        try:
            randlora.serving.combine(self.model, factors, name=name)
        except AdapterError:
            assert_unchanged(self.model, before)
        else:
            assert name not in self.truth.adapters
            self.take_over(name, factors)

    def take_over(self, name: str, factors: dict[str, float]) -> None:
        """Hold the update of a new adapter against the sum, by its own Λ and Γ, and take these over."""
        truth = self.truth
        sources = {each: truth.adapters[each] for each in factors}
        first = next(iter(sources.values()))
        info = next(info for info in randlora.adapters(self.model) if info.name == name)
        state, values, scales, bases = self.model.state_dict(), {}, {}, {}
        for weight in truth.kind.weights:
            own = {each: source for each, source in sources.items() if weight.fqn in source.values}
            if not own:
                continue
            scales[weight.fqn] = r, _ = _scale([*sources.values()], weight.fqn)
            assert info.options[weight.fqn] == scales[weight.fqn]
            lam, gamma = (state[key].clone() for key in diagonal_names(weight.name, name))
            values[weight.fqn] = lam, gamma
            bases[r] = self.bases_of(info.specs, r)
        made = Adapter(first.options, scales, bases, values, {}, None, trains=False)
        for weight in truth.weights_of(made):
            terms = [factors[e] * s.update(weight) for e, s in sources.items() if weight.fqn in s.values]
            total = torch.stack(terms).sum(0)
            wrong = (made.update(weight) - total).norm()
            assert wrong <= EXACT * sum(term.norm() for term in terms), f"{weight.fqn} is off by {wrong}"
        for copy in {copy for source in sources.values() for copy in source.copies}:
            plain = truth.own[copy].to(truth.dtype).double()
            changes = [factors[e] * (s.copies[copy].double() - plain) for e, s in sources.items() if copy in s.copies]
            found = randlora.state.adapted_root(self.model)[1].adapters[name].trained[copy].detach()
            assert_near(found, plain + torch.stack(changes).sum(0), truth.dtype)
            made.copies[copy] = found.clone()
        truth.adapters[name] = made

    def bases_of(self, specs: Any, r: int) -> Any:
        """Draw the bases of a rank for the largest layers of the model."""
        spec = next(spec for spec in specs if spec.r == r)
        return drawn(spec, spec.max_dim, spec.min_dim)

    @is_free
    @rule(of=st.lists(st.none() | which, min_size=5, max_size=5), by_pool=st.booleans())
    def route(self, of: list[int | None], by_pool: bool) -> None:
        truth = self.truth
        rows: list[str | None] = [None if each is None else self.name(each) for each in of]
        rows = rows[: len(truth.arguments()[0])]
        used = [truth.adapters[name] for name in {*rows} if name is not None]
        if any(adapter.copies for adapter in used):
            with untouched(self.model):
                self.ask(AdapterError, lambda model: randlora.serving.routed(model, rows).__enter__())
            return
        if truth.training and any(adapter.options["dropout"] for adapter in used):
            return
        with untouched(self.model), torch.no_grad(), randlora.serving.routed(self.model, rows):
            found: Tensor = self.model(*truth.arguments())
            assert_near(found, truth.rows(rows), truth.dtype)
        if by_pool and (named := {name for name in rows if name is not None}):
            self.route_by_pool(rows, named, found)

    def route_by_pool(self, rows: list[str | None], named: set[str], expected: Tensor) -> None:
        """Compare the same rows through copies of the adapters that a pool loads."""
        states = {f"of_{name}": randlora.adapter_state(self.model, name) for name in named}
        pool = randlora.serving.AdapterPool(self.model, states, max_loaded=len(states))
        with torch.no_grad(), pool.routed([None if name is None else f"of_{name}" for name in rows]):
            assert_near(self.model(*self.truth.arguments()), expected.double(), self.truth.dtype)
        for name in pool.loaded:
            randlora.remove(self.model, name)

    @is_adapted
    @rule(which=which, factor=st.sampled_from([0.5, -2.0]))
    def swap(self, which: int, factor: float) -> None:
        name, truth = self.name(which), self.truth
        with untouched(self.model):
            state = randlora.adapter_state(self.model, name)
        state = state.with_tensors({key: value * factor for key, value in state.tensors.items()})
        refused = AdapterError if truth.merged is not None else None
        self.ask(refused, randlora.swap, state, name=name)
        if refused is None:
            adapter = truth.adapters[name]
            values = {fqn: (lam * factor, gamma * factor) for fqn, (lam, gamma) in adapter.values.items()}
            adapter.values, adapter.copies = values, {copy: each * factor for copy, each in adapter.copies.items()}


def _scale(sources: list[Adapter], fqn: str) -> tuple[int, float]:
    return next(source.scales[fqn] for source in sources if fqn in source.values)


def _renamed(machine: ModelMachine, name: str, to: str) -> Any:
    for weight in machine.truth.weights_of(machine.truth.adapters[name]):
        yield from zip(diagonal_names(weight.name, name), diagonal_names(weight.name, to), strict=True)

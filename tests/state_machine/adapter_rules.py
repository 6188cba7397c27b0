"""The rules of adapters in memory: adding, activating and removing them, merging, and blocks of ``with``."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor

import randlora
from randlora.errors import AdapterError, MergeError, TargetError
from randlora.functional import Compute
from tests.kit import untouched
from tests.state_machine.base import ModelMachine, Refused, is_adapted, is_free, is_plain, is_unmerged
from tests.state_machine.invariants import assert_near, assert_weights_near
from tests.state_machine.recipes import Factors, Recipe, factors, maybe, names, recipes, which
from tests.state_machine.truth import diagonal_names


class AdapterRules(ModelMachine):
    """One rule for each verb on adapters."""

    @is_plain
    @rule(first=recipes, second=st.none() | recipes)
    def begin(self, first: Recipe, second: Recipe | None) -> None:
        """Inject one adapter or two, so that a model is seldom plain for long."""
        self.inject("a", first, None, None)
        if second is not None:
            self.inject("b", second, None, True)

    @is_unmerged
    @rule(name=names, recipe=recipes, active=maybe, trainable=maybe)
    def inject(self, name: str, recipe: Recipe, active: bool | None, trainable: bool | None) -> None:
        truth = self.truth
        options = {**recipe.options(truth.kind), "name": name, "active": active, "trainable": trainable}
        refused: Refused = AdapterError if name in truth.adapters else recipe.misfit(truth.kind)
        with untouched(self.model):
            planned = None if refused else randlora.plan(self.model, **options)
        report = self.ask(refused, randlora.inject, **options)
        if refused:
            return
        assert report == planned
        is_first = not truth.adapters
        trains = is_first if trainable is None else trainable
        adapter = recipe.adapter(truth.kind, report.specs, own=truth.own, trains=trains)
        truth.add(name, adapter, is_active=is_first if active is None else active)
        if not recipe.is_fresh:
            self.stir(name)

    def stir(self, name: str) -> None:
        """Move what the model has of an adapter, as some training would."""
        self.holds()
        own = [copy for copy, (adapter, _) in self.truth.installed.items() if adapter is self.truth.adapters[name]]
        for weight in self.truth.weights_of(self.truth.adapters[name]):
            own += diagonal_names(weight.name, name)
        generator = torch.Generator().manual_seed(len(self.truth.adapters))
        with torch.no_grad():
            for parameter in map(self.model.get_parameter, own):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
        self.truth.take({each: self.model.get_parameter(each) for each in own})

    @is_free
    @rule(chosen=factors, form=st.sampled_from(["name", "names", "mapping"]), trainable=maybe)
    def activate(self, chosen: Factors, form: str, trainable: bool | None) -> None:
        each = zip(self.truth.adapters, chosen, strict=False)  # of some chosen factors there is no adapter
        factor_of = {name: factor for name, factor in each if factor is not None}
        given: Any = dict(factor_of)
        if form != "mapping":
            factor_of, given = dict.fromkeys(factor_of, 1.0), list(factor_of)
        if form == "name" and len(given) == 1:
            (given,) = given
        adapters = [self.truth.adapters[name] for name in factor_of]
        copies = [name for adapter in adapters for name in adapter.copies]
        refused = AdapterError if len(set(copies)) < len(copies) else None
        self.ask(refused, randlora.activate, given, trainable=trainable)
        if refused is None:
            self.truth.activate(factor_of)
            for adapter in adapters:
                adapter.trains = adapter.trains if trainable is None else trainable

    @is_free
    @rule(which=which)
    def remove(self, which: int) -> None:
        name = self.name(which)
        randlora.remove(self.model, name)
        del self.truth.adapters[name]
        if not self.truth.adapters:
            self.truth.become_plain(keep=False)

    @is_adapted
    @rule()
    def eject(self) -> None:
        restored = randlora.eject(self.model)
        assert {*restored} == {fqn for adapter in self.truth.adapters.values() for fqn in adapter.values}
        self.truth.become_plain(keep=False)

    @is_adapted
    @rule(compute=st.sampled_from(["auto", "factored", "materialized"]))
    def set_compute(self, compute: Compute) -> None:
        randlora.set_compute(self.model, compute)

    @is_adapted
    @rule(place=st.integers(0, 6), of=st.none() | which)
    def delta_weight(self, place: int, of: int | None) -> None:
        truth, name = self.truth, None if of is None else self.name(of)
        weight = truth.kind.weights[place % len(truth.kind.weights)]
        is_adapted = any(weight.fqn in adapter.values for adapter in truth.adapters.values())
        refused = None if is_adapted else TargetError
        found = self.ask(refused, randlora.delta_weight, weight.fqn, name=name)
        if refused:
            return
        summed = {name: 1.0} if name else {name: each.factor for name, each in truth.adapters.items() if each.factor}
        expected = torch.zeros_like(truth.own[weight.name], dtype=torch.float64)
        for each, factor in summed.items():
            if weight.fqn in (adapter := truth.adapters[each]).values:
                expected = expected + factor * weight.placed(adapter.update(weight), expected)
        assert_near(weight.placed(found, expected), expected, torch.promote_types(truth.dtype, torch.float32))

    def unless_mergeable(self, *, reversible: bool) -> Refused:
        """What must be raised by a merge now."""
        truth = self.truth
        is_loss = not reversible and len(truth.active) < len(truth.adapters)
        return MergeError if truth.merged is not None or not truth.active or is_loss else None

    @is_adapted
    @rule(reversible=st.booleans())
    def merge(self, reversible: bool) -> None:
        refused = self.unless_mergeable(reversible=reversible)
        expected = None if refused else self.truth.merging()
        report = self.ask(refused, randlora.merge, reversible=reversible)
        if expected is None:
            return
        assert report.adapters == {name: adapter.factor for name, adapter in self.truth.active.items()}
        self.merge_as(expected)
        if not reversible:
            self.truth.become_plain(keep=True)

    def merge_as(self, expected: dict[str, Tensor]) -> None:
        """Check the merged weights, and take over how they were rounded."""
        found = dict(self.model.named_parameters())
        assert_weights_near(found, expected, self.truth.dtype)
        self.truth.merge(found)

    @precondition(lambda self: self.truth.merged is not None)
    @rule()
    def unmerge(self) -> None:
        randlora.unmerge(self.model)
        self.truth.merged = None

    def enter(self, refused: Refused, block: Callable[..., Any], what: str) -> None:
        """Open a block, which `leave` closes some time later."""
        manager = self.ask(refused, lambda model: _entered(block(model)))
        if refused is None:
            self.blocks.append((manager, what, self.truth.life))

    @is_free
    @rule()
    def disable(self) -> None:
        self.enter(None, randlora.disabled, "disabled")
        self.truth.disabled += 1

    @is_adapted
    @rule()
    def merge_for_a_while(self) -> None:
        is_nested = self.truth.merged is not None
        refused = None if is_nested else self.unless_mergeable(reversible=True)
        expected = None if refused or is_nested else self.truth.merging()
        self.enter(refused, randlora.merged, "nested" if is_nested else "merged")
        if expected is not None:
            self.merge_as(expected)

    @precondition(lambda self: self.blocks)
    @rule()
    def leave(self) -> None:
        manager, what, life = self.blocks.pop()
        manager.__exit__(None, None, None)
        if life == self.truth.life and what == "disabled":
            self.truth.disabled -= 1
        if life == self.truth.life and what == "merged":
            self.truth.merged = None


def _entered(manager: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    manager.__enter__()
    return manager

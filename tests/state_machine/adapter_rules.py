"""The rules of adapters in memory: adding, activating and removing them, merging, and blocks of ``with``."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import randlora
from randlora.errors import AdapterError, MergeError, TargetError
from randlora.functional import Compute
from tests.kit import untouched
from tests.state_machine.base import (
    ModelMachine,
    Refused,
    assert_near,
    assert_weights_near,
    is_adapted,
    is_free,
    is_merged,
    is_plain,
    is_unmerged,
)
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
        truth, recipe = self.truth, replace(recipe, beside=()) if self.is_half else recipe
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
    @rule(chosen=factors, form=st.sampled_from(["name", "names", "mapping"]))
    def activate(self, chosen: Factors, form: str) -> None:
        factor_of = self.chosen(chosen)
        given: Any = factor_of
        if form != "mapping":
            factor_of, given = dict.fromkeys(factor_of, 1.0), [*factor_of]
        if form == "name" and len(given) == 1:
            (given,) = given
        refused = AdapterError if self.share(factor_of) else None
        self.ask(refused, randlora.activate, given)
        if refused is None:
            self.truth.activate(factor_of)

    @is_free
    @rule(chosen=factors, place=st.integers(0, 6), scales=st.none() | st.permutations([1.0, 0.0, -0.5]))
    def activate_in_layers(self, chosen: Factors, place: int, scales: list[float] | None) -> None:
        """Activate adapters in one layer and those whose names begin with its, or with another factor in each."""
        truth, given = self.truth, self.chosen(chosen)
        named = truth.kind.weights[place % len(truth.kind.weights)].fqn
        factor_of, is_nowhere = {}, False
        for name, by in given.items():
            fqns = sorted(truth.adapters[name].values, key=len, reverse=True)
            inside = [fqn for fqn in fqns if f".{named}." in f".{fqn}."]
            in_turn = zip(fqns, itertools.cycle(scales or [1.0]), strict=False)
            factor_of[name] = dict(in_turn) if scales else {fqn: by * (fqn in inside) for fqn in fqns}
            is_nowhere |= not (scales or inside)
        refused = AdapterError if self.share(given) or is_nowhere else None
        if scales:
            self.ask(refused, randlora.activate, factor_of)
        else:
            self.ask(refused, randlora.activate, given, layers=named)
        if refused is None:
            one_or_all = {name: {*by.values()} for name, by in factor_of.items()}
            truth.activate({name: by.pop() if len(by) == 1 else factor_of[name] for name, by in one_or_all.items()})

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
        summed = [replace(truth.adapters[name], factor=1.0)] if name else [*truth.adapters.values()]
        expected = torch.zeros_like(truth.own[weight.name], dtype=torch.float64)
        for adapter in summed:
            if weight.fqn in adapter.values:
                expected = expected + adapter.factor_of(weight) * weight.placed(adapter.update(weight), expected)
        assert_near(weight.placed(found, expected), expected, torch.promote_types(truth.dtype, torch.float32))

    def unless_mergeable(self, names: set[str], *, reversible: bool) -> Refused:
        """What must be raised by a merge of active adapters now."""
        truth = self.truth
        if not names <= {*truth.on_top}:  # inactive, merged, or disabled
            return MergeError
        is_loss = not reversible and len(names) < len(truth.adapters)
        into = {weight.name for name in names for weight in truth.acted_on(truth.adapters[name])}
        left = [each for name, each in truth.on_top.items() if name not in names]
        is_trained = any(not into.isdisjoint(each.copies) for each in left)
        is_again = bool(truth.merged_names) and (not reversible or not truth.on_top)
        return MergeError if not truth.active or not names or is_loss or is_trained or is_again else None

    @is_adapted
    @rule(reversible=st.booleans(), some=st.none() | st.sets(which))
    def merge(self, reversible: bool, some: set[int] | None) -> None:
        truth = self.truth
        names = {*truth.on_top} if some is None else {self.name(each) for each in some}
        refused = self.unless_mergeable(names, reversible=reversible)
        given = {} if some is None else {"adapters": sorted(names)}
        report = self.ask(refused, randlora.merge, reversible=reversible, **given)
        if refused:
            return
        assert report.adapters == {name: truth.adapters[name].factor for name in truth.adapters if name in names}
        self.merge_as(names | truth.merged_names)
        if not reversible:
            truth.become_plain(keep=True)

    def merge_as(self, names: set[str]) -> None:
        """Check the weights merged with these adapters, and take over how they were rounded."""
        expected = self.truth.merging(names)
        found, were = dict(self.model.named_parameters()), self.truth.merged or {}
        changed = [self.truth.adapters[name] for name in names ^ self.truth.merged_names]
        touched = {weight.name for adapter in changed for weight in self.truth.weights_of(adapter)}
        near = {name: value for name, value in expected.items() if name in touched}
        assert_weights_near(found, near, self.truth.dtype)
        stayed = [name for name in expected.keys() - near.keys() if not torch.equal(found[name], were[name])]
        assert not stayed, f"merged anew: {stayed}"
        self.truth.merge(names, found)

    @is_merged
    @rule(some=st.none() | st.sets(which, min_size=1))
    def unmerge(self, some: set[int] | None) -> None:
        names = {*self.truth.merged_names} if some is None else {self.name(each) for each in some}
        refused = None if names <= self.truth.merged_names else MergeError
        self.ask(refused, randlora.unmerge, *([] if some is None else [sorted(names)]))
        if refused is None:
            self.merge_as(self.truth.merged_names - names)

    @is_merged
    @rule(chosen=factors)
    def activate_on_top(self, chosen: Factors) -> None:
        truth, factor_of = self.truth, self.chosen(chosen)
        given: dict[str, Any] = factor_of | {name: truth.adapters[name].factor or 0.0 for name in truth.merged_names}
        owners = {copy: id(truth.adapters[name]) for name in given for copy in truth.adapters[name].copies}
        is_exchange = owners != {copy: id(adapter) for copy, (adapter, _) in truth.installed.items()}
        refused = AdapterError if self.share(given) or is_exchange else None
        self.ask(refused, randlora.activate, given)
        if refused is None:
            truth.activate(given)

    def enter(self, refused: Refused, block: Callable[..., Any], merges: set[str] | None = None) -> None:
        """Open a block, which `leave` closes some time later: one that merges these adapters, or one of `disabled`."""
        manager = block(self.model)
        self.ask(refused, lambda _: manager.__enter__())
        if refused is None:
            self.blocks.append((manager, merges, self.truth.life))

    @is_free
    @rule()
    def disable(self) -> None:
        self.enter(None, randlora.disabled)
        self.truth.disabled += 1

    @is_adapted
    @rule()
    def merge_for_a_while(self) -> None:
        truth, names = self.truth, {*self.truth.on_top}
        is_nested = truth.merged is not None and not names
        refused = None if is_nested else self.unless_mergeable(names, reversible=True)
        self.enter(refused, randlora.merged, set() if is_nested else names)
        if not refused and not is_nested:
            self.merge_as(names | truth.merged_names)

    @precondition(lambda self: self.blocks)
    @rule(error=st.sampled_from([None, ZeroDivisionError()]))
    def leave(self, error: ZeroDivisionError | None) -> None:
        truth, (manager, merges, life) = self.truth, self.blocks.pop()
        assert not manager.__exit__(type(error) if error else None, error, None), "an exception must not be hidden"
        if life == truth.life and merges is None:
            truth.disabled -= 1
        if life == truth.life and (own := (merges or set()) & truth.merged_names):
            self.merge_as(truth.merged_names - own)

"""The model, the truth about it, and the rules of adapters in memory: adding, activating, removing and merging them."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

import randlora
from randlora.errors import AdapterError, MergeError, RandLoRAError, TargetError
from randlora.model.instance_methods import CONVERT
from randlora.state import ATTRIBUTE
from tests.kit import all_bits, bits, untouched
from tests.state_machine.recipes import NAMES, Factors, Recipe, factors, maybe, names, recipes, which
from tests.state_machine.refusals import is_adapted, is_free, is_merged, is_unmerged
from tests.state_machine.truth import Adapter, Truth, diagonal_names
from tests.torture.faults import fast_disk

Refused = type[RandLoRAError] | None

OUTPUT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.15}
"""Of outputs, relative to the largest: what some layers one after the other make of the roundings of a dtype."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of a merged weight, relative to each value, which is rounded once; and to the update, summed in float32."""


def assert_classes_are(model: nn.Module, truth: Truth) -> None:
    adapted = {weight.name.rpartition(".")[0] for each in truth.adapters.values() for weight in truth.weights_of(each)}
    for fqn, plain in truth.twin.named_modules():
        module = model.get_submodule(fqn)
        assert (type(module) is not type(plain)) == (fqn in adapted), f"{fqn} is a {type(module).__name__}"
        assert isinstance(module, type(plain))
        if fqn not in adapted:
            more = vars(module).keys() ^ vars(plain).keys()
            kept = {ATTRIBUTE} if truth.adapters else set[str]()
            kept |= {CONVERT} if any(each.copies for each in truth.adapters.values()) else set()
            assert more == (set() if fqn else kept), f"{fqn} has {more}"


def assert_values_are(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), f"names: {sorted(found.keys() ^ expected.keys())}"
    changed = [name for name, value in found.items() if bits(value) != bits(expected[name])]
    assert not changed, f"other bits: {changed}"


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, *, least: float = 1.0, loss: float = 1.0) -> None:
    """Compare relative to the largest value, or to ``least`` if that is larger."""
    scale = max(least, expected.abs().max().item())
    error = (found.double() - expected).abs().max().item()
    assert error <= OUTPUT[dtype] * loss * scale, f"off by {error:.3g} of {scale:.3g}"


def assert_weights_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, value in expected.items():
        error = (found[name].double() - value).abs()
        allowed = ROUNDING[dtype] * value.abs() + min(ROUNDING[dtype], 1e-5) * max(1.0, value.abs().max().item())
        assert found[name].dtype == dtype, name
        assert bool((error <= allowed).all()), f"{name} is off by {error.max().item():.3g} after merging"


class AdapterRules(RuleBasedStateMachine):
    model: nn.Module
    truth: Truth
    is_half: bool

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.root = self.cleanup.enter_context(fast_disk())
        self.saved: dict[int, Adapter] = {}
        self.remembered: dict[str, Tensor] = {}
        self.blocks: list[tuple[AbstractContextManager[Any], set[str] | None, int]] = []
        self.bystanders: list[tuple[nn.Module, dict[str, Any]]] = []
        self.held: dict[str, nn.Parameter] = {}

    def ask(self, refused: Refused, verb: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a verb. If it is to be refused, check that it is, without a trace, and return ``None``."""
        if refused is None:
            return verb(self.model, *args, **options)
        with untouched(self.model), pytest.raises(refused):
            verb(self.model, *args, **options)
        return None

    def path(self, slot: int) -> Path:
        return self.root / f"adapter_{slot}"

    def name(self, which: int) -> str:
        return list(self.truth.adapters)[which % len(self.truth.adapters)]

    def new_name(self, drawn: str | None) -> str:
        return drawn or next((name for name in NAMES if name not in self.truth.adapters), NAMES[0])

    def chosen(self, factors: Iterable[float | None]) -> dict[str, float]:
        return {name: by for name, by in zip(self.truth.adapters, factors, strict=False) if by is not None}

    def share(self, names: Iterable[str]) -> bool:
        """Whether two of some adapters have a copy of the same parameter, so that both cannot be active."""
        copies = [copy for name in names for copy in self.truth.adapters[name].copies]
        return len({*copies}) < len(copies)

    @invariant()
    def holds(self) -> None:
        model, truth = self.model, self.truth
        found = [
            (info.name, info.weight, info.is_trainable, info.is_merged, set(info.train_also), set(info.targets))
            for info in randlora.adapters(model)
        ]
        expected = [
            (name, each.factor, each.trains, name in truth.merged_names, set(each.copies), set(each.values))
            for name, each in truth.adapters.items()
        ]
        assert found == expected, f"{found}, expected {expected}"
        assert all(module.training == truth.training for module in model.modules())
        assert_classes_are(model, truth)
        parameters = dict(model.named_parameters())
        assert_values_are(model.state_dict(), truth.state())
        assert_values_are({name: parameters[name] for name in truth.own}, truth.live())
        assert {name: each.requires_grad for name, each in parameters.items()} == truth.requires_grad()
        replaced = [name for name, parameter in self.held.items() if parameters.get(name, parameter) is not parameter]
        assert not replaced, f"other objects, which an optimizer does not know: {replaced}"
        if not truth.is_random:
            with torch.no_grad():
                output: Tensor = model(*truth.arguments())
            assert output.dtype == truth.dtype
            assert_near(output, truth.output(), truth.dtype)
        self.held = {name: parameter for name, parameter in parameters.items() if name not in truth.own}
        for bystander, before in self.bystanders:
            assert all_bits(bystander.state_dict()) == before, "a copy changed the model that it was made of"

    @is_unmerged
    @rule(name=names, recipe=recipes, active=maybe, trainable=maybe, place=st.none() | st.integers(0, 9))
    def inject(
        self, name: str | None, recipe: Recipe, active: bool | None, trainable: bool | None, place: int | None
    ) -> None:
        """Add an adapter. Of a plain model, a parameter may be frozen first, or trained if it was frozen."""
        truth, recipe = self.truth, replace(recipe, beside=()) if self.is_half else recipe
        name = self.new_name(name)
        if place is not None and not truth.adapters:
            own = list(truth.own)[place % len(truth.own)]
            truth.own_grad[own] = not truth.own_grad[own]
            self.model.get_parameter(own).requires_grad_(truth.own_grad[own])
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
        self.holds()
        moved = self.truth.adapters[name]
        own = [copy for copy, (adapter, _) in self.truth.installed.items() if adapter is moved]
        own += [each for weight in self.truth.weights_of(moved) for each in diagonal_names(weight.name, name)]
        generator = torch.Generator().manual_seed(len(self.truth.adapters))
        with torch.no_grad():
            for parameter in map(self.model.get_parameter, own):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
        self.truth.take({each: self.model.get_parameter(each) for each in own})

    @is_adapted
    @rule(chosen=factors, form=st.sampled_from(["name", "names", "mapping"]))
    def activate(self, chosen: Factors, form: str) -> None:
        truth, factor_of = self.truth, self.chosen(chosen)
        if truth.merged is not None:
            self.activate_on_top(factor_of)
            return
        given: Any = factor_of if form == "mapping" else [*factor_of]
        factor_of = factor_of if form == "mapping" else dict.fromkeys(factor_of, 1.0)
        self.activated(self.share(factor_of), factor_of, given[0] if form == "name" and len(given) == 1 else given)

    def activate_on_top(self, factor_of: dict[str, float]) -> None:
        truth = self.truth
        given: dict[str, Any] = factor_of | {name: truth.adapters[name].factor or 0.0 for name in truth.merged_names}
        owners = {copy: id(truth.adapters[name]) for name in given for copy in truth.adapters[name].copies}
        is_exchange = owners != {copy: id(adapter) for copy, (adapter, _) in truth.installed.items()}
        self.activated(self.share(given) or is_exchange, given, given)

    def activated(self, is_refused: bool, factor_of: dict[str, Any], given: Any) -> None:
        self.ask(AdapterError if is_refused else None, randlora.activate, given)
        if not is_refused:
            self.truth.activate(factor_of)

    @is_free
    @rule(chosen=factors, place=st.integers(0, 6), scales=st.none() | st.permutations([1.0, 0.0, -0.5]))
    def activate_in_layers(self, chosen: Factors, place: int, scales: list[float] | None) -> None:
        """Activate adapters in one layer and those whose names begin with its, or with another factor in each."""
        truth, given = self.truth, self.chosen(chosen)
        named = truth.kind.weights[place % len(truth.kind.weights)].fqn
        by_layer: dict[str, dict[str, float]] = {}
        is_refused = self.share(given)
        for name, factor in given.items():
            fqns = sorted(truth.adapters[name].values, key=len, reverse=True)  # a short one is the end of longer ones
            if scales is None:
                inside = {fqn for fqn in fqns if f".{named}." in f".{fqn}."}
                by_layer[name] = {fqn: factor if fqn in inside else 0.0 for fqn in fqns}
                is_refused = is_refused or not inside
            else:
                by_layer[name] = dict(zip(fqns, itertools.cycle(scales), strict=False))
        alike = {name: next(iter(own.values())) for name, own in by_layer.items() if len({*own.values()}) == 1}
        if scales is None:
            patterns: Any = {name: {named: factor, ".*": 0.0} for name, factor in given.items()}
            self.activated(is_refused, by_layer | alike, patterns)
        else:
            self.activated(is_refused, by_layer | alike, by_layer)

    @is_free
    @rule(which=which)
    def remove(self, which: int) -> None:
        randlora.remove(self.model, name := self.name(which))
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
    @rule(place=st.integers(0, 6), of=st.none() | which)
    def delta_weight(self, place: int, of: int | None) -> None:
        truth, name = self.truth, None if of is None else self.name(of)
        weight = truth.kind.weights[place % len(truth.kind.weights)]
        refused = None if any(weight.fqn in each.values for each in truth.adapters.values()) else TargetError
        found = self.ask(refused, randlora.delta_weight, weight.fqn, name=name)
        if refused:
            return
        summed = {name: replace(truth.adapters[name], factor=1.0)} if name else truth.adapters
        expected = truth.sums(summed).get(weight.name, torch.zeros_like(truth.own[weight.name], dtype=torch.float64))
        assert_near(weight.placed(found, expected), expected, torch.promote_types(truth.dtype, torch.float32))

    def unless_mergeable(self, names: set[str], *, reversible: bool) -> Refused:
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
    @rule(reversible=st.sampled_from([True, True, False]), of=st.none() | which)
    def merge(self, reversible: bool, of: int | None) -> None:
        truth, names = self.truth, _one_or_all(self.truth.on_top, of)
        refused = self.unless_mergeable(names, reversible=reversible)
        given = {} if of is None else {"adapters": [*names]}
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
    @rule(of=st.sampled_from([0, 1, 2, None]))
    def unmerge(self, of: int | None) -> None:
        names = _one_or_all(self.truth.merged_names, of)
        randlora.unmerge(self.model, None if of is None else [*names])
        self.merge_as(self.truth.merged_names - names)

    def enter(self, refused: Refused, block: Callable[..., Any], merges: set[str] | None = None) -> None:
        """Open a block, which `leave` closes some time later: one that merges these adapters, or one of `disabled`."""
        manager = block(self.model)
        self.ask(refused, lambda _: manager.__enter__())
        if refused is None:
            self.blocks.append((manager, merges, self.truth.life))

    @precondition(lambda self: self.blocks or self.truth.adapters)
    @rule(does=st.sampled_from(["merge", "disable", "end"]), error=st.sampled_from([None, ZeroDivisionError()]))
    def block(self, does: str, error: ZeroDivisionError | None) -> None:
        if self.blocks and (does == "end" or not self.truth.adapters or len(self.blocks) > 1):
            self.leave(error)
        elif does == "merge":
            self.merge_for_a_while()
        else:
            refused = None if self.truth.merged is None else AdapterError
            self.enter(refused, randlora.disabled)
            self.truth.disabled += refused is None

    @property
    def is_inside(self) -> bool:
        return any(merges and life == self.truth.life for _, merges, life in self.blocks)

    def merge_for_a_while(self) -> None:
        truth, names = self.truth, {*self.truth.on_top}
        is_idle = truth.merged is not None and not names
        mergeable = None if is_idle else self.unless_mergeable(names, reversible=True)
        refused = MergeError if self.is_inside else mergeable
        self.enter(refused, randlora.merged, names)
        if not refused and names:
            self.merge_as(names | truth.merged_names)

    def leave(self, error: ZeroDivisionError | None) -> None:
        truth, (manager, merges, life) = self.truth, self.blocks.pop()
        assert not manager.__exit__(type(error) if error else None, error, None), "an exception must not be hidden"
        if life == truth.life and merges is None:
            truth.disabled -= 1
        if life == truth.life and (own := (merges or set()) & truth.merged_names):
            self.merge_as(truth.merged_names - own)


def _one_or_all(names: Iterable[str], of: int | None) -> set[str]:
    held = sorted(names)
    return {held[of % len(held)]} if held and of is not None else {*held}

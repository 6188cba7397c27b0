"""All rules together: what users do to any model, several adapters beside one another, files, and refused calls."""

import copy
import inspect
import pickle
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import INITIALIZE_RULE_MARKER, RULE_MARKER, initialize, precondition, rule
from safetensors.torch import load_file, save_file
from torch import Tensor

import randlora
from randlora.checkpoint.read import read_adapter
from randlora.errors import AdapterError, MergeError
from tests.kit import all_bits, assert_unchanged, bits, snapshot, untouched
from tests.state_machine.adapter_rules import AdapterRules, Refused, assert_near, assert_weights_near
from tests.state_machine.models import KINDS
from tests.state_machine.recipes import DTYPES, Factors, Recipe, factors, maybe, names, recipes, slots, which
from tests.state_machine.refusals import REFUSALS, WHEN, has_saved, is_adapted, is_free, is_unmerged
from tests.state_machine.truth import Adapter, Truth, diagonal_names, drawn

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
EXACT = 1e-5
"""The largest error of a sum that is said to be exact, relative to the norms of its terms: float32 Λ and Γ."""


class RandLoRAMachine(AdapterRules):
    @initialize(
        kind=st.sampled_from([*KINDS]), dtype=st.sampled_from(DTYPES), first=recipes, second=recipes, chosen=factors
    )
    def build(self, kind: str, dtype: torch.dtype, first: Recipe, second: Recipe, chosen: Factors) -> None:
        """Start with two adapters of which some are active, where Hypothesis would seldom get by itself."""
        self.is_half = dtype == torch.bfloat16  # it trains nothing beside, whose copies would be float32
        self.truth = Truth(KINDS[kind], dtype)
        self.model, _ = KINDS[kind].build(dtype)
        self.inject("a", first, None, None, None)
        self.inject("b", second, None, True, None)
        if self.truth.adapters:
            self.activate(chosen, "mapping")
            self.save(0, 0, "seed")

    @is_adapted
    @rule(steps=st.integers(1, 2))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            if not self.truth.is_random:
                self.step()

    def step(self) -> None:
        parameters = {name: held for name, held in self.model.named_parameters() if held.requires_grad}
        if parameters:
            with warnings.catch_warnings(action="ignore"):  # where they are in half precision
                trained = [id(held) for held in randlora.trainable_parameters(self.model)]
            assert len(set(trained)) == len(trained)
            assert set(trained) >= {id(held) for held in parameters.values()}
        expected = self.truth.gradients()
        output: Tensor = self.model(*self.truth.arguments())
        assert output.requires_grad == bool(expected)
        if not expected:
            return
        loss = output.double().square().sum()
        active = [info for info in randlora.adapters(self.model) if info.is_active]
        if {each.is_merged for each in active if any(f"_lambda.{each.name}" in name for name in parameters)} == {True}:
            with pytest.raises(MergeError, match="would get no gradients"):
                loss.backward()
            self.model.zero_grad(set_to_none=True)
            return
        loss.backward()
        size = torch.stack([grad.norm() for grad in expected.values()]).norm().item()
        for name, held in parameters.items():
            wanted = expected.get(name, torch.zeros(()))
            grad = torch.zeros(()) if held.grad is None else held.grad
            rounded = held.dtype if held.dtype.itemsize < self.truth.dtype.itemsize else self.truth.dtype
            assert_near(grad, wanted.expand(held.shape), rounded, least=size, loss=10)
        if size:
            torch.optim.SGD(parameters.values(), lr=0.2 / size).step()
        self.model.zero_grad(set_to_none=True)
        self.truth.take({name: value for name, value in self.model.state_dict().items() if name in expected})

    @is_adapted
    @rule(
        which=which, trains=st.booleans(), mode=maybe, compute=st.sampled_from(["auto", "factored", "materialized"]),
        dtype=st.sampled_from([None, *DTYPES]),
    )  # fmt: skip
    def set_up(self, which: int, trains: bool, mode: bool | None, compute: Any, dtype: torch.dtype | None) -> None:
        randlora.set_compute(self.model, compute)
        randlora.set_trainable(self.model, name := self.name(which), trains)
        self.truth.adapters[name].trains = trains
        if mode is not None:
            self.model.train(mode)
            self.truth.training = mode
        if dtype is not None and (dtype != torch.bfloat16 or self.is_half):
            self.model.to(dtype)
            self.truth.cast(dtype)

    @is_adapted
    @rule(assign=st.booleans())
    def go_back(self, assign: bool) -> None:
        """Take down the state dict, or load the one that was taken down before."""
        if not self.remembered:
            self.remembered = {name: value.clone() for name, value in self.model.state_dict().items()}
            return
        now = self.truth.state()
        state = {
            name: value.clone()
            for name, value in self.remembered.items()
            if name in now and value.shape == now[name].shape and not (assign and value.dtype != now[name].dtype)
        }
        if assign and len({*self.truth.aliases.values()}) < len(self.truth.aliases):  # it would untie what is tied
            return
        if self.truth.merged is not None:
            with pytest.raises(MergeError, match="cannot load a state dict while"):
                self.model.load_state_dict(state, strict=False, assign=assign)
            return
        self.model.load_state_dict(state, strict=False, assign=assign)
        self.truth.take(state)
        self.held = {} if assign else self.held

    @is_adapted
    @precondition(lambda self: not self.blocks)
    @rule(by=st.sampled_from([*COPIES]))
    def go_on_with_a_copy(self, by: str) -> None:
        self.bystanders = [(self.model, all_bits(self.model.state_dict()))]
        self.model, self.held = COPIES[by](self.model), {}

    @is_adapted
    @rule(place=st.integers(0, len(REFUSALS) - 1))
    def refuse(self, place: int) -> None:
        when, error, call = REFUSALS[place]
        if all(WHEN[word](self) for word in when.split()):
            with untouched(self.model), pytest.raises(error):
                call(self)

    @is_free
    @rule(of=st.tuples(which, which), by=st.sampled_from([(1.0, 0.0), (0.5, -2.0), (-1.0, 1.0)]), name=names)
    def combine(self, of: tuple[int, int], by: tuple[float, float], name: str | None) -> None:
        """A sum that no adapter on these bases has is refused, by a table of tests."""
        name, factors = self.new_name(name), dict(zip(map(self.name, of), by, strict=True))
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
        truth, state = self.truth, self.model.state_dict()
        sources = {each: truth.adapters[each] for each in factors}
        info = next(info for info in randlora.adapters(self.model) if info.name == name)
        made = Adapter(next(iter(sources.values())).options, {}, {}, {}, {}, None, trains=False)
        for weight in truth.kind.weights:
            own = [(source, factors[each]) for each, source in sources.items() if weight.fqn in source.values]
            if not own:
                continue
            made.scales[weight.fqn] = r, _ = own[0][0].scales[weight.fqn]
            assert info.options[weight.fqn] == made.scales[weight.fqn]
            lam, gamma = (state[key].clone() for key in diagonal_names(weight.name, name))
            made.values[weight.fqn] = lam, gamma
            spec = next(spec for spec in info.specs if spec.r == r)
            made.bases[r] = drawn(spec, spec.max_dim, spec.min_dim)  # for the largest layers of the model
            terms = [factor * source.update(weight) for source, factor in own]
            wrong = (made.update(weight) - torch.stack(terms).sum(0)).norm()
            assert wrong <= EXACT * sum(term.norm() for term in terms), f"{weight.fqn} is off by {wrong}"
        assert not any(source.copies for source in sources.values()), "which is refused"
        truth.adapters[name] = made

    @is_free
    @rule(of=st.lists(st.none() | which, min_size=5, max_size=5), by_pool=st.booleans())
    def route(self, of: list[int | None], by_pool: bool) -> None:
        truth = self.truth
        rows = [None if each is None else self.name(each) for each in of][: len(truth.arguments()[0])]
        used = {name: truth.adapters[name] for name in rows if name is not None}
        if any(adapter.copies for adapter in used.values()):
            self.ask(AdapterError, lambda model: randlora.serving.routed(model, rows).__enter__())
            return
        if any(truth.is_alone_in_attention(weight.name) for each in used.values() for weight in truth.weights_of(each)):
            with torch.no_grad(), randlora.serving.routed(self.model, rows):
                self.ask(AdapterError, lambda model: model(*truth.arguments()))
            return
        if truth.training and any(adapter.options["dropout"] for adapter in used.values()):
            return
        with untouched(self.model), torch.no_grad(), randlora.serving.routed(self.model, rows):
            assert_near(self.model(*truth.arguments()), truth.rows(rows), truth.dtype)
        if by_pool and used:  # which loads copies of the adapters
            states = {f"of_{name}": randlora.adapter_state(self.model, name) for name in used}
            pool = randlora.serving.AdapterPool(self.model, states, max_loaded=len(states))
            with torch.no_grad(), pool.routed([name and f"of_{name}" for name in rows]):
                assert_near(self.model(*truth.arguments()), truth.rows(rows), truth.dtype)
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

    @is_adapted
    @rule(which=which, slot=slots, bases=st.sampled_from(["seed", "stored"]))
    def save(self, which: int, slot: int, bases: Any) -> None:
        name = self.name(which)
        with untouched(self.model):
            randlora.save(self.model, self.path(slot), name=name, bases=bases)
        adapter = self.truth.adapters[name]
        values = {fqn: (_in_file(lam), _in_file(gamma)) for fqn, (lam, gamma) in adapter.values.items()}
        self.saved[slot] = replace(adapter, values=values, copies=dict(adapter.copies))
        file = read_adapter(self.path(slot))
        for fqn, pair in values.items():
            assert [*map(bits, file.values[fqn])] == [*map(bits, pair)], fqn
        assert all_bits(file.trained) == all_bits(self.saved[slot].copies)

    @has_saved
    @is_unmerged
    @rule(slot=slots, name=names, active=maybe, trainable=st.booleans())
    def load(self, slot: int, name: str | None, active: bool | None, trainable: bool) -> None:
        truth, name, slot = self.truth, self.new_name(name), slot if slot in self.saved else min(self.saved)
        refused: Refused = AdapterError if name in truth.adapters else None
        self.ask(refused, randlora.load, self.path(slot), name=name, active=active, trainable=trainable)
        if refused is None:
            file = self.saved[slot]
            copies = {fqn: value.to(truth.own[fqn].dtype) for fqn, value in file.copies.items()}
            adapter = replace(file, values=dict(file.values), copies=copies, factor=None, trains=trainable)
            truth.add(name, adapter, is_active=not truth.adapters if active is None else active)

    @has_saved
    @is_adapted
    @rule(slot=slots, to=slots, factor=st.sampled_from([1.0, -0.5]))
    def merge_files(self, slot: int, to: int, factor: float) -> None:
        slot = slot if slot in self.saved else min(self.saved)
        if slot != to:
            randlora.files.convert(self.path(slot), self.path(to), to="native", overwrite=True)
            slot, self.saved[to] = to, self.saved[slot]
        adapter, base, out = self.saved[slot], self.root / "base", self.root / "merged"
        base.mkdir(exist_ok=True)
        own = {name: value.clone() for name, value in self.truth.own.items()}
        save_file(own, base / "model.safetensors", {"format": "pt"})
        assert randlora.files.verify(self.path(slot), base).passed
        assert {layer.fqn for layer in randlora.files.inspect(self.path(slot)).layers} == {*adapter.values}
        randlora.files.merge({self.path(slot): factor}, out, base=base)
        own |= {name: value.to(own[name]) for name, value in adapter.copies.items()}
        sums = {
            weight.name: weight.placed(adapter.update(weight), own[weight.name])
            for weight in self.truth.weights_of(adapter)
        }
        for name, value in load_file(out / "model.safetensors").items():
            if name in sums:
                expected = own[name].double() + factor * sums[name]
                assert_weights_near({name: value}, {name: expected}, value.dtype)
            else:
                assert torch.equal(value, own[name]), name
        for path in out.iterdir():
            path.unlink()
        out.rmdir()

    def teardown(self) -> None:
        with self.cleanup:
            while self.blocks:
                self.leave(ZeroDivisionError())
                self.holds()
            if hasattr(self, "truth") and self.truth.adapters:
                self.eject()
                self.holds()


def _in_file(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


methods = [method for _, method in inspect.getmembers(RandLoRAMachine, inspect.isfunction)]
RULES = {method.__name__: marked for method in methods if (marked := getattr(method, RULE_MARKER, None))}


def run_program(data: st.DataObject, steps: int) -> None:
    """Take the rule that was called least of those that can be: Hypothesis itself leaves out half in each run."""
    machine, calls = RandLoRAMachine(), dict.fromkeys(data.draw(st.permutations([*RULES])), 0)

    def call(rule: Any) -> None:
        note(rule.function.__name__)  # hypothesis prints the notes and the values of the shortest program that fails
        rule.function(machine, **{name: data.draw(each, name) for name, each in rule.arguments.items()})
        machine.holds()

    try:
        call(getattr(RandLoRAMachine.build, INITIALIZE_RULE_MARKER))
        for _ in range(steps):
            possible = [name for name in calls if all(holds(machine) for holds in RULES[name].preconditions)]
            least = min(possible, key=calls.__getitem__)
            call(RULES[least])
            calls[least] += 1
    finally:
        machine.teardown()

"""The rules of several adapters in one model, and of adapters on disk."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from safetensors.torch import load_file, save_file
from torch import Tensor

import randlora
from randlora.checkpoint.read import read_adapter
from randlora.errors import AdapterError, CheckpointError
from tests.kit import all_bits, assert_unchanged, bits, snapshot, untouched
from tests.state_machine.adapter_rules import AdapterRules
from tests.state_machine.base import Refused, assert_near, assert_weights_near, is_adapted, is_free, is_unmerged
from tests.state_machine.recipes import maybe, names, slots, which
from tests.state_machine.truth import Adapter, diagonal_names, drawn

EXACT = 1e-5
"""The largest error of a sum that is said to be exact, relative to the norms of its terms: float32 Λ and Γ."""


has_saved = precondition(lambda self: self.saved)


class FileRules(AdapterRules):
    """One rule for each verb on adapters beside one another, and on files."""

    @is_adapted
    @rule(which=which, to=names)
    def rename(self, which: int, to: str) -> None:
        name, truth = self.name(which), self.truth
        refused = AdapterError if to in truth.adapters or truth.merged is not None else None
        self.ask(refused, randlora.rename, name, to)
        if refused is None:
            renamed = {
                old: new
                for weight in truth.weights_of(truth.adapters[name])
                for old, new in zip(*(diagonal_names(weight.name, each) for each in (name, to)), strict=True)
            }
            self.held = {renamed.get(key, key): parameter for key, parameter in self.held.items()}
            truth.adapters = {to if each == name else each: adapter for each, adapter in truth.adapters.items()}

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
            scales[weight.fqn] = r, _ = next(source.scales[weight.fqn] for source in own.values())
            assert info.options[weight.fqn] == scales[weight.fqn]
            lam, gamma = (state[key].clone() for key in diagonal_names(weight.name, name))
            values[weight.fqn] = lam, gamma
            spec = next(spec for spec in info.specs if spec.r == r)
            bases[r] = drawn(spec, spec.max_dim, spec.min_dim)  # for the largest layers of the model
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
    def load(self, slot: int, name: str, active: bool | None, trainable: bool) -> None:
        truth = self.truth
        refused: Refused = None if slot in self.saved else CheckpointError
        if name in truth.adapters:
            refused = AdapterError
        self.ask(refused, randlora.load, self.path(slot), name=name, active=active, trainable=trainable)
        if refused is None:
            file = self.saved[slot]
            copies = {fqn: value.to(truth.own[fqn].dtype) for fqn, value in file.copies.items()}
            adapter = replace(file, values=dict(file.values), copies=copies, factor=None, trains=trainable)
            truth.add(name, adapter, is_active=not truth.adapters if active is None else active)

    @has_saved
    @is_adapted
    @rule(slot=slots, factor=st.sampled_from([1.0, -0.5]))
    def merge_files(self, slot: int, factor: float) -> None:
        if slot not in self.saved:
            return
        adapter, base, out = self.saved[slot], self.root / "base", self.root / "merged"
        base.mkdir(exist_ok=True)
        own = {name: value.clone() for name, value in self.truth.own.items()}
        save_file(own, base / "model.safetensors", {"format": "pt"})
        assert randlora.files.verify(self.path(slot), base).passed
        assert {layer.fqn for layer in randlora.files.inspect(self.path(slot)).layers} == {*adapter.values}
        randlora.files.merge({self.path(slot): factor}, out, base=base)
        for name, value in load_file(out / "model.safetensors").items():
            weight = next((each for each in self.truth.weights_of(adapter) if each.name == name), None)
            expected = adapter.copies.get(name, own[name]).to(own[name]).double()
            if weight is None:
                assert torch.equal(value.double(), expected), name
            else:
                expected = expected + factor * weight.placed(adapter.update(weight), expected)
                assert_weights_near({name: value}, {name: expected}, value.dtype)
        for path in out.iterdir():
            path.unlink()
        out.rmdir()

    @has_saved
    @is_adapted
    @rule(slot=slots, to=slots)
    def convert(self, slot: int, to: int) -> None:
        if slot != to and slot in self.saved:
            randlora.files.convert(self.path(slot), self.path(to), to="native", overwrite=True)
            self.saved[to] = self.saved[slot]


def _in_file(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))

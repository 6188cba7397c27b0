"""The rules of adapters on disk."""

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
from tests.kit import all_bits, bits, untouched
from tests.state_machine.base import ModelMachine, Refused, is_adapted, is_unmerged
from tests.state_machine.invariants import assert_weights_near
from tests.state_machine.recipes import maybe, names, slots, which

has_saved = precondition(lambda self: self.saved)


class FileRules(ModelMachine):
    """One rule for each verb on files."""

    @is_adapted
    @rule(which=which, slot=slots, bases=st.sampled_from(["seed", "stored"]))
    def save(self, which: int, slot: int, bases: Any) -> None:
        name = self.name(which)
        with untouched(self.model):
            randlora.save(self.model, self.path(slot), name=name, bases=bases)
        adapter = self.truth.adapters[name]
        values = {fqn: (_master(lam), _master(gamma)) for fqn, (lam, gamma) in adapter.values.items()}
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


def _master(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))

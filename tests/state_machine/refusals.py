"""Calls that must be refused without a trace, beside those that the rules make of verbs at the wrong time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import randlora
from randlora import serving
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError, OptionError, TargetError

if TYPE_CHECKING:
    from tests.state_machine.base import ModelMachine

Call = Callable[["ModelMachine"], object]


def _on(verb: Callable[..., object], *args: Any, **options: Any) -> Call:
    return lambda machine: verb(machine.model, *args, **options)


def _of_first(verb: Callable[..., object], make: Callable[[str], Any] = str) -> Call:
    """Call a verb with something made of the name of the first adapter."""
    return lambda machine: verb(machine.model, make(next(iter(machine.truth.adapters))))


def _entered(block: Callable[..., Any], *args: Any) -> Call:
    return lambda machine: block(machine.model, *args).__enter__()


def _inject(**options: Any) -> Call:
    """Add an adapter of the first weight, but for these options, which may be made of that weight."""

    def call(machine: "ModelMachine") -> object:
        first = machine.truth.kind.weights[0]
        given = {name: make(first) if callable(make) else make for name, make in options.items()}
        return randlora.inject(machine.model, **{"targets": [first.fqn], "r": 2, "name": "new", **given})

    return call


def _save(**options: Any) -> Call:
    return lambda machine: randlora.save(machine.model, machine.root / "refused", **options)


def _load(damage: Callable[[bytes], bytes] = bytes) -> Call:
    """Load a saved adapter whose tensors were damaged on the way."""

    def call(machine: "ModelMachine") -> object:
        damaged = machine.root / "damaged"
        damaged.mkdir(exist_ok=True)
        for path in machine.path(min(machine.saved)).iterdir():
            data = path.read_bytes()
            (damaged / path.name).write_bytes(damage(data) if path.suffix == ".safetensors" else data)
        return randlora.load(machine.model, damaged, name="new")

    return call


def _flipped(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


WHEN: dict[str, Callable[["ModelMachine"], bool]] = {
    "any": lambda _: True,
    "plain": lambda machine: not machine.truth.adapters,
    "adapted": lambda machine: bool(machine.truth.adapters),
    "merged": lambda machine: machine.truth.merged is not None,
    "unmerged": lambda machine: machine.truth.merged is None,
    "saved": lambda machine: bool(machine.saved),
}
"""What a model must be, so that a call can be made and would not be refused for another reason."""

REFUSALS: list[tuple[str, type[Exception], Call]] = [
    ("plain", AdapterError, _on(randlora.activate, "a")),
    ("plain", AdapterError, _entered(randlora.disabled)),
    ("plain", AdapterError, _on(randlora.remove, "a")),
    ("plain", AdapterError, _on(randlora.eject)),
    ("plain", AdapterError, _on(randlora.merge)),
    ("plain", AdapterError, _entered(randlora.merged)),
    ("plain", AdapterError, _on(randlora.unmerge)),
    ("plain", AdapterError, _on(randlora.delta_weight, "head")),
    ("plain", AdapterError, _on(randlora.set_compute, "auto")),
    ("plain", AdapterError, lambda machine: [*randlora.trainable_parameters(machine.model)]),
    ("plain", AdapterError, _save()),
    ("merged", AdapterError, _inject()),
    ("merged", AdapterError, _of_first(randlora.activate, lambda name: {name: 1e3})),
    ("merged", AdapterError, _entered(randlora.disabled)),
    ("merged", AdapterError, _of_first(randlora.remove)),
    ("merged", AdapterError, _of_first(lambda model, name: randlora.rename(model, name, "new"))),
    ("merged", AdapterError, _of_first(lambda model, name: serving.combine(model, {name: 1.0}, name="new"))),
    ("merged", AdapterError, _entered(serving.routed, [None])),
    ("merged", MergeError, _on(randlora.merge)),
    ("saved merged", AdapterError, _load()),
    ("adapted unmerged", MergeError, _on(randlora.unmerge)),
    ("saved unmerged", CheckpointError, _load(lambda data: data[: len(data) // 2])),
    ("saved unmerged", CheckpointError, _load(lambda data: _flipped(data, -3))),
    ("saved unmerged", CheckpointError, _load(lambda data: _flipped(data, 40))),
    ("saved unmerged", CheckpointError, _load(lambda _: b"")),
    ("unmerged", CheckpointError, lambda machine: randlora.load(machine.model, machine.root, name="new")),
    ("unmerged", ConfigError, _inject(r=0)),
    ("unmerged", ConfigError, _inject(alpha=float("inf"))),
    ("any", OptionError, _inject(lora_alpha=2)),
    ("any", AdapterError, _inject(name="a.b")),
    ("any", AdapterError, _inject(name="keys")),
    ("any", ConfigError, _on(randlora.set_compute, "quickly")),
    ("unmerged", ConfigError, _inject(alpha=0)),
    ("unmerged", ConfigError, _inject(basis="denser")),
    ("unmerged", TargetError, _inject(targets=["nowhere"])),
    ("unmerged", TargetError, _inject(train_also=["nowhere"])),
    ("unmerged", TargetError, _inject(r={"nowhere": 2})),
    ("unmerged", TargetError, _inject(train_also=lambda first: [first.name])),
    ("adapted", AdapterError, _on(randlora.activate, "unknown")),
    ("adapted", AdapterError, _of_first(randlora.activate, lambda name: {name: float("nan")})),
    ("adapted", AdapterError, _of_first(randlora.activate, lambda name: {name: "much"})),
    ("adapted", AdapterError, _of_first(randlora.activate, lambda name: [name, name])),
    ("adapted", AdapterError, _on(randlora.rename, "unknown", "new")),
    ("adapted", AdapterError, _of_first(lambda model, name: randlora.rename(model, name, "a.b"))),
    ("adapted", AdapterError, _on(randlora.set_trainable, "unknown")),
    ("adapted", AdapterError, _on(serving.combine, {"unknown": 1.0}, name="new")),
    ("adapted", AdapterError, _on(randlora.remove, "unknown")),
    ("adapted", AdapterError, _save(name="unknown")),
    ("adapted", MergeError, _on(randlora.merge, adapters="unknown", reversible=True)),
    ("adapted", MergeError, _on(randlora.unmerge, "unknown")),
    ("adapted", TargetError, _on(randlora.delta_weight, "nowhere")),
    ("adapted", ConfigError, _on(randlora.merge, quantized="never")),
    ("adapted", ConfigError, _on(randlora.merge, dtype=torch.int8)),
]
"""Words of `WHEN`, the error, and the call."""

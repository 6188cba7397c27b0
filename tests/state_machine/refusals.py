"""Calls that must be refused without a trace, beside those that the rules make of verbs at the wrong time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypothesis.stateful import precondition

import randlora
from randlora import serving
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError, OptionError, TargetError

if TYPE_CHECKING:
    from tests.state_machine.adapter_rules import AdapterRules

Call = Callable[["AdapterRules"], object]


def _on(verb: Callable[..., object], *args: Any, **options: Any) -> Call:
    return lambda machine: verb(machine.model, *args, **options)


def _of_first(verb: Callable[..., object], make: Callable[[str], Any] = str) -> Call:
    return lambda machine: verb(machine.model, make(next(iter(machine.truth.adapters))))


def _entered(block: Callable[..., Any], *args: Any) -> Call:
    return lambda machine: block(machine.model, *args).__enter__()


def _inject(**options: Any) -> Call:
    """Add an adapter of the first weight, but for these options, which may be made of that weight."""

    def call(machine: "AdapterRules") -> object:
        first = machine.truth.kind.weights[0]
        given = {name: make(first) if callable(make) else make for name, make in options.items()}
        return randlora.inject(machine.model, **{"targets": [first.fqn], "r": 2, "name": "new", **given})

    return call


def _save(**options: Any) -> Call:
    return lambda machine: randlora.save(machine.model, machine.root / "refused", **options)


def _load(damage: Callable[[bytes], bytes] = bytes) -> Call:
    def call(machine: "AdapterRules") -> object:
        damaged = machine.root / "damaged"
        damaged.mkdir(exist_ok=True)
        for path in machine.path(min(machine.saved)).iterdir():
            data = path.read_bytes()
            (damaged / path.name).write_bytes(damage(data) if path.suffix == ".safetensors" else data)
        return randlora.load(machine.model, damaged, name="new")

    return call


WHEN: dict[str, Callable[["AdapterRules"], bool]] = {
    "any": lambda _: True,
    "plain": lambda machine: not machine.truth.adapters,
    "adapted": lambda machine: bool(machine.truth.adapters),
    "free": lambda machine: bool(machine.truth.adapters) and machine.truth.merged is None,
    "merged": lambda machine: machine.truth.merged is not None,
    "unmerged": lambda machine: machine.truth.merged is None,
    "saved": lambda machine: bool(machine.saved),
    "inside": lambda machine: machine.is_inside,
}
"""What a model must be, so that a call can be made and would not be refused for another reason."""

_, _, is_adapted, is_free, is_merged, is_unmerged, has_saved, _ = map(precondition, WHEN.values())

REFUSALS: list[tuple[str, type[Exception], Call]] = [
    *(("plain", AdapterError, _on(getattr(randlora, verb), "a")) for verb in ("activate", "remove", "delta_weight")),
    *(("plain", AdapterError, _on(getattr(randlora, verb))) for verb in ("eject", "merge", "unmerge")),
    *(("plain", AdapterError, _entered(block)) for block in (randlora.disabled, randlora.merged)),
    ("plain", AdapterError, _on(randlora.set_compute, "auto")),
    ("plain", AdapterError, lambda machine: [*randlora.trainable_parameters(machine.model)]),
    ("plain", AdapterError, _save()),
    ("merged", AdapterError, _inject()),
    ("merged", AdapterError, _of_first(randlora.activate, lambda name: {name: 1e3})),
    ("merged", AdapterError, _entered(randlora.disabled)),
    ("merged", AdapterError, _of_first(randlora.remove)),
    ("merged", AdapterError, _of_first(lambda model, name: serving.combine(model, {name: 1.0}, name="new"))),
    ("merged", AdapterError, _entered(serving.routed, [None])),
    ("merged", MergeError, _on(randlora.merge)),
    ("inside", MergeError, _entered(randlora.merged)),
    ("saved merged", AdapterError, _load()),
    ("free", MergeError, _on(randlora.unmerge)),
    ("saved unmerged", CheckpointError, _load(lambda data: data[: len(data) // 2])),
    ("saved unmerged", CheckpointError, _load(lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:])),
    ("saved unmerged", CheckpointError, _load(lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])),
    ("unmerged", CheckpointError, _on(randlora.load, "./nowhere", name="new")),
    *(("unmerged", ConfigError, _inject(**wrong)) for wrong in ({"r": 0}, {"alpha": 0}, {"basis": "denser"})),
    *(("unmerged", TargetError, _inject(**{option: ["nowhere"]})) for option in ("targets", "train_also")),
    ("unmerged", TargetError, _inject(r={"nowhere": 2})),
    ("unmerged", TargetError, _inject(train_also=lambda first: [first.name])),
    ("any", OptionError, _inject(lora_alpha=2)),
    *(("any", AdapterError, _inject(name=name)) for name in ("a.b", "keys")),
    ("any", ConfigError, _on(randlora.set_compute, "quickly")),
    *(
        ("adapted", AdapterError, _on(verb, "unknown"))
        for verb in (randlora.activate, randlora.set_trainable, randlora.remove)
    ),
    ("adapted", AdapterError, _of_first(randlora.activate, lambda name: {name: float("nan")})),
    ("adapted", AdapterError, _of_first(randlora.activate, lambda name: [name, name])),
    ("adapted", AdapterError, _on(serving.combine, {"unknown": 1.0}, name="new")),
    ("adapted", AdapterError, _save(name="unknown")),
    ("adapted", MergeError, _on(randlora.merge, adapters="unknown", reversible=True)),
    ("adapted", MergeError, _on(randlora.unmerge, "unknown")),
    ("adapted", TargetError, _on(randlora.delta_weight, "nowhere")),
    *(("adapted", ConfigError, _on(randlora.merge, **{option: 7})) for option in ("quantized", "dtype")),
]

"""Calls that must be refused without a trace, beside those that the rules make of verbs at the wrong time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import randlora
from randlora.errors import AdapterError, CheckpointError, ConfigError, MergeError, OptionError, TargetError

if TYPE_CHECKING:
    from tests.state_machine.base import ModelMachine


Call = Callable[["ModelMachine"], object]


@dataclass(frozen=True)
class Refusal:
    """A call that must be refused with an error, when it can be made and would not be refused for another reason."""

    error: type[Exception]
    call: Call
    applies: Callable[["ModelMachine"], bool] = lambda _: True


def _is_adapted(machine: "ModelMachine") -> bool:
    return bool(machine.truth.adapters)


def _is_merged(machine: "ModelMachine") -> bool:
    return machine.truth.merged is not None


def _inject(**options: Any) -> Call:
    def call(machine: "ModelMachine") -> object:
        first = machine.truth.kind.weights[0].fqn
        return randlora.inject(machine.model, **{"targets": [first], "r": 2, "name": "new", **options})

    return call


def _on_model(verb: Callable[..., object], *args: Any, **options: Any) -> Call:
    return lambda machine: verb(machine.model, *args, **options)


def _of_first(verb: Callable[..., object], make: Callable[[str], Any]) -> Call:
    """Call a verb with something made of the name of the first adapter."""
    return lambda machine: verb(machine.model, make(next(iter(machine.truth.adapters))))


def _load_damaged(damage: Callable[[bytes], bytes]) -> Call:
    """Load a saved adapter whose tensors were damaged on the way."""

    def call(machine: "ModelMachine") -> object:
        source = machine.path(min(machine.saved))
        damaged = machine.root / "damaged"
        damaged.mkdir(exist_ok=True)
        for path in source.iterdir():
            data = path.read_bytes()
            (damaged / path.name).write_bytes(damage(data) if path.suffix == ".safetensors" else data)
        return randlora.load(machine.model, damaged, name="new")

    return call


def _flipped(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _train_twice(machine: "ModelMachine") -> object:
    first = machine.truth.kind.weights[0]
    return randlora.inject(machine.model, targets=[first.fqn], train_also=[first.name], r=2, name="new")


def _entered(block: Callable[..., Any]) -> Call:
    return lambda machine: block(machine.model).__enter__()


def _save(**options: Any) -> Call:
    return lambda machine: randlora.save(machine.model, machine.root / "refused", **options)


def _load_saved(machine: "ModelMachine") -> object:
    return randlora.load(machine.model, machine.path(min(machine.saved)), name="new")


ON_A_PLAIN_MODEL = {
    "activate": _on_model(randlora.activate, "a"),
    "disabled": _entered(randlora.disabled),
    "remove": _on_model(randlora.remove, "a"),
    "eject": _on_model(randlora.eject),
    "merge": _on_model(randlora.merge),
    "merged": _entered(randlora.merged),
    "unmerge": _on_model(randlora.unmerge),
    "delta_weight": _on_model(randlora.delta_weight, "head"),
    "set_compute": _on_model(randlora.set_compute, "auto"),
    "trainable_parameters": lambda machine: list(randlora.trainable_parameters(machine.model)),
    "save": _save(),
}
WHILE_MERGED = {
    "inject": _inject(),
    "activate": _of_first(randlora.activate, lambda name: {name: 1e3}),
    "disabled": _entered(randlora.disabled),
    "remove": _of_first(randlora.remove, str),
    "rename": _of_first(lambda model, name: randlora.rename(model, name, "new"), str),
    "combine": _of_first(lambda model, name: randlora.serving.combine(model, {name: 1.0}, name="new"), str),
    "routed": _entered(lambda model: randlora.serving.routed(model, [None])),
}
ON_ANY_MODEL = {
    "a rank of 0": (ConfigError, _inject(r=0)),
    "an infinite alpha": (ConfigError, _inject(alpha=float("inf"))),
    "no such option": (OptionError, _inject(lora_alpha=2)),
    "a name with a dot": (AdapterError, _inject(name="a.b")),
    "a name of an attribute": (AdapterError, _inject(name="keys")),
    "no such way to compute": (ConfigError, _on_model(randlora.set_compute, "quickly")),
}
UNLESS_MERGED = {
    "an alpha of 0": (ConfigError, _inject(alpha=0)),
    "no such basis": (ConfigError, _inject(basis="denser")),
    "no such target": (TargetError, _inject(targets=["nowhere"])),
    "no such parameter": (TargetError, _inject(train_also=["nowhere"])),
    "ranks for another layer": (TargetError, _inject(r={"nowhere": 2})),
    "trained and adapted": (TargetError, _train_twice),
    "load nothing": (CheckpointError, lambda machine: randlora.load(machine.model, machine.root, name="new")),
}
OF_AN_ADAPTED_MODEL = {
    "activate the unknown": (AdapterError, _on_model(randlora.activate, "unknown")),
    "a factor that is no number": (AdapterError, _of_first(randlora.activate, lambda name: {name: float("nan")})),
    "a factor in words": (AdapterError, _of_first(randlora.activate, lambda name: {name: "much"})),
    "one adapter twice": (AdapterError, _of_first(randlora.activate, lambda name: [name, name])),
    "rename the unknown": (AdapterError, _on_model(randlora.rename, "unknown", "new")),
    "rename to a dot": (AdapterError, _of_first(lambda model, name: randlora.rename(model, name, "a.b"), str)),
    "train the unknown": (AdapterError, _on_model(randlora.set_trainable, "unknown")),
    "combine the unknown": (AdapterError, _on_model(randlora.serving.combine, {"unknown": 1.0}, name="new")),
    "merge the unknown": (MergeError, _on_model(randlora.merge, adapters="unknown", reversible=True)),
    "unmerge the unknown": (MergeError, _on_model(randlora.unmerge, "unknown")),
    "remove the unknown": (AdapterError, _on_model(randlora.remove, "unknown")),
    "the update of the unknown": (TargetError, _on_model(randlora.delta_weight, "nowhere")),
    "no such codes": (ConfigError, _on_model(randlora.merge, quantized="never")),
    "merge in integers": (ConfigError, _on_model(randlora.merge, dtype=torch.int8)),
    "save the unknown": (AdapterError, _save(name="unknown")),
}
DAMAGED = {
    "half a file": lambda data: data[: len(data) // 2],
    "a flipped bit of a value": lambda data: _flipped(data, -3),
    "a flipped bit of the header": lambda data: _flipped(data, 40),
    "an empty file": lambda _: b"",
}

REFUSALS = {
    **{
        f"{verb} without adapters": Refusal(AdapterError, call, lambda machine: not _is_adapted(machine))
        for verb, call in ON_A_PLAIN_MODEL.items()
    },
    **{f"{verb} while merged": Refusal(AdapterError, call, _is_merged) for verb, call in WHILE_MERGED.items()},
    "merge while merged": Refusal(MergeError, _on_model(randlora.merge), _is_merged),
    "unmerge while not merged": Refusal(
        MergeError, _on_model(randlora.unmerge), lambda machine: _is_adapted(machine) and not _is_merged(machine)
    ),
    "load while merged": Refusal(
        AdapterError, _load_saved, lambda machine: _is_merged(machine) and bool(machine.saved)
    ),
    **{words: Refusal(error, call) for words, (error, call) in ON_ANY_MODEL.items()},
    **{
        words: Refusal(error, call, lambda machine: not _is_merged(machine))
        for words, (error, call) in UNLESS_MERGED.items()
    },
    **{words: Refusal(error, call, _is_adapted) for words, (error, call) in OF_AN_ADAPTED_MODEL.items()},
    **{
        f"load {words}": Refusal(
            CheckpointError,
            _load_damaged(damage),
            lambda machine: not _is_merged(machine) and bool(machine.saved),
        )
        for words, damage in DAMAGED.items()
    },
}
"""The calls by what is wrong with them."""

"""Changes of JSON, of safetensors files and of directories that leave them whole enough to be read far.

Every change is drawn from a `random.Random`, so that a seed repeats it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.fuzz.files import FOLDER, LINK, LINKED, PIPE, Files
from tests.fuzz.tensors import TensorFile, parse, reseal, unparse

MutateBytes = Callable[[bytes], bytes]

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**20, 2**20 + 1, 2**31, 2**40, 2**53 + 1, 2**63, 2**64, -(2**63)),
    *(10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 2.0, 1e-320, 1e38, 1e308, float("inf"), float("nan")),
    *(
        "",
        " ",
        "..",
        "../x",
        "\0",
        "\ud800",
        "é\u202e",
        "x" * 300,
        *["%", "%s%n", "%2000000000d", ".", "/", "a", "0", "1"],
    ),
    *([], {}, [[]], [0], [1, 2], ["a"], {"": ""}, {"a": 1}, [0, 2**63], [2**40, 2], [None], [["a", 1]], [True, 1]),
    *(".*", "(", "[a", "(?i)w", "a{99999999999}", "(?P<a>", "\\", "w|t", "all-linear", "all", "torch", "portable"),
    *("dense", "sparse", "very_sparse", "block", "experts", "embedding", "conv", "RANDLORA", "LORA", "nf4", "float32"),
)
"""Values that readers were seen to stumble over, and words that mean something to ours."""

NAMES = ("", "\ud800", "x" * 300, "a", "wide", "tall", ".", "a.b", "..", "wide.weight", "base_layer", "randlora_A", "0")
"""New names of layers, keys and tensors."""


def mutate_json(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value with one part changed, removed, moved, renamed or wrapped."""
    value = json.loads(json.dumps(value))  # a copy, in which nothing is shared
    parts = list(_parts(value))
    holder, key = random.choice(parts) if parts else (None, None)
    if holder is None:
        return random.choice(HOSTILE)
    old, choice = holder[key], random.randrange(9)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[_renamed(str(key), random)] = holder.pop(key) if random.random() < 0.7 else old
    elif choice == 2:  # the value of another place
        other, its = random.choice(parts)
        holder[key] = json.loads(json.dumps(other[its]))
    elif choice == 3:
        holder[key] = random.choice(([old], [old, old], {"a": old}, str(old), _deep(old, random)))
    elif choice == 4 and isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), old)
    elif choice <= 6:
        holder[key] = _tweaked(old, random)
    else:
        holder[key] = random.choice(HOSTILE)
    return value


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """Return all places in a JSON value, each as what holds it and its key or index."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        held = waiting.pop()
        keys = held if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else ()
        for key in list(keys):
            found.append((held, key))
            waiting.append(held[key])
    return found


def _deep(value: Any, random: Random) -> Any:
    for _ in range(random.choice((2, 50, 900))):
        value = [value]
    return value


def _tweaked(value: Any, random: Random) -> Any:
    """Return something close to a value."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        whole = float(value) if abs(value) < 2**63 else 0
        return random.choice((value + 1, value - 1, -value, 2 * value, value // 2, whole))
    if isinstance(value, float):
        return random.choice((-value, value / 2, value * 2, value + 1, int(value) if value == value // 1 else 1))
    if isinstance(value, str):
        return _renamed(value, random)
    if isinstance(value, list):
        return random.choice((value[1:], value[:-1], value[::-1], value + value[:1]))
    return dict(list(value.items())[1:])


def _renamed(text: str, random: Random) -> str:
    place, choice = random.randrange(len(text) + 1), random.randrange(5)
    if choice == 0:
        return random.choice(NAMES)
    if choice == 1:
        return text[:place] + random.choice(".a0%é (*|/\0\ud800") + text[place:]
    if choice == 2:
        return text[:place] + text[place + 1 :]
    return random.choice((text + text[:1], text[::-1], text.upper(), text[place:], text[:place], f"{text}.r2"))


def mutate_json_bytes(data: bytes, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Return the text of a JSON value changed as `mutate_json` does, or, now and then, as bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data)
    if random.random() < 0.05:
        return mutate_bytes(data)
    try:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            value = mutate_json(value, random)
        return json.dumps(value).encode()
    except (RecursionError, ValueError):  # too deep to be copied, or too many digits
        return b"[" * random.choice((10, 5_000, 200_000))


def mutate_tensor_file(data: bytes, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Return a safetensors file with other tensors, metadata or header, sealed again if it has our header."""
    file = parse(data)
    if file is None or random.random() < 0.05:
        return mutate_bytes(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice((_mutate_metadata, _mutate_tensors, _mutate_tensors, _mutate_values))(file, random)
    if random.random() < 0.9:
        reseal(file)
    if random.random() < 0.1:
        return unparse(file, lambda header: mutate_json(header, random))
    return unparse(file)


def _mutate_metadata(file: TensorFile, random: Random) -> None:
    """Change the JSON in the metadata, or the metadata."""
    key = random.choice([*file.metadata] or [""])
    try:
        facts = json.loads(file.metadata.get(key, ""))
        file.metadata[key] = json.dumps(mutate_json(facts, random))
    except (ValueError, RecursionError):
        file.metadata[_renamed(key, random)] = file.metadata.pop(key, "")


def _mutate_tensors(file: TensorFile, random: Random) -> None:
    """Change names, dtypes and shapes, so that the file is whole: its bytes have the size that the header says."""
    if not file.tensors:
        return
    name = random.choice([*file.tensors])
    tensor, choice = file.tensors[name], random.randrange(8)
    if choice == 0:
        del file.tensors[name]
    elif choice == 1:
        file.tensors[_renamed(name, random)] = file.tensors.pop(name)
    elif choice == 2:
        file.tensors[_renamed(name, random)] = tensor
    elif choice == 3:
        file.tensors[name] = tensor.with_dtype(
            random.choice(("F32", "F16", "BF16", "F64", "U8", "I8", "BOOL", "I64", "C64", "F8_E4M3"))
        )
    elif choice == 4:
        file.tensors[name] = tensor.with_shape([_side(side, random) for side in tensor.shape])
    elif choice == 5:
        shape = list(tensor.shape)
        shape.insert(random.randrange(len(shape) + 1), random.choice((0, 1, 1, 2)))
        file.tensors[name] = tensor.with_shape(shape)
    elif choice == 6:
        file.tensors[name] = tensor.with_shape(tensor.shape[1:] if random.random() < 0.5 else tensor.shape[::-1])
    else:
        other = random.choice([*file.tensors])
        file.tensors[name], file.tensors[other] = file.tensors[other], tensor


def _side(side: int, random: Random) -> int:
    huge = 2**40 if random.random() < 0.1 else side
    return random.choice((side, side, side + 1, max(0, side - 1), 0, 1, 2 * side, huge))


def _mutate_values(file: TensorFile, random: Random) -> None:
    """Change bytes of one tensor: NaN, infinity, the largest, the smallest, or any."""
    if not file.tensors:
        return
    name = random.choice([*file.tensors])
    tensor = file.tensors[name]
    size = random.choice((1, 2, 4, 8))
    place = random.randrange(len(tensor.data) // size + 1) * size
    patterns = (b"\xff" * size, b"\0" * size, random.randbytes(size), (b"\0" * size + b"\x80\x7f")[-size:])
    values = tensor.data[:place] + random.choice(patterns) + tensor.data[place + size :]
    file.tensors[name] = tensor.with_data(values[: len(tensor.data)])


def mutate_files(files: Files, random: Random, mutate_bytes: MutateBytes, spare: Sequence[str] = ()) -> Files:
    """Return files of which one is changed by its kind, or, now and then, removed, exchanged, or made no file at all.

    Sometimes one name is replaced by another one in all of them, as none of the files would be told from its own.
    """
    files = dict(files)
    names = [name for name in files if not name.startswith("@")]
    if not names:
        return files
    name, choice = random.choice(names), random.randrange(60)
    if choice == 0:
        files.pop(name)
    elif choice == 1:
        files[random.choice([*names, *spare])] = files[name]
    elif choice == 2:
        del files[name]
        files[random.choice((LINK, PIPE, FOLDER)) + name] = random.choice((*LINKED, b"x", b"adapter_config.json"))
    elif choice <= 12:
        return _renamed_everywhere(files, random)
    elif name.endswith(".safetensors"):
        files[name] = mutate_tensor_file(files[name], random, mutate_bytes)
    elif name.endswith(".json"):
        files[name] = mutate_json_bytes(files[name], random, mutate_bytes)
    else:
        files[name] = mutate_bytes(files[name])
    return files


def _renamed_everywhere(files: Files, random: Random) -> Files:
    """Replace a word or a number in all JSON and all names of tensors, and seal what is sealed."""
    parsed = {name: parse(data) for name, data in files.items() if name.endswith(".safetensors")}
    words = sorted({word for file in parsed.values() if file for name in file.tensors for word in name.split(".")})
    if not words:
        return files
    if random.random() < 0.7:
        old, new = random.choice(words), random.choice((*NAMES, *words))
    else:
        old, new = str(random.randrange(1, 8)), str(random.choice((*range(10), 16, 2**20, 2**40)))
    new = json.dumps(new)[1:-1]
    changed = {}
    for name, data in files.items():
        file = parsed.get(name)
        if file is not None:
            file.tensors = {_word(key, old, new): tensor for key, tensor in file.tensors.items()}
            file.metadata = {key: _word(text, old, new) for key, text in file.metadata.items()}
            reseal(file)
            changed[name] = unparse(file)
        else:
            changed[name] = _word(data.decode("latin-1"), old, new).encode("latin-1", "replace")
    return changed


def _word(text: str, old: str, new: str) -> str:
    for before, after in (('"', '"'), (".", "."), ('"', "."), (".", '"'), (" ", ","), ("[", ","), (" ", "]")):
        text = text.replace(f"{before}{old}{after}", f"{before}{new}{after}")
    return text

"""Changes of JSON, of safetensors files and of directories that leave them whole enough to be read far.

Every change is drawn from a `random.Random`, so that a seed repeats it.
"""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.fuzz.files import FOLDER, LINK, LINKED, PIPE, pack, unpack
from tests.fuzz.tensors import SIZES, TensorFile, parse, reseal, unparse

MutateBytes = Callable[[bytes], bytes]

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**20, 2**20 + 1, 2**31, 2**40, 2**53 + 1, 2**63, 2**64, -(2**63)),
    *(10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 2.0, 1e-320, 1e38, 1e308, float("inf"), float("nan")),
    *("", " ", "..", "../x", "\0", "\ud800", "é\u202e", "x" * 300, "%", "%s%n", "%2000000000d", ".", "/", "a", "0"),
    *([], {}, [[]], [0], [1, 2], ["a"], {"": ""}, {"a": 1}, [0, 2**63], [2**40, 2], [None], [["a", 1]], [True, 1]),
    *(".*", "(", "[a", "(?i)w", "a{99999999999}", "(?P<a>", "\\", "w|t", "all-linear", "all", "torch", "portable"),
    *("dense", "sparse", "very_sparse", "block", "experts", "embedding", "conv", "RANDLORA", "LORA", "nf4", "float32"),
)
"""Values that readers were seen to stumble over, and words that mean something to ours."""

NAMES = ("", "\ud800", "x" * 300, "a", "wide", "tall", ".", "a.b", "..", "wide.weight", "base_layer", "randlora_A", "0")
"""New names of layers, keys and tensors."""

WORDS = (
    *("inspect", "verify", "convert", "merge", "plan", "--help", "--json", "--base", "--prefix", "--to", "--rank"),
    *("--tolerance", "--overwrite", "--adapter", "--scale", "--out", "--dtype", "--r", "--alpha", "--targets"),
    *("--exclude", "--train-also", "--basis", "--stream", "--blocks", "--seed", "--in-proj", "--"),
    *("ours", "peft", "drawn", "odd", "base", "nf4", "llama", "damaged", "file", "link", "zero", "empty", "out"),
    *("..", "/", "", "/dev/null", "/dev/zero", "0", "1", "2", "-1", "3.5", "nan", "inf", "1e400", "1048576", "1048577"),
    *("9" * 5000, "wide", "tall", "wide=2", ".*=2", "(", "(?i)W", "lora", "native", "block", "portable", "float64"),
    *("\udcff", "a" * 300, "%s", "[red]x", "all", "all-linear", "split", "--no-norms", "-h", "-x", "--to=lora"),
    *("ours/x", ".", "é"),
)
"""Arguments of the command line."""


def _times(random: Random) -> range:
    return range(random.choice((1, 1, 1, 2, 3)))


def mutate_json(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value with one part changed, removed, moved, renamed or wrapped."""
    value = json.loads(json.dumps(value))  # a copy, in which nothing is shared
    parts = _parts(value)
    if not parts:
        return random.choice(HOSTILE)
    holder, key = random.choice(parts)
    old, choice = holder[key], random.randrange(9)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[_renamed(str(key), random)] = holder.pop(key) if random.random() < 0.7 else old
    elif choice == 2:  # the value of another place
        other, its = random.choice(parts)
        holder[key] = json.loads(json.dumps(other[its]))
    elif choice == 3:
        deep = old
        for _ in range(random.choice((2, 50, 900))):
            deep = [deep]
        holder[key] = random.choice(([old], [old, old], {"a": old}, str(old), deep))
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
        keys = [*held] if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else ()
        found += [(held, key) for key in keys]
        waiting += [held[key] for key in keys]
    return found


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
        for _ in _times(random):
            value = mutate_json(value, random)
        return json.dumps(value).encode()
    except (RecursionError, ValueError):  # too deep to be copied, or too many digits
        return b"[" * random.choice((10, 5_000, 200_000))


def mutate_tensor_file(data: bytes, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Return a safetensors file with other tensors, metadata or header, sealed again if it has our header."""
    file = parse(data)
    if file is None or random.random() < 0.05:
        return mutate_bytes(data)
    for _ in _times(random):
        if not file.tensors or random.random() < 0.25:
            _mutate_metadata(file, random)
        else:
            _mutate_tensors(file, random)
    if random.random() < 0.9:
        reseal(file)
    is_header_changed = random.random() < 0.1
    return unparse(file, lambda header: mutate_json(header, random) if is_header_changed else header)


def _mutate_metadata(file: TensorFile, random: Random) -> None:
    """Change the JSON in the metadata, or the metadata."""
    key = random.choice([*file.metadata] or [""])
    try:
        file.metadata[key] = json.dumps(mutate_json(json.loads(file.metadata.get(key, "")), random))
    except (ValueError, RecursionError):
        file.metadata[_renamed(key, random)] = file.metadata.pop(key, "")


def _mutate_tensors(file: TensorFile, random: Random) -> None:
    """Change a name, a dtype or a shape, so that the file is whole: its bytes have the size that the header says."""
    tensors, name = file.tensors, random.choice([*file.tensors])
    tensor, choice = tensors[name], random.randrange(12)
    shape = [*tensor.shape]
    if choice == 0:
        del tensors[name]
    elif choice == 1:
        tensors[_renamed(name, random)] = tensors.pop(name)
    elif choice == 2:
        tensors[_renamed(name, random)] = tensor
    elif choice == 3:
        other = random.choice([*tensors])
        tensors[name], tensors[other] = tensors[other], tensor
    elif choice == 4:
        tensors[name] = tensor._replace(dtype=random.choice([*SIZES])).resized()
    elif choice <= 7:
        if choice == 5:
            huge = 2**40 if random.random() < 0.1 else 1
            shape = [random.choice((side, side, side + 1, max(0, side - 1), 0, 1, 2 * side, huge)) for side in shape]
        elif choice == 6:
            shape.insert(random.randrange(len(shape) + 1), random.choice((0, 1, 1, 2)))
        else:
            shape = shape[1:] if random.random() < 0.5 else shape[::-1]
        tensors[name] = tensor._replace(shape=shape).resized()
    else:  # NaN, infinity, the largest, the smallest, or any bytes
        size = random.choice((1, 2, 4, 8))
        place = random.randrange(len(tensor.data) // size + 1) * size
        patterns = (b"\xff" * size, b"\0" * size, random.randbytes(size), (b"\0" * size + b"\x80\x7f")[-size:])
        values = tensor.data[:place] + random.choice(patterns) + tensor.data[place + size :]
        tensors[name] = tensor._replace(data=values[: len(tensor.data)])


def mutate_archive(data: bytes, random: Random, mutate_bytes: MutateBytes, *, spare: Sequence[str]) -> bytes:
    """Return files of which one is changed by its kind, or, now and then, removed, exchanged, or made no file at all.

    Sometimes one name is replaced by another one in all of them, as none of the files would be told from its own.
    """
    files = unpack(data)
    names = [name for name in files or () if not name.startswith("@")]
    if files is None or not names:
        return mutate_bytes(data)
    name, choice = random.choice(names), random.randrange(60)
    if choice == 0:
        del files[name]
    elif choice == 1:
        files[random.choice([*names, *spare])] = files[name]
    elif choice == 2:
        del files[name]
        files[random.choice((LINK, PIPE, FOLDER)) + name] = random.choice((*LINKED, b"x", b"adapter_config.json"))
    elif choice <= 12:
        files = _renamed_everywhere(files, random)
    elif name.endswith(".safetensors"):
        files[name] = mutate_tensor_file(files[name], random, mutate_bytes)
    elif name.endswith(".json"):
        files[name] = mutate_json_bytes(files[name], random, mutate_bytes)
    else:
        files[name] = mutate_bytes(files[name])
    return pack(files)


def _renamed_everywhere(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    """Replace a word or a number in all JSON and all names of tensors, and seal what is sealed."""
    parsed = {name: parse(data) for name, data in files.items() if name.endswith(".safetensors")}
    words = sorted({word for file in parsed.values() if file for name in file.tensors for word in name.split(".")})
    if words and random.random() < 0.7:
        old, new = random.choice(words), random.choice((*NAMES, *words))
    else:
        old, new = str(random.randrange(1, 8)), str(random.choice((*range(10), 16, 2**20, 2**40)))
    new = json.dumps(new)[1:-1]

    def replaced(text: str) -> str:
        for before, after in (('"', '"'), (".", "."), ('"', "."), (".", '"'), (" ", ","), ("[", ","), (" ", "]")):
            text = text.replace(f"{before}{old}{after}", f"{before}{new}{after}")
        return text

    changed = {}
    for name, data in files.items():
        if (file := parsed.get(name)) is None:
            changed[name] = replaced(data.decode("latin-1")).encode("latin-1", "replace")
        else:
            own = TensorFile(
                {replaced(key): tensor for key, tensor in file.tensors.items()},
                {key: replaced(text) for key, text in file.metadata.items()},
            )
            reseal(own)
            changed[name] = unparse(own)
    return changed


def mutate_line(data: bytes, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Return the lines of a command with some added, removed, exchanged or changed."""
    words = data.split(b"\n")
    for _ in _times(random):
        place, choice = random.randrange(len(words) + 1), random.randrange(5)
        word = random.choice(WORDS).encode("utf-8", "surrogateescape")
        if choice == 0:
            words.insert(place, word)
        elif choice == 1 and len(words) > 1:
            words.pop(place % len(words))
        else:
            place %= len(words)
            words[place] = mutate_bytes(words[place]) if choice == 2 else word
    return b"\n".join(words)

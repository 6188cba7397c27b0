"""Changes of JSON, of safetensors files taken apart into JSON, and of directories, drawn from a seed."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from tests.fuzz.files import FOLDER, LINK, LINKED, PIPE, pack, unpack

MutateBytes = Callable[[bytes], bytes]

NAMES = (
    *("", "\ud800", "x" * 300, "a", "wide", "tall", ".", "a.b", "..", "wide.weight", "base_layer", "randlora_A", "0"),
    *(" ", "../x", "\0", "é\u202e", "%", "%s%n", "%2000000000d", "/", ".*", "(", "[a", "(?i)w", "a{99999999999}"),
    *("(?P<a>", "\\", "w|t", "all-linear", "all", "torch", "portable", "dense", "sparse", "very_sparse", "block"),
    *("experts", "embedding", "conv", "RANDLORA", "LORA", "nf4", "float32", "[red]x"),
)
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**20, 2**20 + 1, 2**31, 2**40, 2**53 + 1, 2**63, 2**64, -(2**63)),
    *(10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 2.0, 1e-320, 1e38, 1e308, float("inf"), float("nan")),
    *([], {}, [[]], [0], [1, 2], ["a"], {"": ""}, {"a": 1}, [0, 2**63], [2**40, 2], [None], [["a", 1]], [True, 1]),
    *NAMES,
)
"""Values that readers were seen to stumble over, and words that mean something to ours."""

ARGUMENTS = """
inspect verify convert merge plan --help --json --base --prefix --to --rank --tolerance --overwrite --adapter --scale
--out --dtype --r --alpha --targets --exclude --train-also --basis --stream --blocks --seed --in-proj -- -h -x --to=lora
--no-norms ours peft drawn odd base llama damaged file link zero empty out ours/x /dev/null /dev/zero -1 1 2 3.5 nan inf
1e400 1048576 1048577 wide=2 .*=2 lora native float64 split é
"""
WORDS = (*ARGUMENTS.split(), "9" * 5000, *NAMES)

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F32": 4}
SIZES |= {"I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "U8": "uint8", "I8": "int8"}
TORCH |= {"BOOL": "bool", "I64": "int64"}
LARGEST = 2**16
NO_JSON = AttributeError, LookupError, RecursionError, TypeError, ValueError


def parse(data: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file, in which each tensor has its bytes, as text, and metadata are JSON."""
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    for name, entry in header.items():
        if name == "__metadata__":
            entry.update({key: json.loads(text) for key, text in entry.items() if text.startswith("{")})
        else:
            entry["data"] = values[slice(*entry.pop("data_offsets"))].decode("latin-1")
    return header  # type: ignore[no-any-return]


def unparse(file: Any) -> bytes:
    header, values = dict(file), b""
    whole = {
        name: each for name, each in header.items() if isinstance(each, dict) and isinstance(each.get("data"), str)
    }
    for name, entry in sorted(whole.items(), key=lambda item: -SIZES.get(str(item[1].get("dtype")), 1)):
        data = entry["data"].encode("latin-1", "replace")
        header[name] = {key: value for key, value in entry.items() if key != "data"}
        header[name]["data_offsets"] = [len(values), len(values) + len(data)]
        values += data
    if isinstance(metadata := header.get("__metadata__"), dict):
        header["__metadata__"] = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values


def resize(file: dict[str, Any]) -> None:
    for entry in file.values():
        try:
            size, source = math.prod(entry["shape"]) * SIZES[entry["dtype"]], entry["data"] or "\0\0\x80\x3f"
            entry["data"] = (source * (size // len(source) + 1))[:size] if 0 <= size < LARGEST else entry["data"]
        except (*NO_JSON, MemoryError):  # of a text in the shape, as often as a number beside it says
            continue


def reseal(file: dict[str, Any]) -> None:
    """Give our header the checksum that goes with its facts and the tensors, if there is one.

    As the format says, that is SHA-256 over the JSON with sorted keys, then over name, dtype, shape and bytes of every
    tensor, where copies of bases count once.
    """
    try:
        facts = file["__metadata__"]["randlora"]
        facts.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        tensors = {}
        for name, entry in sorted(file.items(), reverse=True):
            if name != "__metadata__":
                last = name.rsplit(".", 1)[-1]
                tensors[f"base_model.{last}" if last in {"randlora_A", "randlora_B"} else name] = entry
        for name, entry in sorted(tensors.items()):
            dtype = TORCH.get(entry["dtype"], entry["dtype"])
            digest.update(f"\n{name} torch.{dtype} {tuple(entry['shape'])}\n".encode())
            digest.update(entry["data"].encode("latin-1"))
        facts["sha256"] = digest.hexdigest()
    except NO_JSON:
        return


def mutate_json(value: Any, random: Random) -> Any:
    if not (place := _place(value, random)):
        return random.choice(HOSTILE)
    holder, key = place
    old, choice = holder[key], random.randrange(9)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[_renamed(str(key), random)] = holder.pop(key) if random.random() < 0.7 else json.loads(json.dumps(old))
    elif choice == 2:  # the value of another place
        other, its = _place(value, random) or place
        holder[key] = json.loads(json.dumps(other[its]))
    elif choice == 3:
        deep = old
        for _ in range(random.choice((1, 2, 50, 900))):
            deep = [deep]
        holder[key] = random.choice(([old, old], {"a": old}, str(old), deep))
    elif choice == 4 and isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), old)
    elif choice <= 6:
        holder[key] = _tweaked(old, random, is_data=key == "data")
    else:
        holder[key] = random.choice(HOSTILE)
    return value


def _place(value: Any, random: Random) -> tuple[Any, Any] | None:
    """Draw a place in a JSON value: what holds it, and its key or index."""
    place = None
    while value and isinstance(value, dict | list) and (place is None or random.random() < 0.8):
        place = value, random.choice([*value] if isinstance(value, dict) else range(len(value)))
        value = place[0][place[1]]
    return place


def _tweaked(value: Any, random: Random, *, is_data: bool) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        whole = float(value) if abs(value) < 2**63 else 0
        return random.choice((value + 1, value - 1, -value, 2 * value, value // 2, value / 2 if whole else 1, whole))
    if isinstance(value, str) and is_data:  # NaN, infinity, the largest, the smallest, or any bytes
        size = random.choice((1, 2, 4, 8))
        place = random.randrange(len(value) // size + 1) * size
        patterns = (
            "\xff" * size,
            "\0" * size,
            random.randbytes(size).decode("latin-1"),
            ("\0" * size + "\x80\x7f")[-size:],
        )
        return (value[:place] + random.choice(patterns) + value[place + size :])[: len(value)]
    if isinstance(value, str):
        return _renamed(value, random)
    if isinstance(value, list):
        return random.choice((value[1:], value[:-1], value[::-1], value + value[:1]))
    return dict(list(value.items())[1:])


def _renamed(text: str, random: Random) -> str:
    place, added = random.randrange(len(text) + 1), random.choice(".a0%é (*|/\0\ud800")
    near = f"{text[:place]}{added}{text[place:]}", text[:place] + text[place + 1 :], f"{text}.r2", text + text[:1]
    return random.choice((random.choice(NAMES), *near, text[::-1], text.upper(), text[place:]))


def mutate_file(data: bytes, random: Random, mutate_bytes: MutateBytes, *, has_tensors: bool = False) -> bytes:
    try:
        value: Any = parse(data) if has_tensors else json.loads(data)
    except NO_JSON:
        return mutate_bytes(data)
    if random.random() < 0.05:
        return mutate_bytes(data)
    try:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            if has_tensors and value.get("__metadata__") and random.random() < 0.25:
                value["__metadata__"] = mutate_json(value["__metadata__"], random)
            else:
                value = mutate_json(value, random)
        for mend in (resize, reseal) if has_tensors else ():
            if random.random() < 0.9:
                mend(value)
        return unparse(value) if has_tensors else json.dumps(value).encode()
    except NO_JSON:  # too deep to be copied, too many digits, or no file any more
        return b"[" * random.choice((10, 5_000, 200_000))


def mutate_archive(data: bytes, random: Random, mutate_bytes: MutateBytes, *, spare: Sequence[str]) -> bytes:
    """Return files of which one is changed by its kind, or, now and then, removed, exchanged, or made no file at all.

    Sometimes one name is replaced by another one in all of them, as none of the files would be told from its own.
    """
    files = unpack(data) or {}
    names = [name for name in files if not name.startswith("@")]
    if not names:
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
        with suppress(*NO_JSON):  # a number that became a word
            files = _renamed_everywhere(files, random)
    else:
        files[name] = mutate_file(files[name], random, mutate_bytes, has_tensors=name.endswith(".safetensors"))
    return pack(files)


def _renamed_everywhere(files: dict[str, bytes], random: Random) -> dict[str, bytes]:
    parsed: dict[str, Any] = {}
    for name, data in files.items():
        parsed[name] = data.decode("latin-1")
        with suppress(*NO_JSON):
            parsed[name] = parse(data) if name.endswith(".safetensors") else parsed[name]
    words = sorted({
        word for file in parsed.values() if isinstance(file, dict) for name in file for word in name.split(".")
    })
    if words and random.random() < 0.7:
        old, new = random.choice(words), random.choice((*NAMES, *words))
    else:
        old, new = str(random.randrange(1, 8)), str(random.choice((*range(10), 16, 2**20, 2**40)))
    around = re.compile(
        rf'(?<=[". \[]){re.escape(json.dumps(old)[1:-1])}(?=[".,\]\\])'
    )  # a quote in JSON in JSON is escaped
    changed = json.loads(around.sub(lambda _: json.dumps(new)[1:-1], json.dumps([*parsed.values()])))
    for name, file in zip(files, changed, strict=True):
        reseal(file)
        files[name] = unparse(file) if isinstance(file, dict) else file.encode("latin-1", "replace")
    return files


def mutate_line(data: bytes, random: Random, mutate_bytes: MutateBytes) -> bytes:
    words = data.split(b"\n")
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        place, choice = random.randrange(len(words) + 1), random.randrange(5)
        word = random.choice(WORDS).encode("utf-8", "replace")
        if choice == 0:
            words.insert(place, word)
        elif choice == 1 and len(words) > 1:
            words.pop(place % len(words))
        else:
            place %= len(words)
            words[place] = mutate_bytes(words[place]) if choice == 2 else word
    return b"\n".join(words)

"""What verbs on files refuse: calls, damage, and adapters that do not fit; each says why, and nothing is written."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import randlora
from randlora import files
from randlora.__main__ import main
from randlora.errors import CheckpointError, ConfigError, MergeError, RandLoRAError
from randlora.files.model_directory import INDEX_FILE, SINGLE_FILE
from tests.checkpoint_files import CONFIG_FILE, TENSORS_FILE, edit_fields, reseal
from tests.hostile_files import SPECIAL, sparse, unseeded
from tests.model_directories import (
    adapter_of,
    carrying,
    contents,
    edit_json,
    edit_model,
    save_adapter,
    save_model,
    stored,
    write,
)
from tests.models import BERT, GPT2, LLAMA, llama
from tests.peer import THEIR_WARNINGS, their_directory, untied

pytestmark = THEIR_WARNINGS

P = ParamSpec("P")
Call = Callable[[], object]
BASE, ADAPTER = Path("base"), Path("adapter")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters, of which each test gets a copy to work in."""
    root = tmp_path_factory.mktemp("ground")
    save_model(LLAMA, root / "base")
    save_model(BERT, root / "bert")
    for name in ("again", "other"):
        save_adapter(LLAMA, root / name, train_also=["model.norm"])
    edit_fields(root / "other", {"base_model_name_or_path": "no/such/place"})
    save_adapter(LLAMA, root / "adapter")
    for name, layers in {"a": ["q_proj"], "b": ["o_proj"]}.items():
        save_adapter(LLAMA, root / "parts" / name, targets=layers)
    (root / "link").symlink_to("adapter")
    save_adapter(BERT, root / "head", targets=["query"], train_also=["classifier"])
    edit_fields(root / "head", {"base_model_name_or_path": "bert"})
    adapter_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8)), root / "convolution", targets="all")
    save_adapter(LLAMA, root / "of two ranks", r={"q_proj": 4, ".*": 8})
    unseeded(root / "unseeded")
    their_directory(LLAMA, root)
    return root


@pytest.fixture(autouse=True)
def _in_a_copy(ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ground, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")


def later(function: Callable[P, object]) -> Callable[P, Call]:
    """Make a function return a call of itself, to be made later."""
    return partial(partial, function)


@later
def merge(adapters: Any = "adapter", **options: Any) -> None:
    files.merge(**{"adapters": adapters, "out": "out", "base": "base", **options})


@later
def convert(source: str = "adapter", out: str = "out", **options: Any) -> None:
    files.convert(source, out, **options)


@later
def plan(directory: str = "bert", **options: Any) -> None:
    files.plan(directory, **options)


def too_large() -> None:
    model = LLAMA.build()
    randlora.inject(model, r=6)
    for parameter in randlora.trainable_parameters(model):
        parameter.data.fill_(1e30)
    randlora.save(model, "../large")
    files.inspect("../large")


READING: tuple[Callable[..., object], ...] = files.inspect, files.verify
OF_BASES, FOR_BASE = ("prefix", "base_revision"), "is for a base model: give base= too"
UPDATES: dict[str, Any] = {"to": "lora", "format": "diffusers"}
TWICE = ["adapter"] * 2, {"adapter": 0.5, "adapter/": 0.25}, ["adapter", "link"], ["x/../link", "link"]
INTO = {"out": "bert/../adapter"}, {"out": "adapter/in"}, {"source": f"adapter/{TENSORS_FILE}", "out": "adapter"}
CALLS: list[tuple[type[Exception], str, Call]] = [
    *((ConfigError, "named twice", merge(twice)) for twice in TWICE),
    (MergeError, "would not be finite in torch.float32", merge({"adapter": 1e38})),
    (MergeError, "values that are too large for torch.float16", merge({"adapter": 1e6}, dtype=torch.float16)),
    (CheckpointError, r"cannot merge .*other.*trained model\.norm\.weight too", merge(["again", "other"])),
    (CheckpointError, "adapter' names no base model .*give base=", merge(base=None)),
    (CheckpointError, "the adapters name different base models", merge(["head", "other"], base=None)),
    (CheckpointError, "'no/such/place', which the adapter names, is not there: give base=", merge("other", base=None)),
    *((CheckpointError, "an input that must not change", convert(overwrite=True, **each)) for each in INTO),
    (CheckpointError, "is a file", convert(out="bert/config.json", overwrite=True)),
    (CheckpointError, "exists and is not empty", convert(out="bert")),
    (CheckpointError, "an input that must not change", lambda: files.join(["again", "other"], "other")),
    (CheckpointError, "exists and is not empty", lambda: files.join(["again", "other"], "bert")),
    (CheckpointError, "expected two or more parts, got 1", lambda: files.join(["again"], "out")),
    (CheckpointError, "theirs was written by PEFT: convert it to", lambda: files.join(["again", "theirs"], "out")),
    (CheckpointError, "bases of unseeded came from a file, and no", lambda: files.join(["again", "unseeded"], "out")),
    (ConfigError, "format= and same_rank= are for to=\"lora\", not 'peft'", convert(to="peft", format="peft")),
    (ConfigError, "format= and same_rank= are for to=\"lora\", not 'native'", convert(to="native", same_rank=True)),
    (ConfigError, "format must be one of peft, diffusers or None, got 'mlx'", convert(to="lora", format="mlx")),
    (ConfigError, "rank= and tolerance= are for to=\"lora\": 'peft' is exact", convert(rank=4)),
    (ConfigError, 'component= is for to="lora" with format="diffusers"', convert(to="lora", component="unet")),
    (
        CheckpointError,
        "to 'peft': PEFT has one r and one alpha for all layers .* r = 4 .2 layers., 8",
        convert("of two ranks", to="peft"),
    ),
    (ConfigError, "rank must be at most 512, got 513", convert(to="lora", rank=513)),
    (ConfigError, r"has trained classifier\.bias, class", convert("head", **UPDATES)),
    (ConfigError, "0 is of kind convolution, and", convert("convolution", **UPDATES)),
    *((ConfigError, f"^{option}= {FOR_BASE}$", convert(to="native", **{option: "model"})) for option in OF_BASES),
    *((ConfigError, f"^prefix= {FOR_BASE}$", partial(verb, "adapter", prefix="model")) for verb in READING),
    *((ConfigError, f"^base_revision= {FOR_BASE}$", partial(verb, "adapter", base_revision="x")) for verb in READING),
    (CheckpointError, r"^no such directory: .*nothing$", lambda: files.verify("nothing")),
    (CheckpointError, r"^no such directory: .*nothing$", lambda: files.verify("adapter", "nothing")),
    (CheckpointError, r"the update of model\.layers\.0.* is too large", too_large),
    (CheckpointError, "no such directory: .*nothing", plan("nothing")),
    (CheckpointError, "config.json is a file: give the directory bert$", plan("bert/config.json")),
    (CheckpointError, "model.safetensors is a file: give the directory base$", merge(base="base/model.safetensors")),
    (CheckpointError, "README.md is not a directory: expected a directory with model", plan("adapter/README.md")),
    (CheckpointError, "an adapter, not a model: expected .*index.json, or config.json alone$", plan("adapter")),
]


@pytest.mark.parametrize(("error", "words", "call"), CALLS, ids=[words for _, words, _ in CALLS])
def test_a_call_that_cannot_be_meant_writes_nothing(error: type[Exception], words: str, call: Call) -> None:
    before = contents(Path())
    with pytest.raises(error, match=words):
        call()
    assert contents(Path()) == before


def adapted_llama() -> nn.Module:
    model = LLAMA.build()
    randlora.inject(model, r=4)
    return model


WRITERS: dict[str, Callable[[Path], object]] = {
    "save": lambda out: randlora.save(adapted_llama(), out),
    "save_all": lambda out: randlora.save_all(adapted_llama(), out),
    "save_merged": lambda out: files.save_merged(adapted_llama(), out),
    "merge": lambda out: files.merge("adapter", out, base="base", overwrite=True),
    "convert": lambda out: files.convert("adapter", out, overwrite=True),
    "convert to a LoRA": lambda out: files.convert("adapter", out, "lora", tolerance=1, overwrite=True),
    "join": lambda out: files.join(["parts/a", "parts/b"], out),
}


def merge_by_command(out: Path) -> None:
    with redirect_stderr(io.StringIO()) as told:
        if main(["merge", "adapter", str(out), "--base", "base", "--overwrite"]):
            raise OSError(told.getvalue())


READERS: dict[str, Callable[[Path], object]] = {
    "load_all": lambda place: randlora.load_all(LLAMA.build(), place / "adapter"),
    "load_model": lambda place: files.load_model(place / "adapter", base=place / "base"),
    "swap": lambda place: randlora.swap(carrying(LLAMA.build(), {ADAPTER: 1.0}), place / "adapter"),
    "a pool": lambda place: randlora.serving.AdapterPool(LLAMA.build(), place, max_loaded=1).names,
    "verify": lambda place: files.verify(place / "adapter", place / "base"),
    "the base of merge": lambda place: files.merge("adapter", "out", base=place / "base"),
    "the parts of join": lambda place: files.join([place / "parts/a", place / "parts/b"], "out"),
}


@pytest.mark.parametrize("name", [*WRITERS, "the command line", *READERS])
def test_a_path_means_the_same_place_to_all_that_read_and_write(name: str) -> None:
    shutil.copytree("adapter", "written")
    act = {**WRITERS, "the command line": merge_by_command, **READERS}[name]
    before = contents(Path())
    for place in ("missing/..",) if name in READERS else ("missing/../new", "missing/../written"):
        with pytest.raises((OSError, RandLoRAError), match=r"missing/\.\."):
            act(Path(place))
        assert contents(Path()) == before
    Path("missing").mkdir()
    act(Path("missing/.." if name in READERS else "missing/../new"))
    assert Path("new").exists() == (name not in READERS)


Q = "model.layers.0.self_attn.q_proj"


def misstate() -> None:
    shapes = dict(files.adapter.open_adapter(ADAPTER).shapes or {})
    reseal(ADAPTER, shapes={**shapes, Q: (32, 30)})


@later
def sharded(change: Callable[[list[Path]], object]) -> None:
    shutil.rmtree(BASE)
    change(sorted(save_model(LLAMA, BASE, is_sharded=True).glob("*.safetensors")))


def cut_and_lose(shards: list[Path]) -> None:
    os.truncate(shards[0], 1000)
    shards[1].unlink()


def hold_one_tensor_twice(shards: list[Path]) -> None:
    name, tensor = next(iter(load_file(shards[0]).items()))
    save_file({**load_file(shards[1]), name: tensor}, shards[1])


def index(change: Callable[[dict[str, str]], object]) -> Call:
    held = BASE / INDEX_FILE
    return sharded(lambda _: edit_json(held, weight_map=change(json.loads(held.read_text("utf-8"))["weight_map"])))


def index_text(text: str) -> Call:
    return sharded(lambda _: (BASE / INDEX_FILE).write_text(text, encoding="utf-8"))


@later
def instead(**held: bytes) -> None:
    shutil.rmtree(BASE)
    BASE.mkdir()
    for name, content in held.items():
        (BASE / name.replace("__", ".")).write_bytes(content)


@later
def quantized(name: str = "", **said: Any) -> None:
    edit_model(BASE, {name: torch.zeros(4)} if name else {})
    edit_json(BASE / "config.json", quantization_config=said or None)


@later
def config(**fields: Any) -> None:
    edit_json(BASE / "config.json", **fields)


@later
def of(
    build: Callable[[], nn.Module],
    adapted: Callable[[], nn.Module] | None = None,
    changes: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda _: {},
    **options: Any,
) -> None:
    """Make the base anew, with changes to its tensors, and the adapter, of that or of another model."""
    model = build()
    shutil.rmtree(BASE)
    if isinstance(model, nn.Sequential):
        BASE.mkdir()
        save_file(model.state_dict(), BASE / SINGLE_FILE)
    else:
        write(model, BASE)
    edit_model(BASE, changes(stored(BASE)))
    adapter_of(adapted() if adapted else model, ADAPTER, **options)


def of_norm() -> None:
    held = load_file(ADAPTER / TENSORS_FILE).items()
    save_file({name.replace(Q, "model.norm"): tensor for name, tensor in held}, ADAPTER / TENSORS_FILE)


def of_peft() -> None:
    shutil.rmtree(ADAPTER)
    their_directory(LLAMA, Path())[0].rename(ADAPTER)
    edit_model(BASE, {f"{Q}.weight": torch.ones(34, 30)})


@later
def link(name: str) -> None:
    """Put a link to a file elsewhere in place of one of the base's."""
    secret, place = Path(shutil.copy(BASE / "config.json", "secret")).resolve(), BASE / name
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(secret)


@later
def special(name: str, kind: str) -> None:
    """Put what is no file in place of one of the base's."""
    if name == INDEX_FILE:
        (BASE / SINGLE_FILE).unlink()
    (BASE / name).unlink(missing_ok=True)
    SPECIAL[kind](BASE / name)
    if kind == "directory":
        (BASE / name / "more").symlink_to("/dev/zero")


def dangling() -> None:
    (BASE / "config.json").unlink()
    (BASE / "config.json").symlink_to("nowhere")


HEADER = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
OF_ADAPTER: dict[str, Call] = {
    "there is no adapter_config.json": (ADAPTER / CONFIG_FILE).unlink,
    "the files come from different saves": lambda: edit_fields(ADAPTER, {"r": 7}),
    f"its header says that {Q} is 32 x 30": misstate,
}
OF_BASE: dict[str, Call] = {
    "2 problems:(?s:.*)00001-.* is truncated or damaged .*undamaged(?s:.*)no .*00002-of": sharded(cut_and_lose),
    "lacks no.such.weight, which the index says it holds": index(
        lambda held: {**held, "no.such.weight": next(iter(held.values()))}
    ),
    r" is in model-00001.* and in model-00002": sharded(hold_one_tensor_twice),
    "cannot read .*index.json": index_text("{"),
    "not a JSON object": index_text("[1]"),
    "index.json is damaged: expected 'weight_map'": index_text("{}"),
    "index.json is damaged": index(lambda _: []),
    "index.json is damaged:": index(lambda _: {"x": "../x.safetensors"}),
    "cannot read .*config.json": lambda: (BASE / "config.json").write_text("{"),
    "3,221,225,472 bytes, expected at most": lambda: sparse(3 * 2**30)(BASE / "config.json"),
    "model.safetensors is truncated": lambda: os.truncate(BASE / SINGLE_FILE, 1000),
    "x in .* has dtype F4": instead(model__safetensors=len(HEADER).to_bytes(8, "little") + HEADER + bytes(2)),
    r"has no model\.lost\.weight, only": quantized("model.lost.weight.quant_state.bitsandbytes__nf4"),
    "config.json says with fp8": quantized(quant_method="fp8"),
    "config.json says with gptq": quantized(quant_method="gptq", load_in_4bit=True),
    "config.json says with an unnamed method": quantized(bits=4),
}
OF_CLASS: dict[str, Call] = {
    "names OwnForCausalLM, which transformers .* lacks; or build": config(architectures=["OwnForCausalLM"]),
    "names AutoModel, which transformers .* lacks; or build": config(architectures=["AutoModel"]),
    "its config.json names no class; or build the model": config(architectures=None),
    "cannot build LlamaForCausalLM from its config.json .*: TypeError: .* got str": config(num_attention_heads="many"),
    r"up_proj.weight has shape \(48, 32\) in the files, \(40, 32\) by its config": config(intermediate_size=40),
    "norm.weight holds torch.int64, codes of": lambda: edit_model(BASE, {"model.norm.weight": torch.arange(32)}),
}
OF_BOTH: dict[str, Call] = {  # a plan needs no weights
    "holds no weights in safetensors files.*with save_pretrained": instead(pytorch_model__bin=b"", config__json=b""),
    "holds no weights.*expected a directory with model.safetensors": instead(config__json=b""),
    f"the model has no layer {Q}": lambda: edit_model(BASE, {f"{Q}.weight": None}),
    r"model\.layers\.0\.mlp\.up_proj is 48 x 32 here, the adapter was trained on out x in = 40 x 32": of(
        LLAMA.build, lambda: llama(intermediate_size=40), targets=["up_proj"]
    ),
    rf"{Q} has shape \(34, 30\) in the files, \(32, 32\) by its config": of_peft,
    rf"{Q} has shape \(32,\) in the files, \(32, 32\) by its config": lambda: edit_model(
        BASE, {f"{Q}.weight": torch.ones(32)}
    ),
    r"h\.0\.attn\.c_attn has shape \(34, 96\) in the files, \(32, 96\) by its config": of(
        GPT2.build, changes=lambda _: {"transformer.h.0.attn.c_attn.weight": torch.ones(34, 96)}, targets=["c_attn"]
    ),
    r"weight of lm_head is tied to transformer\.wte\.weight": of(GPT2.build, untied, targets=["lm_head"]),
    r"model\.norm \(LlamaRMSNorm\) has no weight that can be adapted": of_norm,
    r"classifier\.weight has shape \(5, 32\) here": of(
        BERT.build, changes=lambda _: {"classifier.weight": torch.ones(5, 32)}, train_also=["classifier"]
    ),
    "0 is 8 x 75 here, the adapter was trained on out x in = 8 x 27": of(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 5)), lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), targets=["0"]
    ),
}
NO_FILES = [
    (f"{name} is a directory, a pipe or a device: expected a file", name, kind)
    for name, kind in (("config.json", "device-without-end"), (SINGLE_FILE, "directory"), (INDEX_FILE, "pipe"))
]
NO_FILES += [("cannot read .*config.json .*Too many levels", "config.json", "link-to-itself")]
DAMAGED: list[tuple[str, str, str, Call]] = [  # words, the verbs that say them, the check of `files.verify` that does
    *((words, "", "files", damage) for words, damage in OF_ADAPTER.items()),
    *((words, "plan inspect merge", "base", damage) for words, damage in OF_BASE.items()),
    *((words, "plan", "", damage) for words, damage in OF_CLASS.items()),
    *((words, "inspect merge", "base", damage) for words, damage in OF_BOTH.items()),
    *(("is a link to .*secret, outside of the", "merge", "", link(name)) for name in ("x", "config.json", "deep/x")),
    *((words, "plan inspect merge", "base", special(*each)) for words, *each in NO_FILES),
    *(
        (f"holds no weights.*{name}", "inspect merge", "base", special(name, "link-to-itself"))
        for name in (SINGLE_FILE, INDEX_FILE)
    ),
    ("cannot read .*config.json .*No such file", "plan inspect merge", "base", dangling),
    *(("cannot copy the files of", "merge", "", special("tokenizer.json", kind)) for kind in ("pipe", "directory")),
]
VERBS: dict[str, Call] = {
    "plan": plan("base"),
    "inspect": lambda: files.inspect("adapter", "base"),
    "merge": merge(),
}


@pytest.mark.parametrize(("words", "verbs", "check", "damage"), DAMAGED, ids=[words for words, *_ in DAMAGED])
def test_what_is_damaged_or_does_not_fit_is_said_by_all_verbs(words: str, verbs: str, check: str, damage: Call) -> None:
    damage()
    before = sorted(Path().rglob("*"))
    for verb in verbs.split():
        with pytest.raises(CheckpointError, match=words):
            VERBS[verb]()
    assert sorted(Path().rglob("*")) == before
    if check:
        verification = files.verify("adapter", "base" if check == "base" else None)
        (found,) = (each for each in verification.checks if each.outcome == "failed")
        assert found.name == check
        assert re.search(words, found.words)
        assert f"failed: {found.name}: {found.words}" in str(verification)
        assert str(verification).endswith("is NOT sound")

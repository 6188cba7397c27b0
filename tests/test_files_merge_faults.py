"""What can go wrong with a merge on disk: the error is clear, inputs stay, and nothing half-written is left."""

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora.__main__ import main
from randlora.disk import replace
from randlora.errors import CheckpointError, ConfigError, MergeError
from tests.checkpoint_files import edit_fields, reseal
from tests.kit import fill
from tests.model_directories import contents, save_adapter, save_model, write
from tests.models import BERT, GPT2, LLAMA, SIDES, VOCABULARY


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(LLAMA, tmp_path / "base", is_sharded=True)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(LLAMA, tmp_path / "adapter")


def refused(root: Path, match: str, error: type[Exception] = CheckpointError, **options: Any) -> None:
    """Check that merging the base and the adapter below a directory is refused, and that nothing changed there."""
    before = contents(root)
    arguments = {"base": root / "base", "adapters": root / "adapter", "out": root / "out", **options}
    with pytest.raises(error, match=match):
        randlora.files.merge(**arguments)
    assert contents(root) == before
    assert not list(root.glob("**/.*"))


def save(model: nn.Module, directory: Path, **options: Any) -> None:
    """Save an adapter of some model."""
    randlora.inject(model, r=4, **options)
    fill(model)
    randlora.save(model, directory)


def llama(**options: Any) -> nn.Module:
    """Build a Llama that differs from the base."""
    config = transformers.LlamaConfig(**{"vocab_size": VOCABULARY, "num_key_value_heads": 2, **SIDES, **options})
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def test_a_base_that_lacks_a_target_is_refused(base: Path, tmp_path: Path) -> None:
    save(llama(num_hidden_layers=3), tmp_path / "adapter")
    refused(tmp_path, r"cannot merge .*adapter(?s:.*)the model has no layer model\.layers\.2\.self_attn\.q_proj")


def test_a_base_of_other_shapes_is_refused(base: Path, tmp_path: Path) -> None:
    save(llama(intermediate_size=40), tmp_path / "adapter", targets=["up_proj"])
    refused(tmp_path, r"model\.layers\.0\.mlp\.up_proj is 48 x 32 here, the adapter was trained on out x in = 40 x 32")


def test_a_base_that_lacks_what_was_trained_beside_is_refused(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **SIDES)).save_pretrained(tmp_path / "base")
    save(BERT.build(), tmp_path / "adapter", train_also=["classifier"])
    reseal(tmp_path / "adapter", model_class=None)  # as version 0.2 wrote it
    with pytest.raises(CheckpointError, match=r"the model has no parameter classifier\.weight"):
        randlora.files.merge(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", prefix="bert")
    assert not (tmp_path / "out").exists()


def test_a_target_whose_weight_is_tied_in_the_base_is_refused(tmp_path: Path) -> None:
    save_model(GPT2, tmp_path / "base")
    config = transformers.GPT2Config(**{**GPT2.build().config.to_dict(), "tie_word_embeddings": False})  # type: ignore[operator, union-attr]
    save(transformers.GPT2LMHeadModel(config), tmp_path / "adapter", targets=["lm_head"])
    refused(tmp_path, r"the weight of lm_head is tied to transformer\.wte\.weight")


def test_a_target_that_is_a_norm_in_the_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    held = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.0.self_attn.q_proj", "norm"): tensor for name, tensor in held.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    refused(tmp_path, r"model\.norm \(LlamaRMSNorm\) has no weight that can be adapted")


def test_two_adapters_that_trained_the_same_parameter_are_refused(base: Path, tmp_path: Path) -> None:
    for name in ("adapter", "other"):
        save_adapter(LLAMA, tmp_path / name, train_also=["model.norm"])
    both = [tmp_path / "adapter", tmp_path / "other"]
    refused(tmp_path, r"cannot merge .*other.*trained model\.norm\.weight too", adapters=both)


@pytest.mark.parametrize(
    ("match", "error", "options"),
    [
        ("must be a finite number, got nan", ConfigError, {"factor": float("nan")}),
        ("dtype must be one of .*got torch.int8", ConfigError, {"dtype": torch.int8}),
        ("there is no adapter", ConfigError, {"adapters": []}),
        ("would not be finite in torch.float32", MergeError, {"factor": 1e38}),
        ("values that are too large for torch.float16", MergeError, {"factor": 1e6, "dtype": torch.float16}),
    ],
    ids=["factor", "dtype", "none", "infinite", "too-narrow"],
)
def test_what_cannot_be_computed_is_refused(
    match: str, error: type[Exception], options: dict[str, Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    if "factor" in options:
        options = {**options, "adapters": {adapter: options["factor"]}}
        options.pop("factor")
    refused(tmp_path, match, error, **options)


def test_an_adapter_named_twice_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    link, detour = tmp_path / "link", adapter / ".." / adapter.name
    link.symlink_to(adapter)
    for twice in ([adapter, adapter], {str(adapter): 0.5, f"{adapter}/": 0.25}, [adapter, link], [detour, adapter]):
        refused(tmp_path, "named twice", ConfigError, adapters=twice)


def test_an_output_that_exists_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"x")
    refused(tmp_path, "out exists and is not empty: choose a different name, or give overwrite=True", MergeError)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for overwrite in (False, True):
        refused(tmp_path, "out is a file or a broken link", MergeError, overwrite=overwrite)


def test_a_merged_model_is_replaced_as_a_whole_and_nothing_else_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    single = save_model(LLAMA, tmp_path / "single")
    randlora.files.merge(adapter, out, base=base)
    expected = contents(randlora.files.merge(adapter, tmp_path / "expected", base=single).out)
    randlora.files.merge(adapter, out, base=single, overwrite=True)  # which has no index and no shards
    assert contents(out) == expected
    (out / "checkpoint-10").mkdir()
    (out / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    refused(tmp_path, r"out holds other files, which would be lost: checkpoint-10", MergeError, overwrite=True)
    for inside in (base, tmp_path):
        refused(tmp_path, "an input that must not change|would be lost", MergeError, out=inside, overwrite=True)


def test_a_replacement_that_fails_leaves_the_model_that_was_there(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    randlora.files.merge(adapter, tmp_path / "out", base=base)
    before, flush = contents(tmp_path), replace.flush

    def refuse(path: Path) -> None:
        if path == tmp_path:
            raise OSError("the disk refuses")
        flush(path)

    monkeypatch.setattr(replace, "flush", refuse)
    with pytest.raises(OSError, match="the disk refuses"):
        randlora.files.merge({adapter: 2.0}, tmp_path / "out", base=base, overwrite=True)
    assert contents(tmp_path) == before


def named(adapter: Path, base: object) -> Path:
    """Write the name of a base model into an adapter's JSON."""
    edit_fields(adapter, {"base_model_name_or_path": base})
    return adapter


def test_without_a_base_the_adapters_name_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    expected = contents(randlora.files.merge(adapter, tmp_path / "expected", base=base).out)
    refused(tmp_path, "adapter' names no base model .*give base=", base=None)
    named(adapter, str(base))
    assert contents(randlora.files.merge(adapter, tmp_path / "out", overwrite=True).out) == expected
    other = named(save_adapter(LLAMA, tmp_path / "other"), str(tmp_path))
    refused(tmp_path, "the adapters name different base models", base=None, adapters=[adapter, other], overwrite=True)
    named(adapter, "no/such/place")
    refused(tmp_path, "'no/such/place', which the adapter names, is not there: give base=", base=None, overwrite=True)


@pytest.mark.parametrize("inside", ["base", "adapter"])
def test_an_output_inside_an_input_is_refused(inside: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    refused(
        tmp_path,
        "is .* or inside it, an input that must not change",
        MergeError,
        out=tmp_path / inside / "deep" / "out",
    )


@contextmanager
def without_rights() -> Iterator[None]:
    """Be a user to whom permissions apply, as they do not to root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_written_to_is_refused() -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own directories let nobody else in
        root = Path(made)
        save_model(LLAMA, root / "base")
        save_adapter(LLAMA, root / "adapter")
        (root / "locked").mkdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with without_rights():
            refused(root, "Permission denied", PermissionError, out=root / "locked" / "out")
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_no_input_is_opened_for_writing(base: Path, adapter: Path, tmp_path: Path) -> None:
    before, written, is_watched = contents(tmp_path), list[str](), True

    def audit(event: str, args: Any) -> None:
        is_write = event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_write and is_watched:
            written.append(os.path.realpath(args[0]))

    sys.addaudithook(audit)  # for as long as the process lives
    try:
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    finally:
        is_watched = False
    assert any("unfinished" in path for path in written)
    assert [path for path in written if path.startswith((os.path.realpath(base), os.path.realpath(adapter)))] == []
    assert {name: content for name, content in contents(tmp_path).items() if not name.startswith("out")} == before


def test_what_the_disk_has_no_room_for_is_not_begun(adapter: Path, tmp_path: Path) -> None:
    base = save_model(LLAMA, tmp_path / "base")
    path = base / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = max(facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__")
    space = os.statvfs(tmp_path)
    vast = 4 * space.f_bavail * space.f_frsize  # others may make room meanwhile, and this must never be written
    header["vast"] = {"dtype": "U8", "shape": [vast], "data_offsets": [start, start + vast]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:  # a hole, which takes no room itself
        file.write(len(text).to_bytes(8, "little") + text + content[8 + length :])
        file.truncate(8 + len(text) + start + vast)
    with pytest.raises(MergeError, match=r"it needs .*, .* are free"):
        randlora.files.merge(adapter, tmp_path / "out", base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_disk_that_is_full_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, (soft, hard) = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["merge", str(adapter), str(tmp_path / "out"), "--base", str(base)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))  # bytes of one file: less than a shard
    try:
        assert main(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"error: File too large: .*\.safetensors", shown.err)
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


HALTING = """
import sys, time
import randlora

def halt_in_the_middle(done, total, doing):
    if done > total / 2:
        print("halfway", flush=True)
        time.sleep(600)

randlora.files.merge("adapter", "out", base="base", progress=halt_in_the_middle)
"""


@pytest.mark.medium
def test_a_kill_in_the_middle_leaves_nothing_under_the_final_name_and_the_same_call_then_works(
    base: Path, adapter: Path, tmp_path: Path, without_transformers: dict[str, str]
) -> None:
    before = contents(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HALTING],
        cwd=tmp_path,
        env=without_transformers,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"adapter", "base"}
    assert [name.startswith(".out.unfinished-") for name in left] == [True]
    assert {name: content for name, content in contents(tmp_path).items() if not name.startswith(".")} == before

    out = randlora.files.merge(adapter, tmp_path / "out", base=base).out
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "out"}
    model = LLAMA.build()
    randlora.load(model, adapter)
    randlora.merge(model)
    assert contents(out) == contents(write(model, tmp_path / "expected", is_sharded=True))

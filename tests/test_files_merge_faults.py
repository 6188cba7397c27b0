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
from collections.abc import Callable, Iterator
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
from tests.checkpoint_files import TENSORS_FILE, edit_fields
from tests.kit import fill
from tests.model_directories import contents, merge_in_memory, save_adapter, save_model, write
from tests.models import GPT2, LLAMA, SIDES, VOCABULARY


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
    randlora.save(fill(model), directory)


def of_other_llama(root: Path, targets: list[str] | None = None, **sides: int) -> None:
    """Save an adapter of a Llama that differs from the base."""
    config = transformers.LlamaConfig(**{"vocab_size": VOCABULARY, "num_key_value_heads": 2, **SIDES, **sides})
    save(transformers.LlamaForCausalLM(config), root / "adapter", targets=targets)


def of_untied_head(root: Path) -> None:
    shutil.rmtree(root / "base")
    save_model(GPT2, root / "base")
    config = transformers.GPT2Config(**{**GPT2.build().config.to_dict(), "tie_word_embeddings": False})  # type: ignore[operator, union-attr]
    save(transformers.GPT2LMHeadModel(config), root / "adapter", targets=["lm_head"])


def of_norm(root: Path) -> None:
    held = load_file(save_adapter(LLAMA, root / "adapter") / TENSORS_FILE)
    renamed = {name.replace("layers.0.self_attn.q_proj", "norm"): tensor for name, tensor in held.items()}
    save_file(renamed, root / "adapter" / TENSORS_FILE)


MISFITS: dict[str, Callable[[Path], object]] = {
    r"cannot merge .*adapter(?s:.*)the model has no layer model\.layers\.2\.self_attn\.q_proj": (
        lambda root: of_other_llama(root, num_hidden_layers=3)
    ),
    r"model\.layers\.0\.mlp\.up_proj is 48 x 32 here, the adapter was trained on out x in = 40 x 32": (
        lambda root: of_other_llama(root, ["up_proj"], intermediate_size=40)
    ),
    r"the weight of lm_head is tied to transformer\.wte\.weight": of_untied_head,
    r"model\.norm \(LlamaRMSNorm\) has no weight that can be adapted": of_norm,
}


@pytest.mark.parametrize(("match", "prepare"), MISFITS.items(), ids=["layer", "shape", "tied", "norm"])
def test_an_adapter_that_does_not_fit_the_base_is_refused(
    match: str, prepare: Callable[[Path], object], base: Path, tmp_path: Path
) -> None:
    prepare(tmp_path)
    refused(tmp_path, match)


def test_what_cannot_be_meant_or_computed_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    link, detour = tmp_path / "link", adapter / ".." / adapter.name
    link.symlink_to(adapter)
    for twice in ([adapter, adapter], {str(adapter): 0.5, f"{adapter}/": 0.25}, [adapter, link], [detour, adapter]):
        refused(tmp_path, "named twice", ConfigError, adapters=twice)
    refused(tmp_path, "must be a finite number, got nan", ConfigError, adapters={adapter: float("nan")})
    refused(tmp_path, "dtype must be one of .*got torch.int8", ConfigError, dtype=torch.int8)
    refused(tmp_path, "there is no adapter", ConfigError, adapters=[])
    refused(tmp_path, "would not be finite in torch.float32", MergeError, adapters={adapter: 1e38})
    large = {"adapters": {adapter: 1e6}, "dtype": torch.float16}
    refused(tmp_path, "values that are too large for torch.float16", MergeError, **large)
    both = [save_adapter(LLAMA, tmp_path / name, train_also=["model.norm"]) for name in ("adapter", "other")]
    refused(tmp_path, r"cannot merge .*other.*trained model\.norm\.weight too", adapters=both)


def test_an_output_is_replaced_as_a_whole_on_demand_and_nothing_else_is(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out, single = tmp_path / "out", save_model(LLAMA, tmp_path / "single")
    randlora.files.merge(adapter, out, base=base)
    refused(tmp_path, "out exists and is not empty: choose a different name, or give overwrite=True", MergeError)
    expected = contents(randlora.files.merge(adapter, tmp_path / "expected", base=single).out)
    randlora.files.merge(adapter, out, base=single, overwrite=True)  # which has no index and no shards
    assert contents(out) == expected
    (out / "checkpoint-10").mkdir()
    (out / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    refused(tmp_path, r"out holds other files, which would be lost: checkpoint-10", MergeError, overwrite=True)
    for inside in (base, tmp_path, base / "deep" / "out", adapter / "deep" / "out"):
        refused(tmp_path, "an input that must not change|would be lost", MergeError, out=inside, overwrite=True)
    shutil.rmtree(out)
    out.symlink_to(tmp_path / "nowhere")
    for overwrite in (False, True):
        refused(tmp_path, "out is a file or a broken link", MergeError, overwrite=overwrite)


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


def test_without_a_base_the_adapters_name_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    def name(directory: Path, place: str) -> Path:
        edit_fields(directory, {"base_model_name_or_path": place})
        return directory

    expected = contents(randlora.files.merge(adapter, tmp_path / "expected", base=base).out)
    refused(tmp_path, "adapter' names no base model .*give base=", base=None)
    assert contents(randlora.files.merge(name(adapter, str(base)), tmp_path / "out").out) == expected
    other: dict[str, Any] = {"base": None, "overwrite": True}
    both = [adapter, name(save_adapter(LLAMA, tmp_path / "other"), str(tmp_path))]
    refused(tmp_path, "the adapters name different base models", adapters=both, **other)
    name(adapter, "no/such/place")
    refused(tmp_path, "'no/such/place', which the adapter names, is not there: give base=", **other)


@contextmanager
def without_rights() -> Iterator[None]:
    """Be a user to whom permissions apply, as they do not to root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_inputs_are_never_opened_for_writing_and_a_locked_directory_is_refused() -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own directories let nobody else in
        root, locked, out = Path(made), Path(made) / "locked", Path(made) / "open"
        base, adapter = save_model(LLAMA, root / "base"), save_adapter(LLAMA, root / "adapter")
        locked.mkdir()
        out.mkdir()
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        out.chmod(0o777)
        with without_rights():
            refused(root, "Permission denied", PermissionError, out=locked / "out")
            randlora.files.merge(adapter, out / "merged", base=base)
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


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
        [sys.executable, "-c", HALTING], cwd=tmp_path, env=without_transformers, stdout=subprocess.PIPE, text=True
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
    expected = write(merge_in_memory(LLAMA, {adapter: 1.0}), tmp_path / "expected", is_sharded=True)
    assert contents(out) == contents(expected)

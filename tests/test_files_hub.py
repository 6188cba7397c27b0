"""Verbs on files, and their commands, of models and adapters on the Hub: the same as of directories."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import randlora
from randlora.__main__ import main
from randlora.errors import CheckpointError
from tests.hub_server import Hub, Repository, keep_client_in, point_client_at, running_hub
from tests.model_directories import contents, save_adapter, save_model
from tests.models import LLAMA
from tests.quantized_checkpoints import quantize


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client talks to, with ``tmp_path`` as the directory that it works in."""
    keep_client_in(tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as running:
        point_client_at(running.url, monkeypatch)
        yield running


def put(hub: Hub, repo_id: str, directory: Path, **more: bytes) -> None:
    """Make a repository of the files of a directory, and of some more."""
    hub.repositories[repo_id] = Repository()
    hub.repositories[repo_id].commit({**contents(directory), **more})


@pytest.mark.parametrize("layout", ["one file", "sharded", "nf4 twice", "8 bits"])
def test_a_plan_reads_headers_and_no_weights(hub: Hub, layout: str) -> None:
    is_dense = layout in ("one file", "sharded")
    base = (
        save_model(LLAMA, Path("base"), is_sharded=layout == "sharded")
        if is_dense
        else quantize(LLAMA, layout, Path("base"), is_sharded=True)
    )
    put(hub, "org/model", base)
    assert randlora.files.plan("org/model", r=4) == randlora.files.plan(base, r=4)
    options: dict[str, Any] = {"r": 4, "tokens": 100}
    found = randlora.files.training_memory("org/model", **options)
    assert str(found) == str(randlora.files.training_memory(base, **options))
    if not is_dense:
        with pytest.raises(CheckpointError, match=r"cannot merge into 'org/model', which is quantized"):
            randlora.files.merge(save_adapter(LLAMA, Path("adapter")), "merged", base="org/model")
    cached = {path.name for path in Path("cache").rglob("*") if path.is_symlink()}
    assert not any(name.endswith(".safetensors") for name in cached)


def test_a_plan_of_a_large_model_takes_little(hub: Hub) -> None:
    base = save_model(LLAMA, Path("base"))
    put(hub, "org/model", base)
    file = hub.repositories["org/model"].files()["model.safetensors"]
    length = 8 + int.from_bytes(file[:8], "little")
    hub.repositories["org/model"].commit({"model.safetensors": file + bytes(10**6)})
    randlora.files.plan("org/model", r=4)
    assert length <= hub.sent < 2 * 10**5


def test_a_merge_downloads_both_and_equals_that_of_directories(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_model(LLAMA, Path("base"), is_sharded=True), save_adapter(LLAMA, Path("adapter"))
    other = {"pytorch_model.bin": b"large", "consolidated.safetensors": b"large", "tokenizer.json": b"{}"}
    put(hub, "org/model", base, **other)
    put(hub, "user/adapter", adapter)
    (base / "tokenizer.json").write_bytes(b"{}")
    report = randlora.files.merge({"user/adapter": 0.5}, "merged", base="org/model")
    assert hub.requests.count("GET /api/models/user/adapter/revision/main") == 1
    assert not [request for request in hub.requests if "large" in request or ".bin" in request]
    expected = randlora.files.merge({adapter: 0.5}, "expected", base=base)
    assert contents(Path("merged")) == contents(Path("expected"))
    assert report == replace(expected, out=Path("merged"), adapters={"user/adapter": 0.5})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert randlora.files.plan("org/model", r=4) == randlora.files.plan(base, r=4)


def test_every_command_takes_revisions_of_the_adapter_and_of_the_base(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_model(LLAMA, Path("base"))
    put(hub, "org/model", base)
    put(hub, "user/adapter", save_adapter(LLAMA, Path("adapter")))
    assert main(["verify", "user/adapter", "--base", "org/model"]) == 0
    shown = capsys.readouterr().out
    assert "passed: base: org/model has all" in shown
    assert shown.endswith("user/adapter is sound\n")
    assert hub.requests.count("GET /api/models/org/model/revision/main") == 1
    for repository, damaged in (("org/model", "model.safetensors"), ("user/adapter", "adapter_model.safetensors")):
        hub.repositories[repository].refs["v1"] = hub.repositories[repository].refs["main"]
        hub.repositories[repository].commit({damaged: b"12345678"})
    both = ["--revision", "v1", "--base", "org/model", "--base-revision", "v1"]
    assert main(["plan", "org/model", "--revision", "v1", "--r", "4"]) == 0
    for command in (["inspect"], ["verify"], ["merge", "merged"], ["convert", "out", "--to", "native"]):
        name, *more = command
        assert main([name, "user/adapter", *more, *both]) == 0
        assert main([name, "user/adapter", *more, *both, "--revision", "main"]) == 1
        assert main([name, "user/adapter", *more, *both, "--base-revision", "main"]) == 1
    assert randlora.files.training_memory("org/model", 4, revision="v1") == randlora.files.training_memory(base, 4)


def test_a_revision_without_a_repository_is_an_error_before_anything_is_downloaded(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    put(hub, "org/model", save_model(LLAMA, Path("base")))
    save_adapter(LLAMA, Path("adapter"))
    for words in (["plan", "base"], ["verify", "adapter"], ["merge", "adapter", "out", "--base", "org/model"]):
        assert main([*words, "--revision", "v1"]) == 1
        assert "a path has no revision, got 'v1' for '" in capsys.readouterr().err
    assert main(["inspect", "adapter", "--base-revision", "v1"]) == 2
    assert capsys.readouterr().err == "error: --base-revision is for a base model: give --base too\n"
    assert hub.requests == []


def file_of(**tensors: Any) -> dict[str, bytes]:
    text = json.dumps(tensors).encode()
    return {"model.safetensors": len(text).to_bytes(8, "little") + text}


def test_what_headers_do_not_tell_is_an_error_that_names_it(hub: Hub) -> None:
    coded = contents(quantize(LLAMA, "nf4", Path("base")))
    unread: dict[str, dict[str, bytes]] = {
        "no such file": {},
        "the header of model.safetensors": {"model.safetensors": b"12345678"},
        "expected 8": file_of(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}),
        "integers": file_of(a={"dtype": "F32", "shape": [2.0], "data_offsets": [0, 4]}),
        "has dtype F3": file_of(a={"dtype": "F3", "shape": [2], "data_offsets": [0, 4]}),
        "an unnamed method": file_of() | {"config.json": b'{"quantization_config": {}}'},
        "cannot be read without its model: its config.json names no class": coded | {"config.json": b"{}"},
        "cannot be read without its model: its config.json names None": coded
        | {"config.json": b'{"architectures": ["NoneForCausalLM"]}'},
    }
    for number, (message, files) in enumerate(unread.items()):
        hub.repositories[f"org/{number}"] = Repository()
        hub.repositories[f"org/{number}"].commit({"config.json": b"{}", **files})
        with pytest.raises(CheckpointError, match=message):
            randlora.files.plan(f"org/{number}", r=4)


def test_a_name_that_is_neither_here_nor_on_the_hub_and_a_directory_that_is_missing_are_said(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(LLAMA, Path("adapter"))
    said = {"org/model": "there is no such path, and the Hub's repository 'org/model'", "x": "no such directory: x\n"}
    for name, message in said.items():
        for words in (["plan", name], ["verify", "adapter", "--base", name], ["verify", name]):
            assert main(words) == 1
            assert message in capsys.readouterr().err

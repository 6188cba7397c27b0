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
from tests.quantized import quantize

BASE, ADAPTER = Path("base"), Path("adapter")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client talks to, with ``tmp_path`` as the directory that it works in."""
    keep_client_in(tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as running:
        point_client_at(running.url, monkeypatch)
        yield running


def put(hub: Hub, repo_id: str, files: dict[str, bytes]) -> Repository:
    """Make a repository of files."""
    hub.repositories[repo_id] = Repository()
    hub.repositories[repo_id].commit(files)
    return hub.repositories[repo_id]


@pytest.mark.parametrize("layout", ["one file", "sharded", "nf4 twice", "8 bits"])
def test_a_plan_reads_headers_and_no_weights(hub: Hub, layout: str) -> None:
    is_dense = layout in ("one file", "sharded")
    if is_dense:
        save_model(LLAMA, BASE, is_sharded=layout == "sharded")
    else:
        quantize(LLAMA, layout, BASE, is_sharded=True)
    repository = put(hub, "org/model", contents(BASE))
    if layout == "one file":
        repository.commit({"model.safetensors": repository.files()["model.safetensors"] + bytes(10**6)})
    options: dict[str, Any] = {"r": 4, "tokens": 100}
    plan, memory = randlora.files.plan("org/model", r=4), randlora.files.training_memory("org/model", **options)
    assert plan == randlora.files.plan(BASE, r=4)
    assert str(memory) == str(randlora.files.training_memory(BASE, **options))
    assert 0 < hub.sent < 5 * 10**5
    if not is_dense:
        with pytest.raises(CheckpointError, match=r"cannot merge into 'org/model', which is quantized"):
            randlora.files.merge(save_adapter(LLAMA, ADAPTER), "merged", base="org/model")
    cached = {path.name for path in Path("cache").rglob("*") if path.is_symlink()}
    assert not any(name.endswith(".safetensors") for name in cached)


def test_a_merge_downloads_both_and_equals_that_of_directories(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(LLAMA, BASE, is_sharded=True)
    other = {"pytorch_model.bin": b"large", "consolidated.safetensors": b"large", "tokenizer.json": b"{}"}
    put(hub, "org/model", contents(BASE) | other)
    put(hub, "user/adapter", contents(save_adapter(LLAMA, ADAPTER)))
    (BASE / "tokenizer.json").write_bytes(b"{}")
    report = randlora.files.merge({"user/adapter": 0.5}, "merged", base="org/model")
    assert hub.requests.count("GET /api/models/user/adapter/revision/main") == 1
    assert not [request for request in hub.requests if "consolidated" in request or ".bin" in request]
    expected = randlora.files.merge({ADAPTER: 0.5}, "expected", base=BASE)
    assert contents(Path("merged")) == contents(Path("expected"))
    assert report == replace(expected, out=Path("merged"), adapters={"user/adapter": 0.5})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert randlora.files.plan("org/model", r=4) == randlora.files.plan(BASE, r=4)


def test_every_command_takes_revisions_of_adapter_and_base(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, "org/model", contents(save_model(LLAMA, BASE)))
    put(hub, "user/adapter", contents(save_adapter(LLAMA, ADAPTER)))
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
    assert randlora.files.training_memory("org/model", 4, revision="v1") == randlora.files.training_memory(BASE, 4)


def test_what_is_nowhere_and_a_revision_of_a_path_are_said(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, "org/model", contents(save_model(LLAMA, BASE)))
    save_adapter(LLAMA, ADAPTER)
    for words in (["plan", "base"], ["verify", "adapter"], ["merge", "adapter", "out", "--base", "org/model"]):
        assert main([*words, "--revision", "v1"]) == 1
        assert "a path has no revision, got 'v1' for '" in capsys.readouterr().err
    assert main(["inspect", "adapter", "--base-revision", "v1"]) == 2
    assert capsys.readouterr().err == "error: --base-revision is for a base model: give --base too\n"
    assert hub.requests == [], "before anything is downloaded"
    said = {"org/none": "there is no such path, and the Hub's repository 'org/none'", "x": "no such directory: x\n"}
    for name, message in said.items():
        for words in (["plan", name], ["verify", "adapter", "--base", name], ["verify", name]):
            assert main(words) == 1
            assert message in capsys.readouterr().err


def file_of(**tensors: Any) -> dict[str, bytes]:
    text = json.dumps(tensors).encode()
    return {"model.safetensors": len(text).to_bytes(8, "little") + text}


def test_what_headers_do_not_tell_is_an_error_that_names_it(hub: Hub) -> None:
    coded = contents(quantize(LLAMA, "nf4", BASE))
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
        put(hub, f"org/{number}", {"config.json": b"{}", **files})
        with pytest.raises(CheckpointError, match=message):
            randlora.files.plan(f"org/{number}", r=4)

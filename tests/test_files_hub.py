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

sharded = pytest.mark.parametrize("is_sharded", [False, True])


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


@sharded
def test_a_plan_reads_headers_and_no_weights(hub: Hub, is_sharded: bool) -> None:
    base = save_model(LLAMA, Path("base"), is_sharded=is_sharded)
    put(hub, "org/model", base)
    assert randlora.files.plan("org/model", r=4) == randlora.files.plan(base, r=4)
    options: dict[str, Any] = {"r": 4, "tokens": 100}
    found = randlora.files.training_memory("org/model", **options)
    assert str(found) == str(randlora.files.training_memory(base, **options))
    cached = {path.name for path in Path("cache").rglob("*") if path.is_symlink()}
    assert cached <= {"config.json", "model.safetensors.index.json"}


def test_a_plan_of_a_large_model_takes_little(hub: Hub) -> None:
    base = save_model(LLAMA, Path("base"))
    put(hub, "org/model", base)
    file = hub.repositories["org/model"].files()["model.safetensors"]
    length = 8 + int.from_bytes(file[:8], "little")
    hub.repositories["org/model"].commit({"model.safetensors": file + bytes(10**6)})
    randlora.files.plan("org/model", r=4)
    assert length <= hub.sent < 2 * 10**5


def test_a_model_in_the_cache_is_not_asked_for_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model(LLAMA, Path("base"), is_sharded=True)
    put(hub, "org/model", base)
    save_adapter(LLAMA, Path("adapter"))
    randlora.files.merge("adapter", "merged", base="org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert randlora.files.plan("org/model", r=4) == randlora.files.plan(base, r=4)


@sharded
def test_a_merge_downloads_both_and_equals_that_of_directories(hub: Hub, is_sharded: bool) -> None:
    base = save_model(LLAMA, Path("base"), is_sharded=is_sharded)
    adapter = save_adapter(LLAMA, Path("adapter"))
    other = {"pytorch_model.bin": b"large", "consolidated.safetensors": b"large", "tokenizer.json": b"{}"}
    put(hub, "org/model", base, **other)
    put(hub, "user/adapter", adapter)
    (base / "tokenizer.json").write_bytes(b"{}")
    report = randlora.files.merge({"user/adapter": 0.5}, "merged", base="org/model")
    expected = randlora.files.merge({adapter: 0.5}, "expected", base=base)
    assert contents(Path("merged")) == contents(Path("expected"))
    assert report == replace(expected, out=Path("merged"), adapters={"user/adapter": 0.5})
    assert not [request for request in hub.requests if "large" in request or ".bin" in request]


def test_an_adapter_is_verified_inspected_and_converted(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, "org/model", save_model(LLAMA, Path("base")))
    put(hub, "user/adapter", save_adapter(LLAMA, Path("adapter")))
    assert main(["verify", "user/adapter", "--base", "org/model"]) == 0
    shown = capsys.readouterr().out
    assert "passed: base: org/model has all" in shown
    assert shown.endswith("user/adapter is sound\n")
    assert main(["inspect", "user/adapter", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["directory"] == "user/adapter"
    assert main(["convert", "user/adapter", "out", "--to", "peft"]) == 0
    assert Path("out", "adapter_model.safetensors").exists()
    assert main(["merge", "user/adapter", "merged", "--base", "org/model"]) == 0
    assert "merged user/adapter into" in capsys.readouterr().out
    assert main(["plan", "org/model", "--r", "4"]) == 0


def test_a_revision_is_that_of_the_adapter_and_another_that_of_the_base(hub: Hub) -> None:
    base = save_model(LLAMA, Path("base"))
    put(hub, "org/model", base)
    put(hub, "user/adapter", save_adapter(LLAMA, Path("adapter")))
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


def test_a_revision_without_a_repository_is_an_error(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(LLAMA, Path("base"))
    save_adapter(LLAMA, Path("adapter"))
    for words in (["plan", "base"], ["verify", "adapter"], ["merge", "adapter", "out", "--base", "base"]):
        assert main([*words, "--revision", "v1"]) == 1
        assert "error: a path has no revision, got 'v1' for '" in capsys.readouterr().err.replace(
            "cannot merge 'adapter': ", ""
        )
    assert main(["inspect", "adapter", "--base-revision", "v1"]) == 2
    assert capsys.readouterr().err == "error: --base-revision is for a base model: give --base too\n"


def test_no_base_is_downloaded_for_an_adapter_that_cannot_be_had(hub: Hub) -> None:
    put(hub, "org/model", save_model(LLAMA, Path("base")))
    save_adapter(LLAMA, Path("adapter"))
    with pytest.raises(CheckpointError, match="a path has no revision"):
        randlora.files.merge("adapter", "merged", base="org/model", revision="v1")
    assert hub.requests == []


def test_verify_asks_for_a_base_once(hub: Hub) -> None:
    put(hub, "org/model", save_model(LLAMA, Path("base"), is_sharded=True))
    randlora.files.verify(save_adapter(LLAMA, Path("adapter")), "org/model")
    assert hub.requests.count("GET /api/models/org/model/revision/main") == 1


def test_merge_asks_for_an_adapter_once(hub: Hub) -> None:
    put(hub, "user/adapter", save_adapter(LLAMA, Path("adapter")))
    randlora.files.merge("user/adapter", "merged", base=save_model(LLAMA, Path("base")))
    assert hub.requests.count("GET /api/models/user/adapter/revision/main") == 1


@pytest.mark.parametrize("quantization", ["nf4 twice", "8 bits"])
def test_a_plan_of_a_quantized_model_reads_headers_alone(hub: Hub, quantization: str) -> None:
    base = quantize(LLAMA, quantization, Path("base"), is_sharded=True)
    put(hub, "org/model", base)
    assert randlora.files.plan("org/model", r=4) == randlora.files.plan(base, r=4)
    assert randlora.files.training_memory("org/model", 4) == randlora.files.training_memory(base, 4)
    assert not list(Path("cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "cannot be read without its model: its config.json names no class"),
        ({"architectures": ["NoneForCausalLM"]}, "cannot be read without its model: its config.json names None"),
    ],
    ids=["none", "unknown"],
)
def test_codes_of_which_no_class_says_the_shapes_are_refused(hub: Hub, config: dict[str, Any], message: str) -> None:
    put(hub, "org/model", quantize(LLAMA, "nf4", Path("base")), **{"config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match=message):
        randlora.files.plan("org/model", r=4)


def test_a_quantized_model_is_not_downloaded_to_be_merged_into(hub: Hub) -> None:
    put(hub, "org/model", quantize(LLAMA, "nf4", Path("base")))
    adapter = save_adapter(LLAMA, Path("adapter"))
    with pytest.raises(CheckpointError, match=r"cannot merge into 'org/model', which is quantized \(nf4\)"):
        randlora.files.merge(adapter, "merged", base="org/model")
    assert not list(Path("cache").rglob("*.safetensors"))


def edited(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file"),
        ({"model.safetensors": b"12345678"}, "the header of model.safetensors"),
        ({"model.safetensors": edited({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})}, "expected 8"),
        ({"model.safetensors": edited({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 4]}})}, "integers"),
        ({"model.safetensors": edited({"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 4]}})}, "has dtype F3"),
        (
            {"model.safetensors": edited({}), "config.json": b'{"quantization_config": {}}'},
            "an unnamed method",
        ),
    ],
    ids=["none", "short", "size", "fraction", "dtype", "quantized"],
)
def test_what_headers_do_not_tell_is_an_error_that_names_it(hub: Hub, files: dict[str, bytes], message: str) -> None:
    hub.repositories["org/model"] = Repository()
    hub.repositories["org/model"].commit({"config.json": b"{}", **files})
    with pytest.raises(CheckpointError, match=message):
        randlora.files.plan("org/model")


def test_a_name_that_is_neither_here_nor_on_the_hub(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(LLAMA, Path("adapter"))
    for words in (["plan", "org/model"], ["verify", "adapter", "--base", "org/model"], ["verify", "org/model"]):
        assert main(words) == 1
        assert "there is no such path, and the Hub's repository 'org/model'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["plan", "x"], ["verify", "x"], ["verify", "adapter", "--base", "x"]])
def test_a_directory_that_is_missing_is_said_to_be(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(LLAMA, Path("adapter"))
    assert main(words) == 1
    assert capsys.readouterr() == ("", "error: no such directory: x\n")

"""More adapters than a model holds: they are there when they are asked for, and rows are those of each alone."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import randlora
from randlora.errors import AdapterError, CheckpointError, ConfigError
from randlora.serving import AdapterPool, routed
from tests.kit import WAIT, adapt, untouched
from tests.laws import assert_close

NAMES = tuple("abcdef")
X = torch.linspace(-1, 1, 18).view(3, 6)
FILE = "adapter_model.safetensors"


def plain() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outputs of adapters alone by name, and under ``"files"`` a directory of their directories."""
    files, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(NAMES):
        model = plain()
        found[name] = adapt(model, values=seed, spread=0.5, r=3, targets="all-linear", stream="portable")(X).detach()
        randlora.save(model, files / name)
    return {**found, "files": files}


def assert_rows(pool: AdapterPool, model: nn.Module, outputs: dict[str, Any], *names: str | None) -> None:
    base = plain()(X).detach()
    with pool.routed(names):
        found = model(X)
    expected = [(base if name is None else outputs[name])[row] for row, name in enumerate(names)]
    assert_close(found, torch.stack(expected), torch.float32)


def refused(pool: AdapterPool, verb: str, names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(pool, verb)(names).__enter__()


def test_adapters_are_loaded_when_they_are_asked_for_and_the_oldest_go_first_but_no_bases(
    outputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read, pools = plain(), list[Path](), sys.modules["randlora.serving.pool"]
    reading: Any = vars(pools)["read_source"]

    def noted(source: Path) -> Any:
        read.append(source)
        return reading(source)

    monkeypatch.setattr(pools, "read_source", noted)
    pool = AdapterPool(model, outputs["files"], max_loaded=3)
    assert pool.names == NAMES
    assert randlora.adapters(model) == []
    expected = [
        (("a", "b", None), ("a", "b"), "ab"),
        (("b", "a", "b"), ("b", "a"), ""),
        (("c", "a", "c"), ("b", "c", "a"), "c"),
        (("d", "d", None), ("c", "a", "d"), "d"),
        (("a", "b", "e"), ("a", "b", "e"), "be"),
        ((None, None, None), ("a", "b", "e"), ""),
        (("f", "f", "f"), ("b", "e", "f"), "f"),
    ]
    for names, loaded, missing in expected:
        read.clear()
        assert_rows(pool, model, outputs, *names)
        monkeypatch.setattr("randlora.bases.basis.KINDS", {})  # no more can be drawn
        assert pool.loaded == loaded
        assert {each.name for each in randlora.adapters(model)} == set(loaded)
        assert [source.name for source in read] == [*missing]


def test_no_adapter_is_removed_while_it_is_in_use(outputs: dict[str, Any]) -> None:
    model = plain()
    pool = AdapterPool(model, outputs["files"], max_loaded=3)
    with pool.routed(["a", "a", "a"]):
        for name in "bcdef":
            assert_rows(pool, model, outputs, name, name, None)
            assert "a" in pool.loaded
        assert_rows(pool, model, outputs, "b", "a", "c")
        assert_close(model(X), outputs["a"], torch.float32)
        message = "4 adapters are asked for at once, and the pool loads 3"
        with untouched(model):
            refused(pool, "routed", ["b", "c", "d"], AdapterError, message)
        with pool.routed(["e", "b", None]):
            refused(pool, "using", "c", AdapterError, message)
    assert_rows(pool, model, outputs, "b", "c", "d")
    assert "a" not in pool.loaded


TOO_MANY = "3 adapters are asked for at once, and the pool loads 2: raise max_loaded"
NO_NAMES: list[Any] = [3, None, [[]]]
REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("routed", [*"abc"], AdapterError, TOO_MANY),
    ("routed", ["a", "g", None], AdapterError, "the pool has no adapter named 'g'; the nearest are"),
    ("using", ["z"], AdapterError, "the pool has no adapter named 'z'"),
    ("routed", [], AdapterError, "expected for each row the name of an adapter"),
    ("routed", "abc", AdapterError, "expected for each row the name of an adapter"),
    *(("using", names, TypeError, "is not iterable|unhashable") for names in NO_NAMES),
    ("using", [1], AdapterError, "the pool has no adapter named 1"),
]
OPTIONS: list[tuple[Any, Any, type[Exception], str]] = [
    ({}, 0, ConfigError, "max_loaded must be at least 1, got 0"),
    ({}, "3", ConfigError, "max_loaded must be an integer, got '3'"),
    ({1: "a"}, 2, ConfigError, "a name in sources must be a string, got 1"),
    (None, 2, ConfigError, "sources must be"),
    ("nowhere", 2, CheckpointError, "'nowhere' has no adapters: expected directories with adapter_model"),
]


def test_what_a_pool_cannot_do_is_refused_before_anything_is_loaded(outputs: dict[str, Any]) -> None:
    model = plain()
    pool = AdapterPool(model, outputs["files"], max_loaded=2)
    for names in ("a", [1, 2, 3], None, []):  # before there is any adapter
        refused(pool, "routed", names, AdapterError, "expected for each row the name of an adapter or None")
    assert_rows(pool, model, outputs, "d", "e", "d")
    before = pool.loaded
    with untouched(model):
        for verb, names, error, message in REFUSED:
            refused(pool, verb, names, error, message)
        for sources, max_loaded, error, message in OPTIONS:
            with pytest.raises(error, match=message):
                AdapterPool(model, sources, max_loaded=max_loaded)
    assert pool.loaded == before


@pytest.mark.parametrize("damage", ["cut", "another model's", "gone"])
def test_a_load_that_fails_leaves_model_and_pool_and_names_the_file(
    damage: str, outputs: dict[str, Any], tmp_path: Path
) -> None:
    files = shutil.copytree(outputs["files"], tmp_path / "adapters")
    model, first = plain(), plain()
    pool = AdapterPool(model, files, max_loaded=3)
    assert_rows(pool, model, outputs, "a", "b", "c")
    if damage == "cut":
        (files / "e" / FILE).write_bytes((files / "e" / FILE).read_bytes()[:-4])
    elif damage == "gone":
        (files / "e" / FILE).unlink()
    else:
        other = nn.Sequential(nn.Linear(6, 8))
        randlora.inject(other, r=3)
        randlora.save(other, files / "e")
    before, sources = pool.loaded, {name: files / name for name in "de"}
    with untouched(model), untouched(first):
        refused(pool, "routed", ["a", "d", "e"], CheckpointError, str(files / "e"))
        refused(AdapterPool(first, sources, max_loaded=3), "using", ["d", "e"], CheckpointError, str(files / "e"))
    assert pool.loaded == before
    shutil.copytree(outputs["files"] / "e", files / "e", dirs_exist_ok=True)
    assert_rows(pool, model, outputs, "a", "d", "e")


def test_threads_take_turns_and_each_row_is_its_own(outputs: dict[str, Any]) -> None:
    model = plain()
    pool = AdapterPool(model, outputs["files"], max_loaded=3)

    def serve(start: int) -> None:
        asked = [[NAMES[(start + step * each) % len(NAMES)] for each in (1, 2, 3)] for step in range(6)]
        for names in asked:
            assert_rows(pool, model, outputs, *names)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(serve, range(4), timeout=WAIT))
    assert {info.name for info in randlora.adapters(model)} == {*pool.loaded}


def test_adapters_of_the_model_itself_are_left_alone(outputs: dict[str, Any]) -> None:
    model = plain()
    own = adapt(model, spread=0.5, r=3, targets=["0"], name="own", stream="portable")(X)
    pool = AdapterPool(model, {name: outputs["files"] / name for name in "abc"}, max_loaded=1)
    for name in "abca":
        assert_rows(pool, model, outputs, name, name, None)
        assert torch.equal(model(X), own)
    with routed(model, ["own", "a", None]):
        model(X)
    randlora.inject(model, r=2, name="b")
    with untouched(model):
        refused(pool, "using", ["b"], AdapterError, "the model has an adapter of that name")
    randlora.remove(model, "a")  # behind the pool's back
    assert_rows(pool, model, outputs, "a", None, "a")
    randlora.remove(model, "a")
    randlora.inject(model, r=2, name="a")
    refused(pool, "routed", ["a", None, "a"], AdapterError, "the model has an adapter of that name")
    assert_rows(pool, model, outputs, "c", None, "c")
    assert [each.name for each in randlora.adapters(model)] == ["own", "b", "a", "c"]


def test_what_routed_cannot_take_is_used_by_other_means(tmp_path: Path) -> None:
    expected = {}
    for seed, name in enumerate("ab"):
        model = plain()
        adapt(model, values=seed, spread=0.5, r=3, targets=["0"], train_also=["2"], stream="portable")
        expected[name] = model(X).detach()
        randlora.save(model, tmp_path / name)
    model = plain()
    pool = AdapterPool(model, tmp_path, max_loaded=1)
    for name in "abba":
        with pool.using(name):
            randlora.activate(model, name)
            assert torch.equal(model(X), expected[name])
        with untouched(model):
            refused(pool, "routed", [name] * 3, AdapterError, rf"{name!r} trained 2.weight, 2.bias with train_also")


def test_sources_are_directories_read_again_for_a_new_name_and_states(outputs: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(outputs["files"] / "a", tmp_path / "a")
    (tmp_path / ".b.unfinished-12345678").mkdir()
    (tmp_path / ".b.unfinished-12345678" / FILE).touch()
    model, loaded, other = plain(), plain(), plain()
    pool = AdapterPool(model, str(tmp_path), max_loaded=2)
    assert list(pool.names) == ["a"]
    shutil.copytree(outputs["files"] / "b", tmp_path / "b")
    assert_rows(pool, model, outputs, "a", "b", None)
    shutil.copytree(outputs["files"] / "c", tmp_path / "c")
    assert list(pool.names) == ["a", "b", "c"]
    randlora.load(loaded, outputs["files"] / "b")
    states = {"one": outputs["files"] / "a", "two": randlora.adapter_state(loaded)}
    refused(AdapterPool(other, states, max_loaded=2), "using", ["a"], AdapterError, "no adapter named 'a'")
    with AdapterPool(other, states, max_loaded=2).routed(["one", "two", None]):
        found = other(X)
    assert_close(found[:2], torch.stack([outputs["a"][0], outputs["b"][1]]), torch.float32)

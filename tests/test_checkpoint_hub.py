"""The Hub: adapters pushed to a small one on this machine and loaded from it, by huggingface_hub's own client."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import randlora
from randlora.errors import CheckpointError, how_to_install
from tests.checkpoint_files import CARD_FILE, CONFIG_FILE, HEADED, LINEAR, TENSORS_FILE, Case, refused, trained
from tests.hub_server import Hub, Repository, keep_client_in, point_client_at, running_hub
from tests.kit import adapter_values, all_bits, fill, untouched

NOBODY = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_client_in(tmp_path, monkeypatch)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that the client talks to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as running:
        point_client_at(running.url, monkeypatch)
        yield running


@pytest.fixture
def pushed(hub: Hub, tmp_path: Path) -> Hub:
    """A Hub that holds an adapter of ``HEADED`` in ``user/repo``."""
    randlora.save(trained(HEADED), tmp_path / "pushed", push_to_hub="user/repo")
    return hub


def loads(name: str, case: Case, **options: Any) -> str:
    """Load what was saved of a case's model into a fresh one, to the same bits, and return the rule of the report."""
    twin = case.build()
    report = randlora.load(twin, name, **options)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(case)))
    return report.rule


def test_only_the_two_files_are_downloaded(pushed: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits, and what was loaded once loads while the Hub is away, and asks for nothing offline."""
    assert set(pushed.repositories) == {"user/repo"}
    pushed.repositories["user/repo"].commit({"optimizer.pt": b"large"})
    assert loads("user/repo", HEADED) == "the names in user/repo"
    (directory,) = (tmp_path / "cache" / "models--user--repo" / "snapshots").iterdir()
    assert {path.name for path in directory.iterdir()} == {CONFIG_FILE, TENSORS_FILE}
    pushed.requests.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for revision in (None, "main", directory.name):
            loads("user/repo", HEADED, revision=revision)
    point_client_at(NOBODY, monkeypatch)
    loads("user/repo", HEADED)
    assert pushed.requests == []


def test_a_push_uploads_what_the_directory_holds_of_the_adapter_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """A second one replaces the first, which its commit still names."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "optimizer.pt").write_bytes(b"large")
    report = randlora.save(trained(LINEAR), tmp_path / "out", push_to_hub="user/repo")
    found = hub.repositories["user/repo"].files()
    assert set(found) == {".gitattributes", CARD_FILE, CONFIG_FILE, TENSORS_FILE}
    assert all(found[name] == (tmp_path / "out" / name).read_bytes() for name in set(found) - {".gitattributes"})
    assert report.url == f"{hub.url}/user/repo"
    assert str(report).splitlines()[1] == f"pushed to {hub.url}/user/repo"
    assert '"user/repo"' in found[CARD_FILE].decode()
    first = hub.repositories["user/repo"].refs["main"]
    randlora.save(trained(HEADED), tmp_path / "other", push_to_hub="user/repo")
    loads("user/repo", HEADED)
    assert loads("user/repo", LINEAR, revision=first) == f"the names in user/repo at {first}"


def test_a_card_that_somebody_wrote_survives_a_push_and_ones_own_wins(pushed: Hub, tmp_path: Path) -> None:
    """In the repository, then in both places, then here, over a generated card."""
    repository, note = pushed.repositories["user/repo"], "README.md of user/repo is not a generated card, so it stays"
    generated = repository.files()[CARD_FILE]
    for here, there in ((None, b"# There"), (b"# Here", b"# There"), (b"# Here", generated)):
        repository.commit({CARD_FILE: there})
        if here:
            (tmp_path / "pushed" / CARD_FILE).write_bytes(here)
        report = randlora.save(trained(HEADED, r=3), tmp_path / "pushed", push_to_hub="user/repo")
        assert (note in report.notes) == (here is None)
        assert repository.files()[CARD_FILE] == (here or there)
        assert repository.files()[TENSORS_FILE] == (tmp_path / "pushed" / TENSORS_FILE).read_bytes()


def test_several_adapters_are_pushed_in_one_commit_and_loaded_together_or_one_by_one(hub: Hub, tmp_path: Path) -> None:
    model, twin, one = trained(HEADED), HEADED.build(), HEADED.build()
    randlora.inject(model, r=3, targets=["0"], name="a")
    reports = randlora.save_all(fill(model, "a", seed=4), tmp_path / "out", push_to_hub="user/repo")
    assert [report.url for report in reports] == [f"{hub.url}/user/repo"] * 2
    found = hub.repositories["user/repo"].files()
    names = {f"{folder}{file}" for folder in ("", "a/") for file in (CARD_FILE, CONFIG_FILE, TENSORS_FILE)}
    assert set(found) == {".gitattributes", *names}
    assert 'randlora.load(model, "user/repo")' in found[CARD_FILE].decode()
    assert 'randlora.load(model, "user/repo", subfolder="a")' in found[f"a/{CARD_FILE}"].decode()
    assert [report.name for report in randlora.load_all(twin, "user/repo")] == ["default", "a"]
    assert randlora.load(one, "user/repo", subfolder="a", name="a").rule == "the names in a of user/repo"
    for each, name in ((twin, "default"), (twin, "a"), (one, "a")):
        assert all_bits(adapter_values(each, name)) == all_bits(adapter_values(model, name))
    swapped = fill(trained(HEADED), seed=5)
    randlora.swap(swapped, "user/repo")
    assert all_bits(adapter_values(swapped)) == all_bits(adapter_values(model))


REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("user/none", {}, "cannot load 'user/none': there is no such path, and the Hub's repository"),
    ("user/none", {}, "check its name; if it is private, log in with `hf auth login` (RepositoryNotFoundError"),
    ("user/gated", {}, "it is gated: ask for access on its page, then log in with `hf auth login` (GatedRepo"),
    ("user/repo", {"revision": "v9"}, "it has no such revision: name a branch, a tag or a commit of it (RevisionNot"),
    ("user/empty", {}, f"has no {CONFIG_FILE} and no {TENSORS_FILE}: name a different repository"),
    ("user/repo", {"subfolder": "b"}, f"has no b/{CONFIG_FILE} and no b/{TENSORS_FILE}"),
    ("user/a--b", {}, "the Hub does not allow such a name (HFValidationError"),
)


def test_what_the_hub_refuses_is_said_with_what_to_do(pushed: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("user/gated", "user/empty"):
        pushed.repositories[other] = Repository()
        pushed.repositories[other].commit({"optimizer.pt": b"large"})
    pushed.gated.add("user/gated")
    for name, options, message in REFUSED:
        refused(HEADED.build(), name, message, **options)
    with pytest.raises(CheckpointError, match=r"cannot load 'user/empty': .* has no adapters"):
        randlora.load_all(HEADED.build(), "user/empty")
    pushed.requests.clear()
    point_client_at(NOBODY, monkeypatch)
    for is_offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        refused(LINEAR.build(), "user/new", "it is not in the cache: check the connection, and HF_HUB_OFFLINE")
    assert pushed.requests == []


def test_a_push_that_fails_leaves_the_save_whole(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.writable = False
    for number, said in enumerate(("with `hf auth login`, with a token that has", "the connection", "the connection")):
        out = tmp_path / str(number)
        message = rf"saved to '{out}' completely, but cannot push to 'user/repo': .*{said}"
        with pytest.raises(CheckpointError, match=message):
            randlora.save(trained(LINEAR), out, push_to_hub="user/repo")
        loads(str(out), LINEAR)
        assert (out / CARD_FILE).is_file()
        point_client_at(NOBODY, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", number == 1)


def test_a_push_to_no_repository_or_without_huggingface_hub_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = trained(LINEAR), tmp_path / "out"
    names: tuple[Any, ...] = ("repo", "a/b/c", "../repo", "/user/repo", "", 7)
    with untouched(model):
        for name in names:
            with pytest.raises(CheckpointError, match="push_to_hub must be a repository on the Hub, 'user/repo', got"):
                randlora.save(model, out, push_to_hub=name)
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # Python's own way to say that there is no such
        with pytest.raises(CheckpointError, match=re.escape(how_to_install("hub"))):
            randlora.save(model, out, push_to_hub="user/repo")
    refused(LINEAR.build(), "user/repo", how_to_install("hub"))
    assert not out.exists()

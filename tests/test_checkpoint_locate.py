"""What `load` may be pointed at: a directory, one file, or a name that is no path."""

from pathlib import Path

import pytest

import randlora
from tests.checkpoint_files import (
    CONFIG_FILE,
    HEADED,
    LINEAR,
    TENSORS_FILE,
    refused,
    trained,
)
from tests.kit import adapter_values, all_bits


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an adapter of ``HEADED``, two levels below the working directory."""
    randlora.save(trained(HEADED), tmp_path / "user" / "repo")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "user" / "repo"


@pytest.mark.parametrize(
    "place", ["user/repo", "user/repo/", "./user/repo", f"user/repo/{TENSORS_FILE}", f"./user/repo/{TENSORS_FILE}"]
)
@pytest.mark.parametrize("kind", [str, Path], ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("saved")
def test_a_path_that_exists_is_loaded_whatever_it_looks_like(place: str, kind: type[str] | type[Path]) -> None:
    twin = HEADED.build()
    randlora.load(twin, kind(place))
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(HEADED)))


def test_the_file_alone_is_loaded_from_its_own_directory(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    twin = HEADED.build()
    randlora.load(twin, TENSORS_FILE)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(HEADED)))


def test_another_file_of_the_directory_is_refused(saved: Path) -> None:
    refused(HEADED.build(), saved / CONFIG_FILE, f"expected a directory, or the file {TENSORS_FILE} in one")


def test_the_file_of_tensors_is_enough_and_it_is_said(saved: Path, tmp_path: Path) -> None:
    alone, twin = (saved / TENSORS_FILE).rename(tmp_path / TENSORS_FILE), HEADED.build()
    with pytest.warns(UserWarning, match=f"there is no {CONFIG_FILE}"):
        randlora.load(twin, alone)
    assert all_bits(adapter_values(twin)) == all_bits(adapter_values(trained(HEADED)))
    refused(HEADED.build(), saved, f"{TENSORS_FILE}: only safetensors files are read")


@pytest.mark.parametrize("place", ["user/repo", f"user/repo/{TENSORS_FILE}", "./nowhere", "nowhere", "a/b/c"])
@pytest.mark.usefixtures("saved")
def test_a_path_has_no_revision(place: str) -> None:
    refused(HEADED.build(), place, "a path has no revision, got 'main'", revision="main")


@pytest.mark.parametrize("place", ["nowhere", "./no/where", "/no/where", "a/b/c", "../a/b", "~/a"])
@pytest.mark.usefixtures("saved")
def test_a_name_that_is_neither_path_nor_repository_is_refused(place: str) -> None:
    refused(LINEAR.build(), place, f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}")


@pytest.mark.usefixtures("saved")
def test_a_path_object_never_means_a_repository() -> None:
    refused(LINEAR.build(), Path("user/none"), f"expected a directory with {CONFIG_FILE} and {TENSORS_FILE}")

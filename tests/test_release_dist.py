"""What is wrong in a release is found: changelog, version, metadata, license, what is installed."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.pages import ROOT
from tests.release import bump, changelog
from tests.release.installed import differing, imports
from tests.release.metadata import contents, problems

INFO = "randlora-1.0.dist-info/"
METADATA = b"""\
Metadata-Version: 2.4
Name: randlora
Version: 1.0
License-Expression: Apache-2.0
License-File: LICENSE
Description-Content-Type: text/markdown

# randlora
"""
WHEEL = {"randlora/py.typed": b"", f"{INFO}METADATA": METADATA, f"{INFO}licenses/LICENSE": b"Do as you like."}
SDIST = {"PKG-INFO": METADATA, "LICENSE": b"Do as you like.", "tests/test_release.py": b""}
CHANGES = (
    "# Changelog\n\n## [Unreleased]\n\n## [1.0] - 2026-01-31\n\n### Added\n- All.\n\n## [0.1] - 2025-01-31\n- Some.\n"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("# randlora\n", encoding="utf-8")
    (tmp_path / "LICENSE").write_text("Do as you like.", encoding="utf-8")
    return tmp_path


def test_the_text_of_a_release_is_its_section_of_the_changelog() -> None:
    assert changelog.notes(CHANGES, "1.0") == "### Added\n- All."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[Unreleased]", "[Next]", "does not begin with"),
        (" - 2026-01-31", "", "no section"),
        ("2026-01-31", "soon", "no section"),
        ("[1.0]", "[1.1]", "no section"),
        ("### Added\n- All.\n", "", "says nothing"),
    ],
    ids=["nothing unreleased", "no date", "another date", "another version", "empty"],
)
def test_a_changelog_without_the_version_is_an_error(old: str, new: str, message: str) -> None:
    assert old in CHANGES
    with pytest.raises(ValueError, match=message):
        changelog.notes(CHANGES.replace(old, new), "1.0")


def test_a_tag_of_another_version_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert changelog.main("v0.0.1") == 1
    assert "got v0.0.1" in capsys.readouterr().err


def test_a_bump_is_all_that_a_release_needs() -> None:
    files = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    }
    change = "## [Unreleased]\n\n### Fixed\n- A fault.\n\n"  # just after a release there is none
    files["CHANGELOG.md"] = files["CHANGELOG.md"].replace("## [Unreleased]\n\n", change)
    changed = bump.bumped(files, "987.6", "2026-01-31")
    assert '\nversion = "987.6"\n' in changed["pyproject.toml"]
    assert "\nversion: 987.6\n" in changed["CITATION.cff"]
    assert changelog.notes(changed["CHANGELOG.md"], "987.6").startswith("### ")
    assert [text.count("987.6") for text in changed.values()] == [1, 1, 1]


def test_a_bump_of_a_file_without_a_version_is_an_error() -> None:
    files = {"pyproject.toml": 'version = "1.0"\n', "CITATION.cff": "title: randlora\n", "CHANGELOG.md": CHANGES}
    with pytest.raises(ValueError, match=r"CITATION\.cff: expected one line"):
        bump.bumped(files, "1.1", "2026-01-31")


def test_files_that_say_what_they_are_pass(checkout: Path) -> None:
    assert problems(WHEEL, SDIST, "1.0", checkout) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"Apache-2.0", b"MIT", "the license is not"),
        (b"License-File: LICENSE\n", b"", "the license file is not"),
        (b"Name: randlora", b"Name: lora", "the name and version"),
        (b"# randlora", b"# lora", "the description is not README"),
        (b"text/markdown", b"text/plain", "not in Markdown"),
    ],
)
def test_metadata_that_say_otherwise_are_found(old: bytes, new: bytes, message: str, checkout: Path) -> None:
    own = METADATA.replace(old, new)
    (found,) = problems(WHEEL | {f"{INFO}METADATA": own}, SDIST | {"PKG-INFO": own}, "1.0", checkout)
    assert message in found


@pytest.mark.parametrize(
    ("wheel", "sdist", "message"),
    [
        ({f"{INFO}licenses/LICENSE": b""}, {}, "the wheel has another LICENSE"),
        ({}, {"LICENSE": b""}, "the sdist has another LICENSE"),
        ({"tests/__init__.py": b""}, {}, "the wheel has tests/__init__.py"),
        ({}, {"PKG-INFO": b""}, "differ"),
    ],
)
def test_files_with_other_contents_are_found(
    wheel: dict[str, bytes], sdist: dict[str, bytes], message: str, checkout: Path
) -> None:
    (found,) = problems(WHEEL | wheel, SDIST | sdist, "1.0", checkout)
    assert message in found


def test_a_license_that_has_no_name_in_spdx_is_an_error(checkout: Path) -> None:
    own = METADATA.replace(b"Apache-2.0", b"Apache 2")
    with pytest.raises(ExceptionGroup) as caught:
        problems(WHEEL | {f"{INFO}METADATA": own}, SDIST | {"PKG-INFO": own}, "1.0", checkout)
    assert "license" in str(caught.value.exceptions)


def test_a_wheel_and_an_sdist_are_read_alike(tmp_path: Path) -> None:
    source = tmp_path / "randlora-1.0"
    source.mkdir()
    (source / "LICENSE").write_bytes(b"Do as you like.")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.write(source / "LICENSE", "LICENSE")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as sdist:
        sdist.add(source, "randlora-1.0")
    assert contents(tmp_path / "a.whl") == contents(tmp_path / "a.tar.gz") == {"LICENSE": b"Do as you like."}


def test_what_is_not_installed_as_it_was_built_is_named(tmp_path: Path) -> None:
    for name, data in WHEEL.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / INFO / "METADATA").write_bytes(b"Metadata-Version: 2.5\n")
    assert differing(tmp_path, WHEEL) == []
    (tmp_path / "randlora/py.typed").write_bytes(b"partial")
    shutil.rmtree(tmp_path / INFO)
    assert differing(tmp_path, WHEEL) == ["randlora/py.typed", f"{INFO}licenses/LICENSE"]


def test_the_packages_that_a_snippet_imports_are_found() -> None:
    code = "import json\nimport torch.nn\nimport randlora\nfrom transformers.models import auto\n"
    assert imports(code) == {"torch", "transformers"}

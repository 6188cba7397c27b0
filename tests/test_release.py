"""The lock file has all that pyproject.toml asks for and names no place, and an audit that asked no one fails."""

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.release.audit import verdict
from tests.release.lock import GROUPS, LOCK, ROOT, build_requirements

ENTRY = re.compile(r"(?P<requirement>[^#\s][^\\\n]*?)(?P<hashes>( \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
MENDED = {"name": "urllib3", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
SAFE = {"name": "numpy", "version": "2.0", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found"}


def locked() -> list[Requirement]:
    """Read what the lock file has for this Python and this system."""
    text = LOCK.read_text(encoding="utf-8")
    requirements = [Requirement(entry["requirement"]) for entry in ENTRY.finditer(text)]
    return [each for each in requirements if each.marker is None or each.marker.evaluate()]


def asked_for() -> list[Requirement]:
    """Read all that pyproject.toml asks for."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"].values()
    groups = (pyproject["dependency-groups"][group] for group in GROUPS)
    lists = [pyproject["project"]["dependencies"], *extras, *groups, build_requirements()]
    return [Requirement(text) for some in lists for text in some]


def test_the_lock_is_made_of_versions_with_hashes_and_names_no_place() -> None:
    text = LOCK.read_text(encoding="utf-8")
    rest = re.sub(r"#.*\n", "", ENTRY.sub("", text))
    assert rest == ""
    assert all(re.fullmatch(r"==[\w.]+", str(each.specifier)) and each.url is None for each in locked())
    assert not re.search(r"://|--(extra-)?index|--find-links|@|/", text)


@pytest.mark.parametrize("requirement", asked_for(), ids=str)
def test_the_lock_has_what_pyproject_asks_for(requirement: Requirement) -> None:
    found = [each for each in locked() if canonicalize_name(each.name) == canonicalize_name(requirement.name)]
    assert len(found) == 1, "renew the lock file with `make lock`"
    (specifier,) = found[0].specifier
    assert Version(specifier.version) in requirement.specifier, "renew the lock file with `make lock`"


@pytest.mark.parametrize(
    ("dependencies", "is_optional", "has_passed", "words"),
    [
        ([SAFE], False, True, "audited 1 of 1 locked packages: 0 vulnerabilities"),
        ([SAFE, MENDED], True, False, "urllib3 1.0: PYSEC-1, mended in 1.1"),
        ([SAFE, SKIPPED], False, False, "NOT AUDITED, because the vulnerability service gave no answer: torch"),
        ([SAFE, SKIPPED], True, True, "NOT AUDITED, because the vulnerability service gave no answer: torch"),
        ([MENDED, SKIPPED], True, False, "urllib3 1.0: PYSEC-1"),
        ([SKIPPED], False, False, "gave no answer: all packages"),
        ([], False, False, "gave no answer: all packages"),
        ([], True, True, "gave no answer: all packages"),
    ],
)
def test_an_audit_passes_only_where_every_package_was_asked_about(
    dependencies: list[dict[str, Any]], is_optional: bool, has_passed: bool, words: str
) -> None:
    text, passed = verdict({"dependencies": dependencies}, is_optional=is_optional)
    assert passed is has_passed
    assert words in text

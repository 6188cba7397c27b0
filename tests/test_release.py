"""What is wrong in a release is found, and what the repository tells its host holds."""

import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import randlora
from randlora.quantized import bnb
from tests.floors import PYPROJECT, floors
from tests.pages import ROOT
from tests.release import changelog
from tests.release.changelog import pyproject, text_of
from tests.release.lock import GROUPS, LOCK, build_requirements, verdict

ENTRY = re.compile(r"(?P<requirement>[^#\s][^\\\n]*?)(?P<hashes>( \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
MENDED = {"name": "urllib3", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
SAFE = {"name": "numpy", "version": "2.0", "vulns": []}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found"}


def test_the_lock_is_made_of_versions_with_hashes_and_has_what_pyproject_asks_for() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert re.sub(r"#.*\n", "", ENTRY.sub("", text)) == ""
    assert not re.search(r"://|--(extra-)?index|--find-links|@|/", text), "it names no place"
    found = [Requirement(entry["requirement"]) for entry in ENTRY.finditer(text)]
    assert all(re.fullmatch(r"==[\w.]+", str(each.specifier)) and each.url is None for each in found)
    here, table = [each for each in found if each.marker is None or each.marker.evaluate()], pyproject()
    lists = [table["project"]["dependencies"], *table["project"]["optional-dependencies"].values()]
    lists += [build_requirements(), *(table["dependency-groups"][group] for group in GROUPS)]
    for wanted in (Requirement(text) for some in lists for text in some):
        own = [each for each in here if canonicalize_name(each.name) == canonicalize_name(wanted.name)]
        versions = [Version(part.version) for each in own for part in each.specifier]
        assert [version in wanted.specifier for version in versions] == [True], f"`make lock`: {wanted}"


@pytest.mark.parametrize(
    ("dependencies", "is_optional", "has_passed", "words"),
    [
        ([SAFE], False, True, "audited 1 of 1 locked packages: 0 vulnerabilities"),
        ([SAFE, MENDED], True, False, "urllib3 1.0: PYSEC-1, mended in 1.1"),
        ([SAFE, SKIPPED], False, False, "NOT AUDITED, because the vulnerability service gave no answer: torch"),
        ([SAFE, SKIPPED], True, True, "NOT AUDITED, because the vulnerability service gave no answer: torch"),
        ([MENDED, SKIPPED], True, False, "urllib3 1.0: PYSEC-1"),
        ([], False, False, "gave no answer: all packages"),
        ([SKIPPED], True, True, "gave no answer: all packages"),
    ],
)
def test_an_audit_passes_only_where_every_package_was_asked_about(
    dependencies: list[dict[str, Any]], is_optional: bool, has_passed: bool, words: str
) -> None:
    text, passed = verdict({"dependencies": dependencies}, is_optional=is_optional)
    assert passed is has_passed
    assert words in text


def test_a_bump_is_all_that_a_release_needs_and_a_tag_of_another_version_is_an_error() -> None:
    files = {name: text_of(name) for name in changelog.FILES}
    change = "## [Unreleased]\n\n### Fixed\n- A fault.\n\n"  # just after a release there is none
    files["CHANGELOG.md"] = files["CHANGELOG.md"].replace("## [Unreleased]\n\n", change)
    assert f"\nversion: {randlora.__version__}\n" in files["CITATION.cff"]
    changed = changelog.bumped(files, "987.6", "2026-01-31")
    assert '\nversion = "987.6"\n' in changed["pyproject.toml"]
    assert "\nversion: 987.6\n" in changed["CITATION.cff"]
    assert changelog.notes(changed["CHANGELOG.md"], "987.6").startswith("### ")
    assert [text.count("987.6") for text in changed.values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="expected one line"):
        changelog.bumped({**files, "CITATION.cff": ""}, "987.6", "2026-01-31")
    with pytest.raises(SystemExit, match=r"got v0\.0\.1"):
        changelog.main("v0.0.1")


def test_workflows_pin_actions_run_targets_of_the_makefile_and_may_do_nothing_else() -> None:
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        used = re.findall(r"uses: (\S+)@(.*)", path.read_text(encoding="utf-8"))
        assert used
        assert not [name for name, version in used if not re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", version)]
    jobs = yaml.safe_load(text_of(".github/workflows/campaigns.yml"))["jobs"]
    targets = re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.MULTILINE)
    assert {*jobs["campaign"]["strategy"]["matrix"]["target"]} <= {*targets}
    release = yaml.safe_load(text_of(".github/workflows/release.yml"))
    assert release["permissions"] == {}
    assert {name: (job["permissions"], job.get("environment")) for name, job in release["jobs"].items()} == {
        "build": ({"contents": "read"}, None),
        "publish": ({"attestations": "write", "contents": "read", "id-token": "write"}, "pypi"),
        "announce": ({"contents": "write"}, None),
    }


def test_the_script_pins_every_floor_and_what_is_installed_is_not_older() -> None:
    command = [sys.executable, str(PYPROJECT.parent / "tests" / "floors.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert dict(line.split("==") for line in printed.splitlines()) == floors()
    assert {"torch", "safetensors", "numpy"} < set(floors())
    assert [name for name, floor in floors().items() if Version(version(name)) < Version(floor)] == []
    assert Version(floors()["bitsandbytes"]).release == bnb.OLDEST

"""The version, and what CHANGELOG.md says of it: ``python -m tests.release.changelog [TAG | bump VERSION]``."""

import datetime as dt
import re
import sys
import tomllib
from typing import Any

from tests.pages import ROOT

SECTION = re.compile(
    r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?\n(?P<notes>.*?)(?=^## |\Z)", re.M | re.S
)
FILES = {
    "pyproject.toml": (r'^version = ".*"$', 'version = "{version}"'),
    "CITATION.cff": (r"^version: .*$", "version: {version}"),
    "CHANGELOG.md": (r"^## \[Unreleased\]$", "## [Unreleased]\n\n## [{version}] - {date}"),
}
"""The one line of each file that a bump replaces, and what by."""


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pyproject() -> dict[str, Any]:
    return tomllib.loads(text_of("pyproject.toml"))


def notes(changelog: str, version: str) -> str:
    """Return the section of a version, without its heading; raise a `ValueError` that says what is missing."""
    unreleased, released = [*SECTION.finditer(changelog), None, None][:2]
    if unreleased is None or unreleased["version"] != "Unreleased":
        raise ValueError("CHANGELOG.md does not begin with a section ## [Unreleased]")
    if released is None or released["version"] != version or not released["date"]:
        raise ValueError(f"below [Unreleased], CHANGELOG.md has no section ## [{version}] with a date: see `make bump`")
    if not released["notes"].strip():
        raise ValueError(f"CHANGELOG.md says nothing of {version}")
    return released["notes"].strip()


def bumped(files: dict[str, str], version: str, date: str) -> dict[str, str]:
    changed = {}
    for name, (pattern, line) in FILES.items():
        by = line.format(version=version, date=date)
        changed[name], count = re.subn(pattern, by, files[name], flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{name}: expected one line {pattern}, found {count}")
    return changed


def bump(version: str) -> None:
    from packaging.version import Version

    old = pyproject()["project"]["version"]
    if not Version(version) > Version(old):
        raise ValueError(f"expected a version above {old}, got {version}")
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    for name, text in bumped({name: text_of(name) for name in FILES}, str(Version(version)), today).items():
        (ROOT / name).write_text(text, encoding="utf-8")


def main(tag: str | None = None, version: str | None = None) -> None:
    now = pyproject()["project"]["version"]
    try:
        if tag == "bump" and version:
            return bump(version)
        if tag not in (None, f"v{now}"):
            raise ValueError(f"expected the tag v{now}, the version in pyproject.toml, got {tag}")
        sys.stdout.write(f"{notes(text_of('CHANGELOG.md'), now)}\n")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])

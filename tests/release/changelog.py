"""Print what CHANGELOG.md says of the version in pyproject.toml, as the text of the release.

``python -m tests.release.changelog [TAG]`` fails unless that version has a section with a date below an [Unreleased]
one, and, with a tag, unless that is the version's.
"""

import re
import sys
import tomllib

from tests.pages import ROOT

SECTION = re.compile(
    r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?\n(?P<notes>.*?)(?=^## |\Z)", re.M | re.S
)


def project() -> dict[str, str]:
    """Return the table ``project`` of pyproject.toml."""
    table: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def notes(changelog: str, version: str) -> str:
    """Return the section of a version, without its heading.

    Raises:
        ValueError: The changelog does not begin with [Unreleased] and the version with a date, or says nothing of it.
    """
    unreleased, released = [*SECTION.finditer(changelog), None, None][:2]
    if unreleased is None or unreleased["version"] != "Unreleased":
        raise ValueError("CHANGELOG.md does not begin with a section ## [Unreleased]")
    if released is None or released["version"] != version or not released["date"]:
        raise ValueError(f"below [Unreleased], CHANGELOG.md has no section ## [{version}] with a date: see `make bump`")
    if not released["notes"].strip():
        raise ValueError(f"CHANGELOG.md says nothing of {version}")
    return released["notes"].strip()


def main(tag: str | None = None) -> int:
    """Print the text and return the exit status."""
    version = project()["version"]
    try:
        if tag not in (None, f"v{version}"):
            raise ValueError(f"expected the tag v{version}, the version in pyproject.toml, got {tag}")
        text = notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Set the version that is released next, everywhere that it stands.

``python -m tests.release.bump 0.2.0`` (`make bump VERSION=0.2.0`) writes it to pyproject.toml, from which the package
has it, and to CITATION.cff, and gives what CHANGELOG.md has under [Unreleased] that version and today's date.
"""

import datetime as dt
import re
import sys

from packaging.version import Version

from tests.pages import ROOT
from tests.release.changelog import project


def bumped(files: dict[str, str], version: str, date: str) -> dict[str, str]:
    """Return the texts of the three files with another version.

    Raises:
        ValueError: A file does not have exactly one such line.
    """
    lines = {
        "pyproject.toml": (r'^version = ".*"$', f'version = "{version}"'),
        "CITATION.cff": (r"^version: .*$", f"version: {version}"),
        "CHANGELOG.md": (r"^## \[Unreleased\]$", f"## [Unreleased]\n\n## [{version}] - {date}"),
    }
    changed = {}
    for name, (pattern, line) in lines.items():
        changed[name], count = re.subn(pattern, line, files[name], flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{name}: expected one line {pattern}, found {count}")
    return changed


def main(version: str) -> None:
    """Write the files, none of them if one is not as expected."""
    old = project()["version"]
    if not Version(version) > Version(old):
        sys.exit(f"expected a version above {old}, got {version}")
    names = "pyproject.toml", "CITATION.cff", "CHANGELOG.md"
    files = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    for name, text in bumped(files, str(Version(version)), today).items():
        (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

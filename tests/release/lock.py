"""Write requirements.lock: the environment of the tests, with every version and every file's SHA-256.

``python -m tests.release.lock`` (`make lock`) takes the versions of the environment that runs it, so that what is
locked is what the tests last ran with, and completes them for other systems and for newer Pythons. The tools of the
group ``release`` are not in that environment, and are locked at their newest versions.

The file names no index: pip takes the files from wherever it is configured to, and refuses any with another hash.
"""

import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
GROUPS = "examples", "lint", "docs", "test", "release"
HEADER = """\
# The environment of the tests and of the release tools: every version, and the SHA-256 of every file it may come from.
# Written by `make lock` from the versions in .venv, with which the tests pass before it is committed: never by hand.
# `make test LOCKED=1` runs the tests in .venv-locked, which has exactly these, of which pip refuses any other bytes.
"""


def tested() -> list[str]:
    """Return the versions in this environment as constraints, without those of local builds such as ``+cpu``."""
    found = {canonicalize_name(each.name): each.version.split("+")[0] for each in distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name not in ("pip", "randlora")]


def build_requirements() -> list[str]:
    """Return what builds the package, also in place: with a lock, no build fetches anything."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [*pyproject["build-system"]["requires"], "editables"]


def compiled(uv: str, sources: Sequence[str | Path], requirements: Iterable[str], *options: str) -> str:
    """Return the lines with versions, markers and hashes that uv finds for sources and further requirements."""
    command = [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--python-version", platform.python_version(), *options]
    given = "".join(f"{requirement}\n" for requirement in requirements)
    return subprocess.run(
        [*command, *map(str, sources), "-"], input=given, text=True, check=True, capture_output=True, cwd=ROOT
    ).stdout


def main(uv: str) -> None:
    """Write the file."""
    constraints = ROOT / "build" / "tested.txt"
    constraints.parent.mkdir(exist_ok=True)
    constraints.write_text("".join(f"{line}\n" for line in tested()), encoding="utf-8")
    groups = [part for group in GROUPS for part in ("--group", group)]
    everything = ("--constraint", str(constraints), "--all-extras", *groups)
    LOCK.write_text(HEADER + compiled(uv, ["pyproject.toml"], build_requirements(), *everything), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

"""The environment of the tests in requirements.lock, written by `make lock`, and audited by `make audit`."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from typing import Any

from packaging.utils import canonicalize_name

from tests.pages import ROOT
from tests.release.changelog import pyproject

LOCK = ROOT / "requirements.lock"
GROUPS = "examples", "lint", "docs", "test", "release"
HEADER = """\
# The environment of the tests and of the release tools: every version, and the SHA-256 of every file it may come from.
# Written by `make lock` from the versions in .venv, with which the tests pass before it is committed: never by hand.
# `make test LOCKED=1` runs the tests in .venv-locked, which has exactly these, of which pip refuses any other bytes.
"""


def build_requirements() -> list[str]:
    """Return what builds the package, also in place: with a lock, no build fetches anything."""
    return [*pyproject()["build-system"]["requires"], "editables"]


def write(uv: str) -> None:
    found = {canonicalize_name(each.name): each.version.split("+")[0] for each in distributions()}  # no +cpu
    tested = [f"{name}=={version}" for name, version in sorted(found.items()) if name not in ("pip", "randlora")]
    constraints = ROOT / "build" / "tested.txt"
    constraints.parent.mkdir(exist_ok=True)
    constraints.write_text("\n".join([*tested, ""]), encoding="utf-8")
    command = [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--python-version", platform.python_version()]
    command += ["--constraint", str(constraints), "--all-extras", *(f"--group={group}" for group in GROUPS)]
    given = "\n".join([*build_requirements(), ""])
    compiled = subprocess.run(
        [*command, "pyproject.toml", "-"], input=given, text=True, check=True, stdout=subprocess.PIPE, cwd=ROOT
    )
    LOCK.write_text(HEADER + compiled.stdout, encoding="utf-8")


def verdict(report: Mapping[str, Any], *, is_optional: bool) -> tuple[str, bool]:
    dependencies = report["dependencies"]
    asked = [each for each in dependencies if "skip_reason" not in each]
    lines = [
        f"{each['name']} {each['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version'}"
        for each in asked
        for found in each["vulns"]
    ]
    is_safe, is_whole = not lines, bool(asked) and len(asked) == len(dependencies)
    lines.append(f"audited {len(asked)} of {len(dependencies)} locked packages: {len(lines)} vulnerabilities")
    if not is_whole:
        skipped = [each["name"] for each in dependencies if "skip_reason" in each]
        unasked = ", ".join(skipped) if asked else "all packages"
        lines.append(f"NOT AUDITED, because the vulnerability service gave no answer: {unasked}")
        lines.append("run this where the service can be reached, or accept it with AUDIT=optional")
    return "\n".join(lines), is_safe and (is_whole or is_optional)


def audit() -> None:
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--requirement", str(LOCK)]
    command += ["--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    # without a report, the service could not be reached at all
    report = json.loads(done.stdout) if done.stdout.strip() else {"dependencies": []}
    text, has_passed = verdict(report, is_optional=os.environ.get("AUDIT") == "optional")
    sys.stderr.write(f"{text}\n")
    sys.exit(0 if has_passed else 1)


if __name__ == "__main__":
    write(sys.argv[1]) if sys.argv[1:] else audit()

"""Ask whether a version in requirements.lock has a known vulnerability, with pip-audit.

``python -m tests.release.audit`` exits with 1 if one has, or if the service gave no answer for one: pip-audit itself
succeeds where the service knows none of the packages, as where a mirror of the index answers that has no such service.
``AUDIT=optional`` in the environment makes that a warning; a release made so says in its notes that it was not audited.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.release.lock import LOCK


def run_pip_audit() -> dict[str, Any]:
    """Return pip-audit's report, without a dependency if the service cannot be reached at all."""
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--requirement", str(LOCK)]
    run = subprocess.run(
        [*command, "--format", "json", "--progress-spinner", "off"], check=False, capture_output=True, text=True
    )
    if not run.stdout.strip():
        lines = run.stderr.strip().splitlines() or [f"pip-audit exited with {run.returncode}"]
        sys.stderr.write(f"{lines[-1]}\n")
        return {"dependencies": []}
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def verdict(report: Mapping[str, Any], *, is_optional: bool) -> tuple[str, bool]:
    """Return what a report of pip-audit comes to, in lines, and whether the check passed."""
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


def main() -> int:
    """Print the verdict and return the exit status."""
    text, has_passed = verdict(run_pip_audit(), is_optional=os.environ.get("AUDIT") == "optional")
    sys.stderr.write(f"{text}\n")
    return 0 if has_passed else 1


if __name__ == "__main__":
    sys.exit(main())

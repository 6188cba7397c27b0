"""Build wheel and sdist of the last commit twice, in other places and under other circumstances, to equal bytes.

``python -m tests.release.builds`` builds them with the tools of the environment that runs it, which `make
release-check` takes from requirements.lock, and leaves them in dist/ with their SHA-256. Files that git does not track
are not in them. The time in them is that of the commit.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.release.lock import ROOT

CIRCUMSTANCES: tuple[dict[str, str | int], ...] = (
    {"umask": 0o022, "TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "1"},
    {"umask": 0o077, "TZ": "Pacific/Kiritimati", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2"},
)
"""What must not matter."""


def git(*arguments: str) -> bytes:
    """Return what git says of the repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def built(place: Path, commit: str, circumstances: dict[str, str | int]) -> dict[str, bytes]:
    """Export a commit to a place, build wheel and sdist there, and return their bytes by name."""
    own = dict(circumstances)
    umask = int(own.pop("umask"))
    environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
    environment["SOURCE_DATE_EPOCH"] = git("log", "-1", "--format=%ct", commit).decode().strip()
    source, out = place / "source", place / "out"
    old = os.umask(umask)
    try:
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
            archive.extractall(source, filter="tar")  # which leaves modes to the umask
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    finally:
        os.umask(old)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def main(commit: str = "HEAD") -> int:
    """Build twice, compare, leave one of each in dist/, and return the exit status."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory(suffix="-elsewhere") as second:
        one, other = (
            built(Path(place) / "nested", commit, circumstances)
            for place, circumstances in zip((first, second), CIRCUMSTANCES, strict=True)
        )
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if different or len(one) != 2:
        sys.stderr.write(f"expected a wheel and an sdist, twice the same, got {sorted(one)}; differing: {different}\n")
        return 1
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    (ROOT / "dist").mkdir()
    for name, data in one.items():
        (ROOT / "dist" / name).write_bytes(data)
        sys.stdout.write(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

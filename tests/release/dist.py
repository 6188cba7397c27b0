"""Wheel and sdist: built twice (`make dist`), checked and installed in empty environments (`make dist-check`)."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from packaging.metadata import Metadata

from tests.pages import ROOT
from tests.release.changelog import pyproject

DIST, README = ROOT / "dist", ROOT / "README.md"
CIRCUMSTANCES = (
    (0o022, {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "1"}),
    (0o077, {"TZ": "Pacific/Kiritimati", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2"}),
)
"""What must not matter: the umask and the environment."""
OF_TOOLS = "METADATA", "RECORD", "WHEEL"


def built(source: Path, umask: int, environment: dict[str, str]) -> dict[str, bytes]:
    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout

    source.mkdir(parents=True)
    unpack = ["tar", "--extract", "--no-same-permissions", "--directory", str(source)]  # modes by the umask
    subprocess.run(unpack, input=git("archive", "--format=tar", "HEAD"), check=True, umask=umask)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "out"), str(source)]
    time = git("log", "-1", "--format=%ct").decode().strip()
    environment = {**os.environ, **environment, "SOURCE_DATE_EPOCH": time}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, umask=umask)
    return {path.name: path.read_bytes() for path in sorted((source / "out").iterdir())}


def build() -> None:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory(suffix="-elsewhere") as second:
        one, other = (built(Path(at, "x"), *how) for at, how in zip((first, second), CIRCUMSTANCES, strict=True))
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    if different or len(one) != 2:
        sys.exit(f"expected a wheel and an sdist, twice the same, got {sorted(one)}; differing: {different}")
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    for name, data in one.items():
        (DIST / name).write_bytes(data)
        sys.stdout.write(f"{hashlib.sha256(data).hexdigest()}  {name}\n")


def contents(path: Path) -> dict[str, bytes]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(path) as sdist:
        files = ((member, sdist.extractfile(member)) for member in sdist)
        return {member.name.split("/", 1)[1]: file.read() for member, file in files if file}


def problems(wheel: Mapping[str, bytes], sdist: Mapping[str, bytes], version: str, root: Path = ROOT) -> list[str]:
    info = f"randlora-{version}.dist-info/"
    own = wheel.get(f"{info}METADATA", b"")
    if own != sdist.get("PKG-INFO"):
        return [f"{info}METADATA of the wheel and PKG-INFO of the sdist differ, or are of another version"]
    found = Metadata.from_email(own, validate=True)
    readme, license_text = ((root / name).read_bytes() for name in ("README.md", "LICENSE"))
    expected = {
        f"the name and version are not randlora {version}": (found.name, str(found.version)) == ("randlora", version),
        "the license is not Apache-2.0": found.license_expression == "Apache-2.0",
        "the license file is not LICENSE": found.license_files == ["LICENSE"],
        "the wheel has another LICENSE": wheel.get(f"{info}licenses/LICENSE") == license_text,
        "the sdist has another LICENSE": sdist.get("LICENSE") == license_text,
        "the description is not README.md": (found.description or "").strip() == readme.decode().strip(),
        "the description is not in Markdown": found.description_content_type == "text/markdown",
        "the wheel does not say that it is typed": "randlora/py.typed" in wheel,
        "the sdist has no tests": "tests/test_release.py" in sdist,
    }
    foreign = sorted(name for name in wheel if not name.startswith(("randlora/", info)))
    return [text for text, holds in expected.items() if not holds] + [f"the wheel has {name}" for name in foreign]


def differing(site: Path, wheel: Mapping[str, bytes]) -> list[str]:
    compared = {site / name: data for name, data in wheel.items() if Path(name).name not in OF_TOOLS}
    wrong = [path for path, data in compared.items() if not path.is_file() or path.read_bytes() != data]
    return [path.relative_to(site).as_posix() for path in wrong]


def install(python: str, place: Path, *requirements: object) -> Path:
    subprocess.run([python, "-m", "venv", place], check=True)
    subprocess.run([place / "bin/python", "-m", "pip", "install", "--quiet", *map(str, requirements)], check=True)
    return next(place.glob("lib/python3*/site-packages"))


def check_installed(python: str, place: Path, wheel: Path, sdist: Path) -> None:
    wanted = {"sdist": ("--no-deps", sdist), "wheel": (wheel, "transformers")}  # which the README's snippets import
    for site in (install(python, place / name, *requirements) for name, requirements in wanted.items()):
        if wrong := differing(site, contents(wheel)):
            sys.exit(f"in {site}, not as in the wheel: {', '.join(wrong)}")
    own, command = place / "wheel/bin/python", place / "wheel/bin/randlora"
    subprocess.run([own, "-I", ROOT / "tests/pages.py", README], check=True, cwd=place)
    subprocess.run([own, "-m", "pip", "install", "--quiet", f"{wheel}[cli,hub]"], check=True)
    said = subprocess.run([command, "--version"], check=True, cwd=place, stdout=subprocess.PIPE, text=True).stdout
    if said != f"randlora {pyproject()['project']['version']}\n":
        sys.exit(f"randlora --version says {said}")
    # what the README's snippets saved
    subprocess.run([command, "verify", "adapter"], check=True, cwd=place, stdout=subprocess.DEVNULL)


def check(*pythons: str) -> None:
    """Check the metadata, then with each Python; name those that the machine lacks, and fail if it has none."""
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    if wrong := problems(contents(wheel), contents(sdist), pyproject()["project"]["version"]):
        sys.exit("\n".join(wrong))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    count = 0
    for python in pythons:
        version = subprocess.run(["sh", "-c", '"$0" --version', python], check=False, capture_output=True, text=True)
        if version.returncode:
            sys.stdout.write(f"SKIPPED: this machine has no {python}\n")
            continue
        with tempfile.TemporaryDirectory() as place:
            check_installed(python, Path(place), wheel, sdist)
        sys.stdout.write(f"wheel and sdist install and run with {version.stdout}")
        count += 1
    if not count:
        sys.exit("this machine has none of the Pythons")


if __name__ == "__main__":
    check(*sys.argv[1:]) if sys.argv[1:] else build()

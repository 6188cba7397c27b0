"""Check what wheel and sdist in dist/ say of themselves, with twine and against the checkout.

``python -m tests.release.metadata`` looks at name, version, license expression, license files and README, and at what
else is in the wheel.
"""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from packaging.metadata import Metadata

from tests.pages import ROOT
from tests.release.changelog import project


def dist() -> tuple[Path, Path]:
    """Return the wheel and the sdist in dist/."""
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    return wheel, sdist


def contents(path: Path) -> dict[str, bytes]:
    """Return the files in a wheel, or in an sdist without the name of its one folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(path) as sdist:
        files = ((member, sdist.extractfile(member)) for member in sdist)
        return {member.name.split("/", 1)[1]: file.read() for member, file in files if file}


def problems(wheel: Mapping[str, bytes], sdist: Mapping[str, bytes], version: str, root: Path = ROOT) -> list[str]:
    """Return what is wrong in the files of a wheel and of an sdist, in sentences.

    Raises:
        ExceptionGroup: The metadata break a rule of their own, such as that a license has a name in SPDX.
    """
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


def main() -> int:
    """Print what is wrong and return the exit status."""
    wheel, sdist = dist()
    wrong = problems(contents(wheel), contents(sdist), project()["version"])
    sys.stderr.write("".join(f"{text}\n" for text in wrong))
    twine = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=False)
    return 1 if wrong else twine.returncode


if __name__ == "__main__":
    sys.exit(main())

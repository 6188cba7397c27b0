"""Install wheel and sdist of dist/ in empty environments, and run the README's snippets with what the wheel installs.

``python -m tests.release.installed PYTHON...`` does so for each Python that this machine has, elsewhere than in the
checkout. The sdist is installed without its requirements: what it installs is compared with the wheel, byte for byte.
"""

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.pages import ROOT, snippets
from tests.release.changelog import project
from tests.release.metadata import contents, dist

README = ROOT / "README.md"


def imports(code: str) -> set[str]:
    """Return the packages that a snippet imports, without Python's own and the library."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"randlora"}


def differing(site: Path, wheel: dict[str, bytes]) -> list[str]:
    """Return the files of a wheel that are not, or otherwise, among the installed ones.

    METADATA, RECORD and WHEEL name the tools that wrote them.
    """
    compared = {name: data for name, data in wheel.items() if Path(name).name not in ("METADATA", "RECORD", "WHEEL")}
    return [
        name for name, data in compared.items() if not (site / name).is_file() or (site / name).read_bytes() != data
    ]


def install(python: str, place: Path, *requirements: str) -> Path:
    """Make an empty environment, install requirements, and return its folder of packages."""
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    subprocess.run([place / "bin/python", "-m", "pip", "install", "--quiet", *requirements], check=True)
    return next(place.glob("lib/python3*/site-packages"))


def check(python: str, place: Path) -> None:
    """Install and run everything with one Python, in a folder that the caller removes.

    Raises:
        subprocess.CalledProcessError: A command failed; what it wrote is on the terminal.
        ValueError: What is installed is not what was built.
    """
    wheel, sdist = dist()
    sites = [install(python, place / "sdist", "--no-deps", str(sdist))]
    beside = set().union(*(imports(snippet.code) for snippet in snippets(README)))
    sites.append(install(python, place / "wheel", str(wheel), *sorted(beside)))
    for site in sites:
        if wrong := differing(site, contents(wheel)):
            raise ValueError(f"in {site}, not as in the wheel: {', '.join(wrong)}")
    own = place / "wheel/bin/python"
    subprocess.run([own, "-I", ROOT / "tests/pages.py", README], check=True, cwd=place)
    subprocess.run([own, "-m", "pip", "install", "--quiet", f"{wheel}[cli,hub]"], check=True)
    command = place / "wheel/bin/randlora"
    version = subprocess.run([command, "--version"], check=True, cwd=place, capture_output=True, text=True).stdout
    if version != f"randlora {project()['version']}\n":
        raise ValueError(f"randlora --version says {version}")
    subprocess.run([command, "demo"], check=True, cwd=place, stdout=subprocess.DEVNULL)


def main(*pythons: str) -> int:
    """Check with each Python, name those that the machine lacks, and return the exit status."""
    count = 0
    for python in pythons:
        version = subprocess.run(["sh", "-c", '"$0" --version', python], check=False, capture_output=True, text=True)
        if version.returncode:
            sys.stdout.write(f"SKIPPED: this machine has no {python}\n")
            continue
        with tempfile.TemporaryDirectory() as place:
            check(python, Path(place))
        sys.stdout.write(f"wheel and sdist install and run with {version.stdout}")
        count += 1
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

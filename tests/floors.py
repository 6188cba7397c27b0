"""Write the pins for `make test-floor`: the oldest versions that pyproject.toml admits, one a line."""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
LOWER_BOUND = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>\d+(\.\d+)*)")


def floors() -> dict[str, str]:
    """Return the oldest version of each dependency of the package and of its extras, by name."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    found = {}
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        bound = LOWER_BOUND.fullmatch(requirement)
        if bound is None:
            raise ValueError(f"expected a name, >= and a version, found {requirement!r}")
        found[bound["name"]] = bound["version"]
    return found


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in floors().items())

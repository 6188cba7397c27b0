"""Write the pins for `make test-floor`: the oldest versions that pyproject.toml admits, one a line."""

import sys
import tomllib
from itertools import chain
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def floors() -> dict[str, str]:
    """Return the oldest version of each dependency of the package and of its extras, by name."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    requirements = chain(project["dependencies"], *project["optional-dependencies"].values())
    return dict(requirement.split(">=") for requirement in requirements)


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in floors().items())

"""A hook of MkDocs: the version and the repository in the header, and lines that several pages would repeat.

The address is ``Repository`` of the project's URLs in ``pyproject.toml``, or of the repository whose action builds.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLACE = "git clone REPOSITORY randlora  # REPOSITORY: where it is hosted"
LARGE = re.compile(r'^```python title="needs an? .*?^```$', re.MULTILINE | re.DOTALL)
STAND_IN = "*The tests run this block with a tiny stand-in, under the same name.*"


def repository() -> str | None:
    """Return the address of the repository, if it is known."""
    known = all(name in os.environ for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"))
    built = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}".format_map(os.environ) if known else None
    address: str | None = PROJECT.get("urls", {}).get("Repository", built)
    return address


def on_config(config: Any) -> Any:
    """Set what the header shows."""
    config["site_name"] = f"{config['site_name']} {PROJECT['version']}"
    if address := repository():
        config["repo_url"], config["repo_name"] = address, "/".join(address.split("/")[-2:])
    return config


def on_page_markdown(markdown: str, **_: object) -> str:
    """Name the repository in commands that clone it, and say below a block for a large model how it is tested."""
    if address := repository():
        markdown = markdown.replace(PLACE, f"git clone {address} randlora")
    return LARGE.sub(rf"\g<0>\n\n{STAND_IN}", markdown)

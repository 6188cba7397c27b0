"""The programs of docs/examples, imported, and snippets of pages that need what a page does not have."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS / "examples"
SNIPPET = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block in this language is run by a test that has processes, or the packages, for it; others as a page."""


def imported(name: str) -> ModuleType:
    """Import one of them."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snippet(page: str, name: str) -> str:
    """Return the code of the one such block of a page that has a name in it."""
    (code,) = (code for code in SNIPPET.findall((DOCS / page).read_text(encoding="utf-8")) if name in code)
    return str(code)

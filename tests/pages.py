"""The snippets of pages, the programs of docs/examples and the notebook, which ``python -m tests.pages`` makes anew.

This needs nothing but Python: ``python -I tests/pages.py README.md`` runs a page's snippets with an installed package.
"""

import importlib.util
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
QUICKSTART, NOTEBOOK = DOCS / "quickstart.md", DOCS / "quickstart.ipynb"
NOT_RUN = 'title="not run"'
REAL = 'title="needs a'
"""Begins the title of a block for a model and data of the Hub, which runs with small ones under the same names."""
SNIPPET = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block in this language is run by a test that has processes, or the packages, for it; others as a page."""
FENCE = re.compile(r"^```(?P<language>\w*)(?P<options>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """A block of Python on a page, the line of its first statement, and what the page says right below it prints."""

    line: int
    code: str
    printed: str | None


def snippets(page: Path, *, real: bool = False) -> list[Snippet]:
    """Find the blocks of a page that are to be run, in order: those for a model and data of the Hub, or the others."""
    text, found = page.read_text(encoding="utf-8"), []
    for block in FENCE.finditer(text):
        if block["language"] != "python" or NOT_RUN in block["options"] or (REAL in block["options"]) != real:
            continue
        below = FENCE.match(text, len(text) - len(text[block.end() :].lstrip("\n")))
        printed = below["code"] if below and below["language"] == "text" else None
        found.append(Snippet(text.count("\n", 0, block.start("code")) + 1, block["code"], printed))
    return found


def run_page(page: Path, *, real: bool = False) -> None:
    """Run a page's snippets in one namespace; fail, and name page and line, at one that raises or prints otherwise."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, code, printed in snippets(page, real=real):
        with redirect_stdout(output := io.StringIO()):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # whose tracebacks name the line
        if printed is not None and stripped(output.getvalue()) != stripped(printed):
            raise AssertionError(f"{page.name}:{line}: prints\n{output.getvalue()}\nand not\n{printed}")


def stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def snippet(page: str, name: str) -> str:
    (code,) = (code for code in SNIPPET.findall((DOCS / page).read_text(encoding="utf-8")) if name in code)
    return str(code)


def notebook_of(page: Path) -> str:
    """Return a notebook whose cells are the page's Python, with what it says that it prints, and the text between."""
    text = page.read_text(encoding="utf-8").replace("\nThis page is also [a notebook](quickstart.ipynb).", "")
    cells: list[dict[str, Any]] = []
    place = 0

    def add(kind: str, source: str, **more: Any) -> None:
        if source:
            lines = source.splitlines(keepends=True)
            cells.append({"id": f"cell-{len(cells)}", "cell_type": kind, **more, "source": lines})

    for block in FENCE.finditer(text):
        if block["language"] == "python":
            add("markdown", text[place : block.start()].strip(), metadata={})
            add("code", block["code"].rstrip(), execution_count=None, metadata={}, outputs=[])
        elif block["language"] == "text" and not text[place : block.start()].strip():  # right below its code
            printed = {"output_type": "stream", "name": "stdout", "text": block["code"].splitlines(keepends=True)}
            cells[-1]["outputs"] = [printed]
        else:
            continue
        place = block.end()
    add("markdown", text[place:].strip(), metadata={})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    found = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__" and sys.argv[1:]:
    run_page(Path(sys.argv[1]))
elif __name__ == "__main__":
    NOTEBOOK.write_text(notebook_of(QUICKSTART), encoding="utf-8")

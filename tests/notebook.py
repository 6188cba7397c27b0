"""The quickstart as a notebook, docs/quickstart.ipynb, which ``python -m tests.notebook`` makes of the page.

What is Python on the page is a cell of code, with what the page says that it prints; all else is cells of text.
"""

import json
from pathlib import Path
from typing import Any

from tests.pages import FENCE, ROOT

PAGE, NOTEBOOK = ROOT / "docs" / "quickstart.md", ROOT / "docs" / "quickstart.ipynb"
ABOUT_IT = "\nThis page is also [a notebook](quickstart.ipynb)."


def notebook_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8").replace(ABOUT_IT, "")
    cells: list[dict[str, Any]] = []
    place = 0
    for block in FENCE.finditer(text):
        if block["language"] == "python":
            code: dict[str, Any] = {
                "execution_count": None,
                "metadata": {},
                "outputs": [],
                "source": lines(block["code"].rstrip()),
            }
            cells += [text_cell(text[place : block.start()]), {"cell_type": "code", **code}]
            place = block.end()
        elif block["language"] == "text" and not text[place : block.start()].strip():  # right below its code
            cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": lines(block["code"])}]
            place = block.end()
    cells.append(text_cell(text[place:]))
    cells = [{"id": f"cell-{i}", **cell} for i, cell in enumerate(each for each in cells if each["source"])]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    found = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(found, ensure_ascii=False, indent=1) + "\n"


def text_cell(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text.strip())}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook_of(PAGE), encoding="utf-8")

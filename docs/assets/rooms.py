"""A hook of MkDocs: the page on architecture gets a table of the files in each room, from their docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "randlora"
PICTURE = re.compile(r"```text rooms\n(.*?)```", re.DOTALL)
HERE = "<!-- files -->"


def rooms(page: str) -> list[str]:
    """Return the rooms in the picture on a page, from the ground up, and on each floor from the left."""
    (picture,) = PICTURE.findall(page)
    floors = (line.split(":")[1].split() for line in picture.splitlines())
    return [room for floor in reversed([*floors]) for room in floor]


def files_of(room: str) -> list[Path]:
    """Return the files of a room: the modules of a folder, or one that stands by itself."""
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def table(page: str) -> Iterator[str]:
    """Yield the lines of the table: each file with the first line of its docstring."""
    yield from ("| file | what it has |", "|---|---|")
    for room in rooms(page):
        for path in files_of(room):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = docstring.partition("\n\n")[0].replace("\n", " ").replace("``", "`").replace("|", r"\|")
            yield f"| `{path.relative_to(PACKAGE).as_posix()}` | {first} |"


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Put the table where the page wants it."""
    if page.file.src_uri != "architecture.md":
        return markdown
    return PICTURE.sub(r"```text\n\1```", markdown.replace(HERE, "\n".join(table(markdown))))

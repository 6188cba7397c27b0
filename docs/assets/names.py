"""A hook of MkDocs: the first page of the API lists the names on the others, with the first lines of docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"^::: (randlora\.[\w.]+)\.(\w+)$", re.MULTILINE)
SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n)*)", re.MULTILINE)
SPACES = {"randlora.files": "files/__init__.py", "randlora.serving": "serving/__init__.py", "randlora": "api.py"}
HERE = "<!-- names -->"


def source(path: str) -> ast.Module:
    """Parse a file of the package."""
    return ast.parse((ROOT / "randlora" / path).read_text(encoding="utf-8"))


def first_line(module: str, name: str) -> str:
    """Return the first line of the docstring of a function or a class."""
    for node in source(module.removeprefix("randlora.").replace(".", "/") + ".py").body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            first = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
            return first.replace("``", "`").replace("|", r"\|")
    raise LookupError(f"{module} defines no {name}")


def exported(path: str) -> set[str]:
    """Return the names that a file of the package imports from others."""
    imports = (node for node in ast.walk(source(path)) if isinstance(node, ast.ImportFrom))
    return {alias.name for node in imports for alias in node.names}


def imported_from(module: str, name: str) -> str:
    """Return the name under which users import an object: in a space that exports it, or else where it is defined."""
    for space, path in SPACES.items():
        if name in exported(path) and (space == "randlora" or module.startswith(space)):
            return f"{space}.{name}"
    return f"{module}.{name}"


def tables(config: Any) -> Iterator[str]:
    """Yield the lines of a table for each section of a page, in the order of the navigation."""
    for page in re.findall(r"'(api/(?!index)\w+\.md)'", str(config.nav)):
        name_of_page = Path(page).name
        for title, text in SECTION.findall(Path(config.docs_dir, page).read_text(encoding="utf-8")):
            yield from ("", f"## {title}", "", "| name | what it does |", "|---|---|")
            for module, name in ENTRY.findall(text):
                breakable = imported_from(module, name).replace(".", ".<wbr>")
                link = f"[<code>{breakable}</code>]({name_of_page}#{module}.{name})"
                yield f"| {link} | {first_line(module, name)} |"


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """Put the tables where the page wants them."""
    return markdown.replace(HERE, "\n".join(tables(config))) if page.file.src_uri == "api/index.md" else markdown

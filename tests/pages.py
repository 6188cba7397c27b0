"""The snippets of a page: found, and run one after the other, as they stand.

This needs nothing but Python, so that ``python -I tests/pages.py README.md`` runs a page's with an installed package.
"""

import io
import re
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOT_RUN = 'title="not run"'
REAL = 'title="not run here: needs a'
"""Begins the title of a block for a model and data of the Hub, which runs with small ones under the same names."""
FENCE = re.compile(r"^```(?P<language>\w*)(?P<options>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """A block of Python on a page, the line of its first statement, and what the page says right below it prints."""

    page: Path
    line: int
    code: str
    printed: str | None

    def compiled(self) -> Any:
        """Compile it so that a traceback names the page and the line."""
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec")


def snippets(page: Path, *, real: bool = False) -> list[Snippet]:
    """Find the blocks of a page that are to be run, in order: those for a model and data of the Hub, or the others."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in FENCE.finditer(text):
        if block["language"] != "python" or NOT_RUN in block["options"] or (REAL in block["options"]) != real:
            continue
        below = FENCE.match(text, len(text) - len(text[block.end() :].lstrip("\n")))
        printed = below["code"] if below and below["language"] == "text" else None
        found.append(Snippet(page, text.count("\n", 0, block.start("code")) + 1, block["code"], printed))
    return found


def run_page(page: Path, *, real: bool = False) -> None:
    """Run a page's snippets in one namespace; fail, and name page and line, at one that raises or prints otherwise."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for snippet in snippets(page, real=real):
        output = io.StringIO()
        try:
            with redirect_stdout(output):
                exec(snippet.compiled(), namespace)
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
            line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else [snippet.line, *lines][-1]
            raise AssertionError(f"{page.name}:{line}: {type(error).__name__}: {error}") from error
        if snippet.printed is not None and stripped(output.getvalue()) != stripped(snippet.printed):
            raise AssertionError(f"{page.name}:{snippet.line}: prints\n{output.getvalue()}\nand not\n{snippet.printed}")


def stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))

"""A hook of MkDocs: ``llms.txt``, the pages of the site with their first sentences, for programs that read it."""

import re
from pathlib import Path
from typing import Any

FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_first: dict[str, str] = {}


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> None:
    """Note the first sentence of a page, below its heading."""
    paragraphs = (part.strip() for part in FENCED.sub("", markdown).split("\n\n"))
    text = next((part for part in paragraphs if part and part[0] not in "#<|`!["), "")
    sentence = re.split(r"(?<=[.:]) ", LINK.sub(r"\1", " ".join(text.split())))[0]
    _first[page.file.src_uri] = sentence.replace("`", "")


def on_post_build(*, config: Any, **_: object) -> None:
    """Write the file, by the groups of the navigation."""
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}"]
    for group in config["nav"]:
        for name, entries in group.items():
            lines += ["", f"## {name}", "", *_lines(entries)]
    Path(config["site_dir"], "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(entries: Any) -> list[str]:
    """Return a line for each page of a group, and of the groups in it."""
    found = []
    for entry in entries:
        for title, target in entry.items():
            if isinstance(target, list):
                found += _lines(target)
            else:
                address = re.sub(r"(^|/)index/$", r"\1", target.removesuffix(".md") + "/")
                found.append(f"- [{title}](./{address}): {_first.get(target, '')}".rstrip(": "))
    return found

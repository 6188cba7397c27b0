"""Where the code of other libraries reads the weight of a module that it may not call, found in its source."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

LIBRARIES = "diffusers", "open_clip", "sentence_transformers", "timm", "torchvision", "transformers", "trl"
WEIGHTS = "weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"
DESCRIPTIONS = frozenset(
    {"data_ptr", "device", "dim", "dtype", "element_size", "is_floating_point", "is_meta", "itemsize", "layout"}
    | {
        "ndim",
        "new_empty",
        "new_full",
        "new_ones",
        "new_tensor",
        "new_zeros",
        "numel",
        "requires_grad",
        "shape",
        "size",
    }
)
"""What is read of a weight without its values."""

READ_RIGHTLY = re.compile(r"Embedding|Conv\w*\(|Norm|Parameter\(|LSTM|GRU")
"""What children are made of whose weight is adapted as it is read, or that have no matrix to adapt."""

LINEAR = re.compile(r"Linear|Conv1D")
NAMES = "|".join(WEIGHTS)
READ = re.compile(rf"""\.(?:{NAMES})\b(?!["']|\.(?:{"|".join(DESCRIPTIONS)})\b)|["'](?:{NAMES})["']""")
BEFORE = re.compile(r"([\w\])]+)$")
INIT = re.compile(r"\binit\.|\bisinstance\(|GatheredParameters\(")
MADE = re.compile(r"self\.(\w+)(?::[^=\n]*)? = (.*)")
NO_CHILD = frozenset({"self", "cls", "nn", "init", "torch"})
BEFORE_USE = re.compile(r"_init|^init_|^reset|tie_|resize|convert|set_(in|out)put_embeddings|prune|unload|load_|from_")
"""Names of functions that run before a model computes, or that make another one."""


class Read(NamedTuple):
    """A place in the code, and what it reads.

    Attributes:
        place: ``file:line``.
        where: The qualified name of the function.
        what: The expression.
    """

    place: str
    where: str
    what: str

    @property
    def is_of_self(self) -> bool:
        """Whether the expression begins with the owner."""
        return self.what.startswith("self.")

    @property
    def child(self) -> str:
        """The name of the module whose weight it is, as its owner has it."""
        return self.what.removesuffix(f".{self.what.rpartition('.')[2]}").removeprefix("self.")


def files_of(library: str) -> Iterator[tuple[Path, str]]:
    """Go through the files of a library with their code, without what runs before a model is made."""
    found = importlib.util.find_spec(library)
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith(("convert_", "modular_")):  # the second are what files beside are generated from
            yield path.relative_to(root.parent), path.read_text(encoding="utf-8", errors="replace")


@cache
def reads_in(library: str) -> tuple[Read, ...]:
    """Return the places in a library's code that read weights of modules that may be linear layers."""
    files = ((path, text) for path, text in files_of(library) if "weight" in text and _may_read(text))
    return tuple(read for path, text in files for read in _reads(text, path))


def _may_read(text: str) -> bool:
    """Whether some line may read the weight of a child that is made as, or may be, a linear layer."""
    rightly: frozenset[str] | None = None
    for match in READ.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.end()]
        if INIT.search(line) or (match[0][0] != "." and "getattr(" not in line):
            continue
        child = BEFORE.search(line.removesuffix(match[0]))
        if child is None or (child[1] not in NO_CHILD and child[1] not in (rightly := rightly or _read_rightly(text))):
            return True
    return False


def _read_rightly(text: str) -> frozenset[str]:
    """Return the names of children that are only made as something in `READ_RIGHTLY`."""
    made: dict[str, bool] = {}
    for name, value in MADE.findall(text):
        is_right = READ_RIGHTLY.search(value) is not None and not LINEAR.search(value)
        made[name] = made.get(name, True) and is_right
    return frozenset(name for name, is_right in made.items() if is_right)


def _reads(text: str, path: Path) -> Iterator[Read]:
    module, rightly = ".".join(path.with_suffix("").parts), _read_rightly(text)

    def go(node: ast.AST, parent: ast.AST | None, scope: tuple[str, ...]) -> Iterator[Read]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            scope = (*scope, node.name)
        if (what := _what(node)) is not None and not _is_harmless(rightly, node, parent, scope):
            yield Read(f"{path}:{node.lineno}", ".".join((module, *scope)), what)  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            yield from go(child, node, scope)

    yield from go(ast.parse(text), None, ())


def _what(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and node.attr in WEIGHTS:
        return ast.unparse(node)
    is_getattr = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
    if is_getattr and isinstance(name := node.args[1], ast.Constant) and name.value in WEIGHTS:  # type: ignore[attr-defined]
        return f"{ast.unparse(node.args[0])}.{name.value}"  # type: ignore[attr-defined]
    return None


def _is_harmless(rightly: Collection[str], node: ast.AST, parent: ast.AST | None, scope: tuple[str, ...]) -> bool:
    if isinstance(parent, ast.Attribute) and parent.attr in DESCRIPTIONS:
        return True
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance":
        return True
    if any(BEFORE_USE.search(name) for name in scope if name[0].islower() or name[0] == "_"):
        return True
    owner = node.value if isinstance(node, ast.Attribute) else node.args[0]  # type: ignore[attr-defined]
    if isinstance(owner, ast.Name):
        return owner.id in NO_CHILD
    return isinstance(owner, ast.Attribute) and (owner.attr in rightly or owner.attr.endswith("norm"))

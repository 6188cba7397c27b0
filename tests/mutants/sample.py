"""Sampling mutants by seed: small faults, such as ``<`` for ``<=``, at random places of a package's code."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

SEED = 31
COUNTS = {"core": 300, "features": 200}
FEATURES = ("readers", "quantized", "sharded", "offloaded", "serving", "integrations", "cli")
"""Folders, or files, of the package. All other files are the core."""

CHANGES = {
    "ReplaceBinaryOperator_": "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Div FloorDiv_Mul Mod_FloorDiv Pow_Mul "
    "BitOr_BitAnd BitAnd_BitOr BitXor_BitOr LShift_RShift RShift_LShift",
    "ReplaceComparisonOperator_": "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot "
    "IsNot_Is",
    "ReplaceUnaryOperator_": "Delete_Not Delete_USub Delete_Invert",
    "Replace": "TrueWithFalse FalseWithTrue AndWithOr OrWithAnd BreakWithContinue ContinueWithBreak",
    "": "AddNot ExceptionReplacer NumberReplacer RemoveDecorator ZeroIterationForLoop",
}
OPERATORS = [f"core/{group}{name}" for group, names in CHANGES.items() for name in names.split()]
"""Operators of cosmic-ray: of its 211 those that make a fault that a person could make."""

OF_TYPE_CHECKERS = ("TYPE_CHECKING", "@overload")
"""Lines with these do nothing, or too much, when they run."""


@dataclass(frozen=True)
class Mutant:
    """One fault: the occurrence of an operator in a file, and the line before and after."""

    part: str
    file: str
    line: int
    operator: str
    occurrence: int
    before: str
    after: str

    @property
    def place(self) -> tuple[str, str, int]:
        return self.file, self.operator, self.occurrence

    def applied(self, source: str) -> str:
        mutated = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        assert isinstance(mutated, str)
        return mutated


def feature_of(file: str) -> str | None:
    name = file.split("/")[1].removesuffix(".py")
    return name if name in FEATURES else None


def sampled(tree: Path, part: str, count: int) -> list[Mutant]:
    """Return the mutants of a part of the package in an order by seed and text, which code that moves keeps."""
    same_text: Counter[tuple[str, int]] = Counter()
    places: list[tuple[str, str, int, list[tuple[str, int]]]] = []
    for path in sorted((tree / "randlora").rglob("*.py")):
        file = path.relative_to(tree).as_posix()
        if (feature_of(file) is None) != (part == "core"):
            continue
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for (line, column), changes in sorted(_places(source).items()):
            text = lines[line - 1].strip()
            if any(word in text for word in OF_TYPE_CHECKERS):
                continue
            offset = column - len(lines[line - 1]) + len(lines[line - 1].lstrip())
            number = _number(SEED, text, offset, same_text[text, offset])
            same_text[text, offset] += 1
            places.append((number, file, line, changes))
    mutants: list[Mutant] = []
    for number, file, line, changes in sorted(places):
        if len(mutants) == count:
            break
        operator, occurrence = min(changes, key=lambda change: _number(number, *change))
        mutants += _mutant(tree, Mutant(part, file, line, operator, occurrence, "", ""))
    return mutants


def _number(*values: object) -> str:
    return sha256("|".join(map(str, values)).encode()).hexdigest()


def _places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Return by line and column which operators apply there, as which of their occurrences."""
    places = defaultdict(list)
    occurrences: Counter[str] = Counter()
    operators = [(name, get_operator(name)()) for name in OPERATORS]
    for node in ast_nodes(get_ast(source)):
        is_mark = node.type == "operator" and node.parent.type in {"parameters", "lambdef"}  # as in ``f(*, x)``
        if node.type in {"name", "string", "newline", "endmarker"}:
            continue
        for name, operator in operators:
            for start, _ in operator.mutation_positions(node):
                if not is_mark:
                    places[start].append((name, occurrences[name]))
                occurrences[name] += 1  # cosmic-ray counts a mark too
    return places


def _mutant(tree: Path, mutant: Mutant) -> Iterator[Mutant]:
    """Yield the mutant with the text of its line, unless its code is no Python or changes nothing but annotations."""
    source = (tree / mutant.file).read_text(encoding="utf-8")
    mutated = mutant.applied(source)
    try:
        if _without_annotations(mutated) == _without_annotations(source):
            return
    except SyntaxError:
        return
    before, after = (text.splitlines()[mutant.line - 1].strip() for text in (source, mutated))
    yield replace(mutant, before=before, after="" if mutant.operator.endswith("RemoveDecorator") else after)


def _without_annotations(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)

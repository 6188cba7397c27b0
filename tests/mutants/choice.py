"""The tests that are run for a mutant: some of those that run its statement, as the coverage says."""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

from tests.mutants.sample import Mutant, feature_of

MOST, SECONDS, FILES, LEAST = 60, 20.0, 12, 3
"""At most so many tests are chosen, of so many seconds, of so many files; but so many however long they take."""
NEAR_SECONDS = 200.0
"""The time of the tests of a file's room, all of which try a mutant that passes these."""


@dataclass(frozen=True)
class Test:
    name: str
    seconds: float
    breadth: int

    @property
    def function(self) -> str:
        return self.name.split("[")[0]

    @property
    def file(self) -> str:
        return self.name.split("::")[0]


class Coverage:
    def __init__(self, tree: Path, collected: Iterable[Path]) -> None:
        self.tree = tree
        self.tests: dict[str, Test] = {}
        self.failed: list[str] = []
        self._bits: dict[str, list[tuple[Test, int]]] = defaultdict(list)
        for path in sorted(collected):
            for name, facts in json.loads(gzip.decompress(path.read_bytes()))["tests"].items():
                bits = {file: int(text, 16) for file, text in facts["lines"].items()}
                if not facts["passed"]:
                    self.failed.append(name)
                elif bits:
                    test = Test(name, facts["seconds"], sum(each.bit_count() for each in bits.values()))
                    self.tests[name] = test
                    for file, each in bits.items():
                        self._bits[file].append((test, each))

    def leave_out(self, names: Iterable[str]) -> None:
        for name in names:
            self.tests.pop(name, None)
            self.failed.append(name)

    def of(self, file: str, lines: Iterable[int]) -> list[Test]:
        """Return the tests that run one of some lines, of those that run in calls and not in every new process."""
        mask = sum(1 << line for line in set(lines) & _lines_of_calls(self.tree / file))
        return [test for test, bits in self._bits[file] if bits & mask and test.name in self.tests]

    def of_mutant(self, mutant: Mutant) -> list[Test]:
        """Return the tests of the mutant's statement; of one that runs on import, of its function, names or file."""
        module = _parsed(self.tree / mutant.file)
        path = _enclosing(module, mutant.line)
        statement = path[-1]
        if tests := self.of(mutant.file, _own_lines(statement)):
            return tests
        within = [node for node in path if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        if within:
            return self.of(mutant.file, range(within[0].body[0].lineno, (within[0].end_lineno or 0) + 1))
        if isinstance(statement, ast.ClassDef):
            tests = self.of(mutant.file, range(statement.lineno, (statement.end_lineno or 0) + 1))
        return tests or self._of_names(_defined(path)) or self.of(mutant.file, range(1, 5000))

    def _of_names(self, names: Iterable[str]) -> list[Test]:
        found: dict[str, Test] = {}
        for name in names:
            word = re.compile(rf"\b{re.escape(name)}\b")
            for path in sorted((self.tree / "randlora").rglob("*.py")):
                lines = [i for i, text in enumerate(path.read_text("utf-8").splitlines(), 1) if word.search(text)]
                found |= {test.name: test for test in self.of(path.relative_to(self.tree).as_posix(), lines)}
        return list(found.values())


def chosen(mutant: Mutant, tests: Sequence[Test]) -> list[Test]:
    """Return a handful of tests, of many functions: some run little of the package, some are near, some fast, some any.

    Near are the tests of the file's room. Distributed ones are for sharded code, and where there are no others.
    """
    functions: dict[str, list[Test]] = defaultdict(list)
    fitting, room = _fitting(mutant, tests)
    for test in sorted(fitting, key=lambda test: (test.breadth, test.seconds, test.name)):
        functions[test.function].append(test)
    few = sorted(functions, key=lambda name: (functions[name][0].breadth, name))
    nearest = sorted(few, key=lambda name: not name.startswith(room))
    fast = sorted(functions, key=lambda name: (functions[name][0].seconds, name))
    mixed = sorted(functions, key=lambda name: sha256(name.encode()).digest())
    order = list(dict.fromkeys(name for names in zip(few, nearest, fast, mixed, strict=True) for name in names))
    taken: list[Test] = []
    files: set[str] = set()
    seconds = 0.0
    for test in (functions[name][turn] for turn in range(MOST) for name in order if turn < len(functions[name])):
        fits = seconds + test.seconds <= SECONDS and (test.file in files or len(files) < FILES)
        if fits or len(taken) < LEAST:
            taken.append(test)
            files.add(test.file)
            seconds += test.seconds
        if len(taken) == MOST:
            break
    return sorted(taken, key=lambda test: test.seconds)


def near(mutant: Mutant, tests: Sequence[Test]) -> list[Test]:
    """Return the tests of the file's room, as many as there is time for, those first that run little of the package."""
    fitting, room = _fitting(mutant, tests)
    found = sorted((test for test in fitting if test.name.startswith(room)), key=lambda test: test.breadth)
    ends = accumulate(test.seconds for test in found)
    return [test for test, end in zip(found, ends, strict=True) if end <= NEAR_SECONDS]


def _fitting(mutant: Mutant, tests: Sequence[Test]) -> tuple[Sequence[Test], str]:
    """Return the tests that fit a mutant, and how the names of those of its file's room begin."""
    if feature_of(mutant.file) == "sharded":
        return tests, "tests/distributed/"
    alone = [test for test in tests if not test.file.startswith("tests/distributed/")]
    return alone or tests, f"tests/test_{mutant.file.split('/')[1].removesuffix('.py')}"


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _lines_of_calls(path: Path) -> set[int]:
    functions = [node for node in ast.walk(_parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {line for node in functions for line in range(_first(node.body[0]), (node.end_lineno or 0) + 1)}


def _enclosing(module: ast.Module, line: int) -> list[ast.stmt]:
    """Return the statements that a line is part of, from the outermost in."""
    statements = (node for node in ast.walk(module) if isinstance(node, ast.stmt))
    return [each for each in statements if _first(each) <= line <= (each.end_lineno or 0)]


def _first(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(each.lineno for each in decorators)])


def _own_lines(statement: ast.stmt) -> range:
    body = getattr(statement, "body", None)
    last = _first(body[0]) - 1 if body else statement.end_lineno or 0
    return range(_first(statement), max(last, statement.lineno) + 1)


def _defined(path: list[ast.stmt]) -> list[str]:
    """Return the names that a statement outside of functions defines, or the class that it is in."""
    targets = [target for each in path[-1:] for target in getattr(each, "targets", [getattr(each, "target", None)])]
    names = [node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)]
    return names or [each.name for each in path if isinstance(each, ast.ClassDef)]

"""Sample faults, write them into a copy of the package one at a time, and count those that the tests catch."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tests.mutants.choice import Coverage, chosen, near
from tests.mutants.copies import Copies, Copy
from tests.mutants.runs import collect, run_chosen
from tests.mutants.sample import COUNTS, Mutant, feature_of, sampled

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result(Mutant):
    outcome: str
    """``caught``, ``timeout`` (which is caught too), ``survived``, or ``no test`` if none runs its statement."""
    tests: int
    by: str


def collect_all(copies: Copies, tree: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted((tree / "tests").rglob("test_*.py")) if path.parent.name != "site"]
    files = [path.relative_to(tree).as_posix() for path in paths]

    def one(copy: Copy, file: str) -> None:
        output = directory / (file.replace("/", "+") + ".json.gz")
        if not output.exists():
            began = time.monotonic()
            tests = copy.call(collect, file, wall=7200).result
            if tests is None:  # the next run tries it again
                say(f"{file}: not collected; see {copy.place / 'log'}")
                return
            output.write_bytes(gzip.compress(json.dumps({"tests": tests}).encode()))
            say(f"{file}: {len(tests)} tests in {time.monotonic() - began:.0f} s")

    copies.each(one, sorted(files, key=lambda file: "distributed" in file))


def measure(copies: Copies, coverage: Coverage, mutants: Sequence[Mutant], output: Path) -> None:
    known = {result.place for result in read(output)}

    def one(copy: Copy, mutant: Mutant) -> None:
        result = tried(copy, coverage, mutant)
        with output.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, NAMES, lineterminator="\n").writerow(asdict(result))
        say(f"{result.outcome}: {mutant.file}:{mutant.line} {mutant.operator} ({result.tests} tests) {result.by}")

    if not output.exists():
        write([], output)
    copies.each(one, [mutant for mutant in mutants if mutant.place not in known])


def tried(copy: Copy, coverage: Coverage, mutant: Mutant) -> Result:
    covering, outcome, known, failed = coverage.of_mutant(mutant), "no test", list[str](), list[str]()
    for choose in (chosen, near):
        tests = [test.name for test in choose(mutant, covering) if test.name not in known]
        if not tests or outcome in ("caught", "timeout"):
            break
        with copy.changed(mutant.file, mutant.applied((copy.root / mutant.file).read_text(encoding="utf-8"))):
            passed, failed, is_late = ran(copy, coverage, tests)
        if not (passed or failed or is_late) and not ran(copy, coverage, tests)[0]:
            raise RuntimeError(f"tests do not start without a fault either: see {copy.place / 'log'}, and --resume")
        outcome = "timeout" if is_late else "survived" if passed else "caught"
        known += tests
    return Result(**asdict(mutant), outcome=outcome, tests=len(known), by=failed[0] if failed else "")


def ran(copy: Copy, coverage: Coverage, tests: Sequence[str]) -> tuple[bool, list[str], bool]:
    cpu = 60 + 5 * int(sum(coverage.tests[name].seconds for name in tests))
    answer = copy.call(run_chosen, tests, cpu=cpu, wall=15 * cpu)
    passed, failed = answer.result or (False, [])
    return passed, failed, answer.is_late


def check(copies: Copies, coverage: Coverage, results: Sequence[Result]) -> list[str]:
    files: dict[str, set[str]] = {}
    for result in results:
        if result.by in coverage.tests:
            files.setdefault(result.by.split("::")[0], set()).add(result.by)
    failed: list[str] = []

    def one(copy: Copy, tests: set[str]) -> None:
        left = sorted(tests)
        while left and (found := ran(copy, coverage, left)[1]):
            failed.extend(found)
            left = [name for name in left if name not in found]

    copies.each(one, files.values())
    return failed


NAMES = [field.name for field in fields(Result)]


def read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    return [Result(**row | {name: int(row[name]) for name in ("line", "occurrence", "tests")}) for row in rows]


def write(results: Sequence[Result], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, results))


def as_table(results: Sequence[Result]) -> str:
    groups: dict[str, Counter[str]] = {part: Counter() for part in COUNTS}
    for result in results:
        groups[result.part][result.outcome] += 1
        if feature := feature_of(result.file):
            groups.setdefault(f"- {feature}", Counter())[result.outcome] += 1
    lines = [
        "| part | mutants | caught | of them by time | survived | no test | share |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in groups.items():
        caught, count = found["caught"] + found["timeout"], found.total()
        share = f"{caught / count:.1%}" if count else "–"
        rest = f"{found['timeout']} | {found['survived']} | {found['no test']} | {share} |"
        lines.append(f"| {name} | {count} | {caught} | {rest}")
    return "\n".join(lines)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--count", type=int, help="so many mutants of each part, instead of 300 and 200")
    parser.add_argument("--resume", action="store_true", help="go on with what the file has")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose last commit is measured")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tried at once")
    options = parser.parse_args(arguments)
    tree = options.tree.resolve()
    head = subprocess.run(
        ["git", "-C", tree, "rev-parse", "--short=7", "HEAD"], check=True, capture_output=True, text=True
    )
    output = Path(__file__).parent / f"{head.stdout.strip()}.csv"
    if not options.resume:
        output.unlink(missing_ok=True)
    place = ROOT / "build/mutants" / head.stdout.strip()
    copies = Copies(tree, place, options.jobs)
    collect_all(copies, tree, place / "contexts")
    run(copies, Coverage(tree, (place / "contexts").glob("*.gz")), options.count, output)
    print(as_table(read(output)))
    return 0


def run(copies: Copies, coverage: Coverage, count: int | None, output: Path) -> None:
    say(f"{len(coverage.tests):,} tests run lines of the package; {len(coverage.failed)} do not pass and are left out")
    samples = [sampled(coverage.tree, part, count or usual) for part, usual in COUNTS.items()]
    numbered = [(number / len(sample), mutant) for sample in samples for number, mutant in enumerate(sample)]
    mutants = [mutant for _, mutant in sorted(numbered, key=lambda pair: pair[0])]
    while True:
        measure(copies, coverage, mutants, output)
        results = read(output)
        if not (failed := check(copies, coverage, results)):
            return
        say(f"these fail without a mutant too, and are left out: {', '.join(failed)}")
        coverage.leave_out(failed)
        write([result for result in results if result.by not in failed], output)


if __name__ == "__main__":
    sys.exit(main())

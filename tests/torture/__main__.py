"""Run all campaigns, some at a time, and print their rows as one table."""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.torture import Row
from tests.torture.campaigns import CAMPAIGNS, run


def as_table(rows: Sequence[tuple[str, Row, float]]) -> str:
    lines = ["| campaign | what was tried | how many | failures | seconds | notes |", "|---|---|--:|--:|--:|---|"]
    lines += [
        f"| {name} | {row.tried} | {row.attempts:,} | {len(row.failures)} | {seconds:.0f} | {row.notes} |"
        for name, row, seconds in rows
    ]
    return "\n".join([*lines, *(f"\n{name}: {failure}" for name, row, _ in rows for failure in row.failures)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="0.01 makes a hundredth of all attempts")
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="campaigns that run at once")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")  # so that a campaign can fork and measure memory as a new process
    with ProcessPoolExecutor(options.jobs, spawn, max_tasks_per_child=1) as pool:
        running = [pool.submit(run, name, options.scale) for name in options.only]
        for done in as_completed(running):
            name, row, seconds = done.result()
            print(f"{name}: {row.attempts:,} in {seconds:.0f} s, {len(row.failures)} failed", file=sys.stderr)
    rows = [done.result() for done in running]
    print(as_table(rows))
    return int(any(row.failures for _, row, _ in rows))


if __name__ == "__main__":
    sys.exit(main())

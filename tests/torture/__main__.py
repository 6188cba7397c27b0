"""Run all campaigns, two at a time, print their rows as one table and write them to build/torture.json."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tests.torture.campaigns import CAMPAIGNS, run
from tests.torture.row import Row

RESULTS = Path("build/torture.json")


def as_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown, with the failures after it."""
    lines = ["| campaign | what was tried | how many | failures | seconds | notes |", "|---|---|--:|--:|--:|---|"]
    lines += [
        f"| {row.campaign} | {row.tried} | {row.count:,} | {len(row.failures)} | {row.seconds:.0f} | {row.notes} |"
        for row in rows
    ]
    lines += [f"\n{row.campaign}: {failure}" for row in rows for failure in row.failures]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaigns that were asked for, and return 1 if one of them has failures."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="0.01 makes a hundredth of all attempts")
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="campaigns that run at once")
    options = parser.parse_args(arguments)
    rows: dict[str, Row] = {}
    spawn = multiprocessing.get_context("spawn")  # so that a campaign can fork and measure memory as a new process
    with ProcessPoolExecutor(options.jobs, spawn, max_tasks_per_child=1) as pool:
        running = {pool.submit(run, name, options.scale): name for name in options.only}
        for done in as_completed(running):
            rows[running[done]] = row = done.result()
            print(f"{row.campaign}: {row.count:,} in {row.seconds:.0f} s, {len(row.failures)} failed", file=sys.stderr)
    table = [rows[name] for name in options.only]
    print(as_table(table))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([asdict(row) for row in table], indent=2) + "\n", encoding="utf-8")
    return int(any(row.failures for row in table))


if __name__ == "__main__":
    sys.exit(main())

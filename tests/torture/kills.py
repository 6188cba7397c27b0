"""Saves that are killed or fail: at each of their calls, at random times, on a full disk, and two at once."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from randlora.checkpoint import read
from tests.torture.faults import ERRORS, fast_disk, in_child, places
from tests.torture.replacing import NEW, OLD, SCENARIOS, Identity, Stage, after_a_kill, after_an_error, loaded, save
from tests.torture.row import Row

KILLS, SECONDS = 1000, 60.0
LONGEST_LIFE = 0.15  # seconds that a process saves before it is killed
KEPT = 5  # kills after which the next save must remove what they left
PAGE, LIMIT = 4096, 64  # bytes by which the space of a disk and the largest file grow, an adapter being of 2 KiB


def at_every_call(scale: float) -> Row:
    """Kill a write before each of its calls, and let each fail, for every scenario."""
    start, stride, tried, failures = time.monotonic(), max(1, round(1 / scale)), 0, list[str]()
    read.PATIENCE = 0.0  # no process replaces files while this one reads them
    for scenario in SCENARIOS:
        with fast_disk() as root:
            stage = Stage(scenario, root)
            for error in (None, *ERRORS):
                for at in count(1, stride):
                    broken = after_a_kill(stage, at) if error is None else after_an_error(stage, at, error)
                    if broken is None:
                        break
                    tried += 1
                    failures += broken
    notes = f"{len(SCENARIOS)} scenarios: {', '.join(scenario.name for scenario in SCENARIOS)}"
    what = "system calls of a save or a conversion, before each of which it was killed, or which failed"
    return Row("faults", what, tried, tuple(failures), time.monotonic() - start, notes)


@contextmanager
def saving(directory: Path, *options: dict[str, object]) -> Iterator[int]:
    """Save adapters by turns in another process, until the block ends or it is killed."""
    child = os.fork()
    if child == 0:
        try:
            for turn in count():
                save(directory, dict(options[turn % len(options)]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # a save that raises, which the parent sees
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def both(directory: Path) -> list[Identity]:
    """Save both adapters, one after the other, and return what each loads as."""
    found = []
    for options in (OLD, NEW):
        save(directory, options)
        found.append(loaded(directory))
    assert None not in found
    return found


def at_random_times(scale: float) -> Row:
    """Kill processes that save at random times, and load meanwhile and afterwards."""
    start, kills, reads, failures = time.monotonic(), max(1, round(KILLS * scale)), 0, list[str]()
    chance = random.Random(0)
    with fast_disk() as root:
        directory = root / "there"
        whole = both(directory)
        for kill in range(kills):
            with saving(directory, OLD, NEW):
                end = time.monotonic() + chance.uniform(0, LONGEST_LIFE)
                while time.monotonic() < end:
                    reads += 1
                    if loaded(directory) not in whole:
                        failures.append(f"kill {kill}: while a process saved, neither adapter loaded")
            if loaded(directory) not in whole:
                failures.append(f"kill {kill}: after it, neither adapter loaded")
            if kill % KEPT == KEPT - 1 or kill == kills - 1:
                save(directory, NEW)
                if loaded(directory) != whole[1] or any(name.startswith(".") for name in places(root / "there")):
                    failures.append(f"kill {kill}: the next save left {[*places(directory)]}")
    notes = f"{reads:,} loads meanwhile"
    return Row("kills", "processes killed while they saved", kills, tuple(failures), time.monotonic() - start, notes)


def two_writers(scale: float) -> Row:
    """Let two processes save into one directory while this one loads, for some time."""
    start, reads, failures, found = time.monotonic(), 0, list[str](), Counter[int]()
    with fast_disk() as root:
        directory = root / "there"
        whole = both(directory)
        with saving(directory, OLD) as first, saving(directory, NEW) as second:
            end = time.monotonic() + max(1.0, SECONDS * scale)
            while time.monotonic() < end:
                reads += 1
                adapter = loaded(directory)
                if adapter in whole:
                    found[whole.index(adapter)] += 1
                else:
                    failures.append(f"load {reads}: neither adapter")
            for child in (first, second):
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    failures.append("a save raised")
        save(directory, NEW)
        if any(name.startswith(".") for name in places(directory)):
            failures.append(f"hidden directories are left: {[*places(directory)]}")
    what = "loads while two processes saved into the directory"
    notes = f"{found[0]:,} of the one adapter, {found[1]:,} of the other"
    return Row("two writers", what, reads, tuple(failures), time.monotonic() - start, notes)


@contextmanager
def small_disk() -> Iterator[tuple[Path, str]]:
    """Yield a directory on a disk of 1 MiB, if this process may mount one, else on any; and which it is."""
    with fast_disk() as root:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", os.fspath(root)]
        is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            yield root, "a tmpfs" if is_mounted else "RLIMIT_FSIZE"
        finally:
            if is_mounted:
                subprocess.run(["umount", os.fspath(root)], check=True)


def _limited(action: Callable[[], object], nbytes: int) -> Callable[[], object]:
    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        action()

    return run


def on_a_full_disk(scale: float) -> Row:
    """Save over an adapter with every number of free pages, or every largest size of a file, from none to enough."""
    start, stride, tried, refused, failures = time.monotonic(), min(39, max(1, round(0.1 / scale))), 0, 0, list[str]()
    with small_disk() as (root, kind):
        directory, filler = root / "there", root / "filler"
        whole = both(directory)
        for free in range(0, 40, stride):
            save(directory, OLD)
            before = places(directory)
            action: Callable[[], object] = lambda: save(directory, NEW)  # noqa: E731
            if kind == "a tmpfs":
                available = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
                filler.write_bytes(bytes(max(0, available - free * PAGE)))
                outcome = in_child(action, error=errno.ENOSPC)
                filler.unlink()
            else:
                outcome = in_child(_limited(action, free * LIMIT), error=errno.EFBIG)
            tried += 1
            refused += outcome.raised == "OSError"
            if outcome.raised not in ("", "OSError") or outcome.was_killed:
                failures.append(f"{free}: {outcome.raised}")
            elif outcome.raised and places(directory) != before:
                failures.append(f"{free}: raised, and the old files are not as they were: {[*places(directory)]}")
            elif not outcome.raised and loaded(directory) != whole[1]:
                failures.append(f"{free}: did not raise, and the new adapter is not there")
        if not 0 < refused < tried:
            failures.append(f"{refused} of {tried} were refused: the disk was never full, or always")
    notes = f"{kind}; {refused} refused"
    return Row("disk full", "saves with little space", tried, tuple(failures), time.monotonic() - start, notes)

"""Saves that are killed or fail: at each of their calls, at random times, on a full disk, and two at once."""

import errno
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.torture import Row, share
from tests.torture.faults import ERRORS, FORK, fast_disk, in_child, places
from tests.torture.replacing import NEW, OLD, SCENARIOS, Identity, Stage, after_a_fault, loaded, save

KILLS, SECONDS = 1000, 60.0
LONGEST_LIFE = 0.15  # seconds that a process saves before it is killed
KEPT = 5  # kills after which the next save must remove what they left
PAGE, LIMIT = 4096, 64  # bytes by which the space of a disk and the largest file grow, an adapter being of 2 KiB


def at_every_call(scale: float) -> Row:
    tried, failures = 0, list[str]()
    for scenario in SCENARIOS:
        with fast_disk() as root:
            stage = Stage(scenario, root)
            for error in (None, *ERRORS):
                for at in count(1, share(1, 1 / scale)):
                    if (broken := after_a_fault(stage, at, error)) is None:
                        break
                    tried += 1
                    failures += broken
    what = "system calls of a save or a conversion, before each of which it was killed, or which failed"
    notes = f"{len(SCENARIOS)} scenarios: {', '.join(scenario.name for scenario in SCENARIOS)}"
    return Row(what, tried, failures, notes)


def _save_by_turns(directory: Path, adapters: tuple[dict[str, Any], ...]) -> None:
    for options in cycle(adapters):
        save(directory, options)


@contextmanager
def saving(directory: Path, *adapters: dict[str, Any]) -> Iterator[BaseProcess]:
    child = FORK.Process(target=_save_by_turns, args=(directory, adapters))
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def both(directory: Path) -> list[Identity]:
    found = []
    for options in (OLD, NEW):
        save(directory, options)
        found.append(loaded(directory))
    assert None not in found
    return found


def at_random_times(scale: float) -> Row:
    kills, reads, failures, chance = share(KILLS, scale), 0, list[str](), random.Random(0)
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
                if loaded(directory) != whole[1] or any(name.startswith(".") for name in places(directory)):
                    failures.append(f"kill {kill}: the next save left {[*places(directory)]}")
    return Row("processes killed while they saved", kills, failures, f"{reads:,} loads meanwhile")


def two_writers(scale: float) -> Row:
    failures, found = list[str](), Counter[int]()
    with fast_disk() as root:
        directory = root / "there"
        whole = [*both(directory), None]
        with saving(directory, OLD) as first, saving(directory, NEW) as second:
            end = time.monotonic() + max(1.0, SECONDS * scale)
            while time.monotonic() < end:
                adapter = loaded(directory)
                found[whole.index(adapter if adapter in whole else None)] += 1
            failures += ["a save raised" for child in (first, second) if child.exitcode is not None]
        save(directory, NEW)
        if any(name.startswith(".") for name in places(directory)):
            failures.append(f"hidden directories are left: {[*places(directory)]}")
    failures += ["a load had neither adapter"] * found[2]
    notes = f"{found[0]:,} of the one adapter, {found[1]:,} of the other"
    return Row("loads while two processes saved into the directory", found.total(), failures, notes)


@contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """Yield a directory on a disk of 1 MiB, if this process may mount one, else on any; and whether it may."""
    with fast_disk() as root:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", os.fspath(root)]
        is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            yield root, is_mounted
        finally:
            if is_mounted:
                subprocess.run(["umount", os.fspath(root)], check=True)


def _save_with_limit(directory: Path, nbytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
    save(directory, NEW)


def on_a_full_disk(scale: float) -> Row:
    tried, refused, failures = 0, 0, list[str]()
    with small_disk() as (root, is_mounted):
        directory, filler = root / "there", root / "filler"
        whole = both(directory)
        for free in range(0, 40, min(39, share(1, 0.1 / scale))):
            save(directory, OLD)
            before = places(directory)
            if is_mounted:
                available = os.statvfs(root).f_bavail * os.statvfs(root).f_frsize
                filler.write_bytes(bytes(max(0, available - free * PAGE)))
                outcome = in_child(partial(save, directory, NEW), error=errno.ENOSPC)
                filler.unlink()
            else:
                outcome = in_child(partial(_save_with_limit, directory, free * LIMIT), error=errno.EFBIG)
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
    notes = f"{'a tmpfs' if is_mounted else 'RLIMIT_FSIZE'}; {refused} refused"
    return Row("saves with little space", tried, failures, notes)

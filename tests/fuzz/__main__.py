"""Fuzz one target with atheris, on after findings: ``python -m tests.fuzz NAME [--seconds N] [--corpus DIRECTORY]``."""

import argparse
import faulthandler
import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["randlora"], enable_loader_override=False):
    import torch

    from tests.fuzz.files import CORPUS
    from tests.fuzz.limits import Violation
    from tests.fuzz.targets import TARGETS


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/randlora/" in frame.filename or "/tests/" in frame.filename] or frames
    lines = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-2:])]
    return " < ".join([type(error).__name__, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("name", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach more are kept, and found the next time")
    parser.add_argument("--out", type=Path, help="build/fuzz/NAME unless given")
    parser.add_argument("--seed", type=int, default=0, help="0 for another one every time")
    options = parser.parse_args()
    target, findings = TARGETS[options.name], options.out or Path("build/fuzz", options.name)
    findings.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.CRITICAL)
    faulthandler.enable()
    seen: set[str] = set()

    def run_one(data: bytes) -> None:
        try:
            target.run(data)
        except (Exception, Violation) as error:
            if (place := _place(error)) in seen:
                return
            seen.add(place)
            path = findings / f"finding_{len(seen)}"
            path.write_bytes(data)
            (findings / f"{path.name}.txt").write_text("".join(traceback.format_exception(error)), errors="replace")
            sys.stderr.write(f"FINDING {path}: {place}: {error!r:.300}\n")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = target.mutate(data, Random(seed), lambda part: atheris.Mutate(part, max(len(part) + 32, 64)))
        return changed if len(changed) <= max_size else data

    # what reaches more is written to the first folder
    folders = options.corpus or Path(tempfile.mkdtemp(prefix="corpus-")), CORPUS / options.name
    folders[0].mkdir(parents=True, exist_ok=True)
    limits = {"max_total_time": round(options.seconds), "max_len": 2**16, "timeout": 60, "rss_limit_mb": 4096}
    limits |= {"print_final_stats": 1, "len_control": 0, "detect_leaks": 0, "reload": 0, "seed": options.seed}
    arguments = [f"-artifact_prefix={findings}{os.sep}", *(f"-{name}={value}" for name, value in limits.items())]
    atheris.Setup([sys.argv[0], *arguments, *map(str, folders)], run_one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

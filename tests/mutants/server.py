"""A process that has imported what takes seconds, and forks one child for each run of pytest.

A script, run by its path in a copy of the tree that is measured, whose packages `randlora` and `tests` its children
import. Each line of its input asks for one run, and each line of its output says how that run ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

IMPORTED = ("torch._dynamo", "torch.distributed.fsdp", "hypothesis", "transformers", "peft", "pytest", "coverage")
MEMORY = 16 << 30


def main(answers: int) -> None:
    """Answer requests until there are no more."""
    here = str(Path(__file__).parent)
    sys.path[:] = [str(Path.cwd()), *(entry for entry in sys.path if entry != here), here]
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with os.fdopen(answers, "w", encoding="utf-8") as output:
        for line in sys.stdin:
            print(json.dumps(_run(json.loads(line))), file=output, flush=True)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Run pytest in a child, and end it with all that it started when its time is over."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        _as_child(request)
    is_late = False
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > request["wall"]:
            is_late = True
            _end(child)
        time.sleep(0.05)
    _end(child)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "late": is_late or code == -signal.SIGXCPU, "cpu": used.ru_utime + used.ru_stime}


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _as_child(request: dict[str, Any]) -> None:
    os.setpgid(0, 0)  # a session would be a group of the scheduler too, which does not have this one's priority
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = request["log"] + ".hypothesis"
    code = 70
    try:
        if request["kind"] == "collect":
            code = importlib.import_module("contexts").collect(request)
        else:
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"] + 5))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
            code = importlib.import_module("chosen").run_chosen(request)
    except BaseException:  # there is nobody else to tell
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))

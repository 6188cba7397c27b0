"""The arguments of the command line, in a prepared directory."""

from __future__ import annotations

import io
import json
import os
import warnings
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout

from randlora.cli.app import main
from tests.fuzz.files import laid_out, tree
from tests.fuzz.limits import bounded, writing_only
from tests.fuzz.seeds import prepared

LIMITS = (20.0, 1000)
MOST = 24
LONGEST_REGEX = 24


def target(data: bytes) -> None:
    """Run the command line with arguments that are the lines of ``data``."""
    arguments = [os.fsdecode(line) for line in data.replace(b"\0", b"").split(b"\n")][:MOST]
    if any(len(argument) > LONGEST_REGEX and "(" in argument for argument in arguments):
        return  # a regex of the user's, which may take any time
    with ExitStack() as stack:
        root = stack.enter_context(laid_out(prepared()))
        before = tree(root)
        stack.enter_context(chdir(root))
        stack.enter_context(writing_only(root))
        stack.enter_context(bounded(*LIMITS))
        code, out, err = run(arguments)
        after = tree(root)
        assert code in {0, 1, 2}, f"exit code {code}"
        assert "Traceback" not in err
        if code:
            refused = "NOT sound" in out or '"passed": false' in out  # which verify prints as a result
            assert after == before, "a command that failed changed files"
            assert err or refused, "a command that failed says nothing"
            assert not out or refused, "a command that failed printed a result"
            return
        lost = {name for name, held in before.items() if after.get(name) != held}
        assert not lost or "--overwrite" in arguments, f"{lost} changed"
        assert out, "a command that worked says nothing"
        if "--json" in arguments and out.startswith("{"):
            assert isinstance(json.loads(out), dict)


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command line with streams as strict as those of a process, and return its exit code and what it wrote."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = io.TextIOWrapper(out, "utf-8", "strict"), io.TextIOWrapper(err, "utf-8", "backslashreplace")
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(arguments)
        for stream in streams:
            stream.flush()
    return code, out.getvalue().decode(), err.getvalue().decode()

"""A copy of a tree that may be changed, and the server whose children run its tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parent / "server.py"
UNWRITTEN = "ignore::pytest.PytestAssertRewriteWarning"  # the server has imported plugins before
ARGUMENTS = ("-q", "--tb=short", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-W", UNWRITTEN)


class Runner:
    """A copy of the last commit of a tree, without its history, and a server of its own."""

    def __init__(self, tree: Path, place: Path) -> None:
        self.root, self.place = place / "tree", place
        if not self.root.exists():
            self.root.mkdir(parents=True)
            archive = subprocess.run(["git", "-C", tree, "archive", "HEAD"], check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", self.root], check=True, input=archive)
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        read, write = os.pipe()
        self._server = subprocess.Popen(
            [sys.executable, SERVER, str(write)],
            cwd=self.root,
            env={
                **inherited,
                "PYTHONPATH": str(self.root),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "DS_ACCELERATOR": "cpu",
                "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
            },
            stdin=subprocess.PIPE,
            pass_fds=[write],
            text=True,
        )
        os.close(write)
        self._answers = os.fdopen(read, encoding="utf-8")

    def collect(self, file: str, output: Path) -> dict[str, Any]:
        """Run a file of tests, and write which lines each of them runs."""
        return self._ask(kind="collect", file=file, output=str(output), wall=7200)

    def run(self, tests: list[str], seconds: float) -> dict[str, Any]:
        """Run tests, which take some seconds of the processor, until one fails; return how that ended and which did."""
        output = self.place / "run.json"
        output.unlink(missing_ok=True)
        cpu = 60 + 5 * int(seconds)
        answer = self._ask(
            kind="run", tests=tests, output=str(output), cpu=cpu, wall=15 * cpu, more=["-x", "--timeout=400"]
        )
        return {"failed": [], "ran": 0, **answer, **(json.loads(output.read_text()) if output.exists() else {})}

    @contextmanager
    def changed(self, file: str, text: str) -> Iterator[None]:
        """Give a file another text in a block, and another time, so that bytecode of the old one is not used."""
        path = self.root / file
        before, times = path.read_bytes(), path.stat()
        path.write_text(text, encoding="utf-8")
        try:
            yield
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def stop(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, *, more: list[str] | None = None, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None
        arguments = [*ARGUMENTS, *(more or []), f"--basetemp={self.place / 'temporary'}"]
        request |= {"arguments": arguments, "log": str(self.place / "log")}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._answers.readline())
        return answer

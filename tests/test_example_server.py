"""The example server: answers are those of the adapter alone, errors name what to do, and nobody waits in vain."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import server as load
from benchmarks.examples import imported
from benchmarks.server import Ask, post
from tests.examples import EXAMPLES
from tests.kit import until

pytestmark = pytest.mark.medium

ADAPTERS = 5


@pytest.fixture(scope="module")
def server() -> ModuleType:
    return imported("server")


@pytest.fixture(scope="module")
def adapters(server: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    server.make_adapters(server.tiny_model(), directory, ADAPTERS)
    return directory


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


class Gate:
    """Holds the model before it runs a batch, as if it were busy."""

    def __init__(self, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self._is_open = threading.Event(), threading.Event()
        self._generate: Callable[[list[Any]], list[list[int]]] = running.batcher._generate
        monkeypatch.setattr(running.batcher, "_generate", self._held)

    def _held(self, batch: list[Any]) -> list[list[int]]:
        self.has_begun.set()
        assert self._is_open.wait(60)
        return self._generate(batch)

    def open(self) -> None:
        self._is_open.set()


def together(running: Any, asks: list[Ask]) -> list[tuple[int, Any]]:
    with ThreadPoolExecutor(len(asks)) as clients:
        return list(clients.map(lambda ask: post(running.server_port, ask._asdict()), asks))


def while_busy(running: Any, asks: list[Ask], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Do as `together`, while the model runs another request, so that all are there when the next batch begins."""
    gate = Gate(running, monkeypatch)
    with ThreadPoolExecutor(2) as clients:
        other = clients.submit(post, running.server_port, {"prompt": "a", "max_new_tokens": 1})
        assert gate.has_begun.wait(30)
        answers = clients.submit(together, running, asks)
        until(lambda: len(running.batcher.waiting) == len(asks))
        gate.open()
        assert other.result(60)[0] == 200
        return answers.result(60)


def asked(count: int) -> list[Ask]:
    names = [None, *(f"tenant_{number}" for number in range(ADAPTERS))]
    return [
        Ask(names[number % len(names)], f"{number} upon a time"[: 3 + number], 2 + number % 3)
        for number in range(count)
    ]


@pytest.mark.parametrize("room", [ADAPTERS, 2])
def test_answers_are_those_of_the_adapter_alone(
    room: int, server: ModuleType, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = asked(13)
    with server.serving(server.tiny_model(), adapters, server.Limits(batch=13, adapters=room)) as running:
        found = while_busy(running, asks, monkeypatch)
        stats, counts = running.batcher.pool.stats(), running.batcher.counts
    assert {status for status, _ in found} == {200}
    answers = {ask: answer["ids"] for ask, (_, answer) in zip(asks, found, strict=True)}
    load.check(server, adapters, answers)
    assert len({tuple(ids) for ids in answers.values()}) > ADAPTERS
    assert [len(ids) for ids in answers.values()] == [ask.max_new_tokens for ask in asks]
    assert server.ended([5, 6, 2, 7], 2) == server.ended([5, 6, 2, 7], [9, 2]) == [5, 6]
    assert (counts["rows"], counts["tokens"]) == (1 + 13, 1 + sum(ask.max_new_tokens for ask in asks))
    assert counts["batches"] == 1 + (1 if room == ADAPTERS else 3)
    assert stats.evictions == (0 if room == ADAPTERS else 3)


REFUSED: dict[str, tuple[Any, int, str]] = {
    "unknown adapter": ({"adapter": "tenant_x", "prompt": "a"}, 404, "no adapter named 'tenant_x'; the nearest are"),
    "no object": ([], 400, "expected an object with a prompt"),
    "unknown field": ({"prompt": "a", "temperature": 1}, 400, "of the fields adapter, prompt, max_new_tokens"),
    "no prompt": ({"adapter": "tenant_0"}, 400, "expected an object with a prompt"),
    "empty prompt": ({"prompt": ""}, 400, "prompt a token at least"),
    "adapter of another type": ({"prompt": "a", "adapter": 3}, 400, "adapter must be a name or null"),
    "no tokens": ({"prompt": "a", "max_new_tokens": 0}, 400, "max_new_tokens must be a positive integer, got 0"),
    "half tokens": ({"prompt": "a", "max_new_tokens": 1.5}, 400, "max_new_tokens must be a positive integer, got 1.5"),
    "long prompt": ({"prompt": "a" * 513}, 413, "expected a prompt of 512 tokens"),
    "long answer": ({"prompt": "a", "max_new_tokens": 129}, 413, "got 1 and 129"),
    "long body": ({"prompt": "a" * 2**20}, 413, "expected a body of at most 1048576 bytes"),
}


def test_what_cannot_be_answered_is_refused_with_its_reason(server: ModuleType, adapters: Path) -> None:
    with server.serving(server.tiny_model(), adapters) as running:
        for what, (body, status, message) in REFUSED.items():
            try:
                found, answer = post(running.server_port, body)
            except ConnectionError:  # of a body that the server did not read
                assert what == "long body"
                continue
            assert (found, message in answer["error"]) == (status, True), (what, answer)
        for raw, headers, status in (
            (b"{", {}, 400),
            (b"\xff", {}, 400),
            (b"[" * 100_000, {}, 400),
            (b"", {"Content-Length": "-1"}, 411),
            (b"", {"Content-Length": "9" * 5000}, 413),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=30)
            connection.request("POST", "/generate", raw, headers)
            assert connection.getresponse().status == status, raw[:10]
        assert get(running.server_port, "/no")[0] == 404
        assert post(running.server_port, {"prompt": "\ud800", "max_new_tokens": 1})[0] == 200
        assert json.loads(get(running.server_port, "/adapters")[1])["adapters"] == [f"tenant_{n}" for n in range(5)]
        _, metrics = get(running.server_port, "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    assert (lines["randlora_rows"], lines["randlora_tokens"], lines["randlora_waiting"]) == ("1", "1", "0")
    assert lines['randlora_answers{status="400"}'] == "10"
    assert lines["randlora_pool_loaded"] == "0"


def test_requests_beyond_the_limit_are_refused_at_once_and_given_up_if_they_wait_too_long(
    server: ModuleType, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, body = server.Limits(waiting=3, batch=1), {"prompt": "a", "max_new_tokens": 1}
    with server.serving(server.tiny_model(), adapters, limits) as running, ThreadPoolExecutor(3) as clients:
        gate, port = Gate(running, monkeypatch), running.server_port
        answers = [clients.submit(post, port, body)]
        assert gate.has_begun.wait(30)
        monkeypatch.setattr(server, "PATIENCE", 0.2)
        assert post(port, body)[0] == 504
        monkeypatch.setattr(server, "PATIENCE", 60.0)
        answers += [clients.submit(post, port, body) for _ in range(2)]
        until(lambda: len(running.batcher.waiting) == 3)  # the one that was given up leaves with the next batch
        status, answer = post(port, body)
        gate.open()
        assert (status, answer["error"]) == (503, "3 requests wait: try again later")
        assert [answer.result(60)[0] for answer in answers] == [200] * 3
        assert running.batcher.counts["rows"] == 3  # and not the one that was given up


def test_damaged_files_of_one_adapter_fail_its_requests_alone_and_one_that_is_saved_later_is_served(
    server: ModuleType, tmp_path: Path
) -> None:
    server.make_adapters(server.tiny_model(), tmp_path, 3)
    (tmp_path / "tenant_2").rename(tmp_path.parent / "later")
    weights = tmp_path / "tenant_1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    asks = [Ask(name, "Once", 2) for name in ("tenant_0", "tenant_1", "tenant_2", None)]
    with server.serving(server.tiny_model(), tmp_path, server.Limits(batch=4, seconds=1.0)) as running:
        found = together(running, asks)
        assert [status for status, _ in found] == [200, 500, 404, 200]
        assert found[1][1]["error"].startswith("CheckpointError")
        (tmp_path.parent / "later").rename(tmp_path / "tenant_2")
        assert post(running.server_port, asks[2]._asdict())[0] == 200


def test_what_waits_is_answered_when_the_server_ends(
    server: ModuleType, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = server.Limits(batch=2)
    with ThreadPoolExecutor(5) as clients, server.serving(server.tiny_model(), adapters, limits) as running:
        gate, port = Gate(running, monkeypatch), running.server_port
        first, *later = asked(5)
        answers = [clients.submit(post, port, first._asdict())]
        assert gate.has_begun.wait(30)
        answers += [clients.submit(post, port, ask._asdict()) for ask in later]
        until(lambda: len(running.batcher.waiting) == 4)  # all have arrived before the server ends
        ending = threading.Thread(target=running.close)
        ending.start()
        until(lambda: bool(running.batcher._is_closing))
        gate.open()
        ending.join(60)
        assert [answer.result(60)[0] for answer in answers] == [200] * 5
        with pytest.raises(ConnectionError):
            post(port, {"prompt": "a"})
        assert not [thread for thread in threading.enumerate() if thread.name in {"batcher", "server"}]


@pytest.mark.slow
def test_the_program_ends_on_sigterm(adapters: Path) -> None:
    words = [sys.executable, str(EXAMPLES / "server.py"), "--port", "0", "--adapters", str(adapters)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        port = int(program.stdout.readline().rsplit(":", 1)[1])
        status, answer = post(port, {"adapter": "tenant_3", "prompt": "Once", "max_new_tokens": 2})
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0
    assert (status, len(answer["ids"])) == (200, 2)

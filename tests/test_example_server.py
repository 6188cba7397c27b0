"""The example server: answers are those of the adapter alone, errors name what to do, and nobody waits in vain."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import server as load
from benchmarks.examples import imported
from benchmarks.server import Ask, post
from tests.kit import until
from tests.pages import EXAMPLES

pytestmark = pytest.mark.medium

server: Any = imported("server")
ADAPTERS = 5


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters")
    server.make_adapters(server.tiny_model(), directory, ADAPTERS)
    return directory


def request(port: int, method: str, path: str, *given: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, *given)
    response = connection.getresponse()
    return response.status, response.read().decode()


class Gate:
    """Holds the model before it runs a batch, as if it were busy."""

    def __init__(self, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.is_open, generate = threading.Event(), threading.Event(), running.batcher._generate

        def held(batch: list[Any]) -> Any:
            self.has_begun.set()
            assert self.is_open.wait(60)
            return generate(batch)

        monkeypatch.setattr(running.batcher, "_generate", held)


def together(running: Any, asks: list[Ask]) -> list[tuple[int, Any]]:
    with ThreadPoolExecutor(len(asks)) as clients:
        return list(clients.map(lambda ask: post(running.server_port, ask._asdict()), asks))


@pytest.mark.parametrize("room", [ADAPTERS, 2])
def test_answers_are_those_of_the_adapter_alone(room: int, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [None, *(f"tenant_{number}" for number in range(ADAPTERS))]
    texts = [f"{number} upon a time"[: 3 + number] for number in range(13)]
    asks = [Ask(names[number % len(names)], text, 2 + number % 3) for number, text in enumerate(texts)]
    with server.serving(server.tiny_model(), adapters, server.Limits(batch=13, adapters=room)) as running:
        gate = Gate(running, monkeypatch)  # so that all are there when the next batch begins
        with ThreadPoolExecutor(2) as clients:
            other = clients.submit(post, running.server_port, {"prompt": "a", "max_new_tokens": 1})
            assert gate.has_begun.wait(30)
            answered = clients.submit(together, running, asks)
            until(lambda: len(running.batcher.waiting) == len(asks))
            gate.is_open.set()
            assert other.result(60)[0] == 200
            found = answered.result(60)
        counts, loaded = running.batcher.counts, running.batcher.pool.loaded
    assert {status for status, _ in found} == {200}
    answers = {ask: answer["ids"] for ask, (_, answer) in zip(asks, found, strict=True)}
    load.check(server, adapters, answers)
    assert len({tuple(ids) for ids in answers.values()}) > ADAPTERS
    assert [len(ids) for ids in answers.values()] == [ask.max_new_tokens for ask in asks]
    assert server.ended([5, 6, 2, 7], 2) == server.ended([5, 6, 2, 7], [9, 2]) == [5, 6]
    assert (counts["rows"], counts["tokens"]) == (1 + 13, 1 + sum(ask.max_new_tokens for ask in asks))
    assert counts["batches"] == 1 + (1 if room == ADAPTERS else 3)
    assert len(loaded) == room


A_PROMPT = "expected an object with a prompt"
REFUSED: list[tuple[Any, int, str]] = [
    ({"adapter": "tenant_x", "prompt": "a"}, 404, "no adapter named 'tenant_x': GET /adapters"),
    ([], 400, A_PROMPT),
    ({"adapter": "tenant_0"}, 400, A_PROMPT),
    ({"prompt": ""}, 400, "prompt a token at least"),
    ({"prompt": "a", "temperature": 1}, 400, "of the fields adapter, prompt, max_new_tokens"),
    ({"prompt": "a", "adapter": 3}, 400, "adapter must be a name or null"),
    ({"prompt": "a", "max_new_tokens": 0}, 400, "max_new_tokens must be a positive integer, got 0"),
    ({"prompt": "a" * 513}, 413, "expected a prompt of 512 tokens"),
    ({"prompt": "a", "max_new_tokens": 129}, 413, "got 1 and 129"),
]
RAW: list[tuple[bytes, dict[str, str], int]] = [
    *((raw, {}, 400) for raw in (b"{", b"\xff", b"[" * 100_000)),
    (b"", {"Content-Length": "-1"}, 411),
    *((b"", {"Content-Length": size}, 413) for size in ("1048577", "9" * 5000)),
]


def test_what_cannot_be_answered_is_refused_with_its_reason(adapters: Path) -> None:
    with server.serving(server.tiny_model(), adapters) as running:
        port = running.server_port
        for body, status, message in REFUSED:
            found, answer = post(port, body)
            assert (found, message in answer["error"]) == (status, True), answer
        for raw, headers, status in RAW:
            assert request(port, "POST", "/generate", raw, headers)[0] == status, raw[:10]
        assert request(port, "GET", "/no")[0] == 404
        assert post(port, {"prompt": "\ud800", "max_new_tokens": 1})[0] == 200
        assert json.loads(request(port, "GET", "/adapters")[1])["adapters"] == [f"tenant_{n}" for n in range(5)]
        _, metrics = request(port, "GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
    expected = {"rows": "1", "tokens": "1", "waiting": "0", 'answers{status="400"}': "9", "pool_loaded": "0"}
    assert {name: lines[f"randlora_{name}"] for name in expected} == expected


def test_requests_beyond_the_limit_are_refused_and_what_waits_is_answered_when_the_server_ends(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, body = server.Limits(waiting=3, batch=1), {"prompt": "a", "max_new_tokens": 1}
    with server.serving(server.tiny_model(), adapters, limits) as running, ThreadPoolExecutor(4) as clients:
        gate, port = Gate(running, monkeypatch), running.server_port
        answers = [clients.submit(post, port, body)]
        assert gate.has_begun.wait(30)
        monkeypatch.setattr(server, "PATIENCE", 0.2)
        assert post(port, body)[0] == 504
        assert not running.batcher.waiting, "what was given up is no longer in the line"
        monkeypatch.setattr(server, "PATIENCE", 60.0)
        answers += [clients.submit(post, port, body) for _ in range(3)]
        until(lambda: len(running.batcher.waiting) == 3)
        status, answer = post(port, body)
        assert (status, answer["error"]) == (503, "3 requests wait: try again later")
        ending = threading.Thread(target=running.close)
        ending.start()
        until(lambda: bool(running.batcher._is_closing))
        gate.is_open.set()
        ending.join(60)
        assert [answer.result(60)[0] for answer in answers] == [200] * 4
        assert running.batcher.counts["rows"] == 4  # and not the one that was given up
        with pytest.raises(ConnectionError):
            post(port, body)
        assert not [thread for thread in threading.enumerate() if thread.name in {"batcher", "server"}]


def test_a_request_whose_client_goes_leaves_the_line_and_is_not_counted_as_answered(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is one whose batch runs already, whose tokens nobody is sent."""
    body, limits = {"prompt": "a", "max_new_tokens": 1}, server.Limits(batch=1)
    monkeypatch.setattr(server, "LOOK", 0.05)
    with server.serving(server.tiny_model(), adapters, limits) as running, ThreadPoolExecutor(1) as clients:
        gate, port, gone = Gate(running, monkeypatch), running.server_port, list[http.client.HTTPConnection]()
        for waiting in (0, 1, 2):
            gone.append(http.client.HTTPConnection("127.0.0.1", port, timeout=30))
            gone[-1].request("POST", "/generate", json.dumps(body))
            assert gate.has_begun.wait(30)
            until(lambda: len(running.batcher.waiting) == waiting)  # noqa: B023
        stays = clients.submit(post, port, body)
        until(lambda: len(running.batcher.waiting) == 3)
        for connection in gone:
            connection.close()
        until(lambda: running.batcher.counts["given_up"] == 3)
        assert len(running.batcher.waiting) == 1
        gate.is_open.set()
        assert stays.result(60)[0] == 200
        metrics = running.metrics().splitlines()
    assert {'randlora_answers{status="200"} 1', "randlora_rows 2", "randlora_given_up 3"} <= {*metrics}


def test_damaged_files_of_one_adapter_fail_its_requests_alone_and_one_that_is_saved_later_is_served(
    tmp_path: Path,
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

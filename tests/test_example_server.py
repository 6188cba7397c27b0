"""The example server: answers are those of the adapter alone, and errors name what to do."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import server as load
from benchmarks.examples import imported
from benchmarks.server import Ask, post
from tests.kit import until

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

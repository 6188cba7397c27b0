"""A load test of `docs/examples/server.py` on this machine's loopback: batches of many adapters beside one by one.

Each client sends its next request when it has the answer to its last one. Every answer is compared with that of the
adapter alone in a model of its own.
"""

import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import randlora
from benchmarks.command import Settings, main
from benchmarks.examples import imported
from benchmarks.results import Row
from benchmarks.timing import Figure

ADAPTERS, CLIENTS, REQUESTS = 64, 64, 4  # requests of each client
NEW_TOKENS = 16
CLOSE = 1e-3  # a difference of logits that rounding in another batch may turn round
PERCENTILES = {50: "median latency", 95: "latency, 95th percentile", 99: "latency, 99th percentile"}


class Ask(NamedTuple):
    """What a client asks for."""

    adapter: str | None
    prompt: str
    max_new_tokens: int


class Found(NamedTuple):
    """What a load test found: the seconds of each request, those of all, and the answers."""

    latencies: list[float]
    seconds: float
    answers: dict[Ask, list[int]]


def asks() -> list[list[Ask]]:
    """Return what each client asks for: prompts of 4 to 43 bytes, for adapters in turn, a few for the base model."""
    words = "Once upon a time there was a dear little girl who was loved by everyone"
    return [
        [
            Ask(
                None if (number := client + CLIENTS * turn) % 17 == 16 else f"tenant_{number % ADAPTERS}",
                f"{number:03} {words[: number % 40]}",
                NEW_TOKENS,
            )
            for turn in range(REQUESTS)
        ]
        for client in range(CLIENTS)
    ]


def post(port: int, body: object) -> tuple[int, Any]:
    """Post a body to the server; return the status and what it answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/generate", json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def load_test(port: int) -> Found:
    """Let all clients ask, each its requests one after the other."""
    latencies: list[float] = []
    answers: dict[Ask, list[int]] = {}

    def client(own: Sequence[Ask]) -> None:
        for ask in own:
            begin = time.perf_counter()
            status, found = post(port, ask._asdict())
            latencies.append(time.perf_counter() - begin)
            if status != http.client.OK:
                raise AssertionError(f"{ask}: {status} {found}")
            answers[ask] = found["ids"]

    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(client, asks()))
    return Found(latencies, time.perf_counter() - begin, answers)


@torch.inference_mode()
def check(server: ModuleType, adapters: Path, answers: dict[Ask, list[int]]) -> int:
    """Compare every answer with that of its adapter alone, which was loaded by itself.

    Returns:
        How many differ from a token on at which two logits are as close as rounding; any other difference raises.
    """
    ties = 0
    for adapter in dict.fromkeys(ask.adapter for ask in answers):
        model: Any = server.tiny_model()
        if adapter is not None:
            randlora.load(model, adapters / adapter)
        for ask in (ask for ask in answers if ask.adapter == adapter):
            ids = torch.tensor([server.Text().encode(ask.prompt)])
            options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
            alone = model.generate(ids, max_new_tokens=ask.max_new_tokens, **options)
            expected = alone.sequences[0, ids.shape[1] :].tolist()
            if answers[ask] == expected:
                continue
            place = next(at for at, pair in enumerate(zip(answers[ask], expected, strict=True)) if len({*pair}) > 1)
            best = alone.logits[place][0].topk(2).values
            assert best[0] - best[1] < CLOSE, f"{ask}: {answers[ask]}, and alone {expected}"
            ties += 1
    return ties


def run(settings: Settings) -> Sequence[Row]:
    """Measure 64 clients; in full, with room for a quarter of the adapters too."""
    server, threads = imported("server"), torch.get_num_threads()
    torch.set_num_threads(1)  # the clients have the others
    try:
        with tempfile.TemporaryDirectory() as directory:
            adapters = Path(directory)
            server.make_adapters(server.tiny_model(), adapters, ADAPTERS)
            rooms = [ADAPTERS] if settings.is_quick else [ADAPTERS, ADAPTERS // 4]
            return [row for room in rooms for row in _rows(server, adapters, room)]
    finally:
        torch.set_num_threads(threads)


def _rows(server: ModuleType, adapters: Path, room: int) -> list[Row]:
    limits = server.Limits(adapters=room)
    found: dict[str, Found] = {}
    for name, own in {"one by one": replace(limits, batch=1), "batches": limits}.items():
        with server.serving(server.tiny_model(), adapters, own) as running:
            found[name] = load_test(running.server_port)
            counts = running.batcher.counts
        ties = check(server, adapters, found[name].answers)
        print(
            f"{name}, room for {room}: {len(found[name].answers)} answers equal those of the adapters alone, "
            f"{ties} of them up to ties; {counts['rows'] / counts['batches']:.1f} rows in a batch"
        )
    shares = {name: statistics.quantiles(each.latencies, n=100, method="inclusive") for name, each in found.items()}
    rows = [
        Row(f"{words}, room for {room}", {name: Figure.of([cuts[percent - 1]], "s") for name, cuts in shares.items()})
        for percent, words in PERCENTILES.items()
    ]
    requests = {name: Figure.of([each.seconds / len(each.latencies)], "s") for name, each in found.items()}
    return [*rows, Row(f"time of a request, room for {room}", requests)]


if __name__ == "__main__":
    main(("server", run))

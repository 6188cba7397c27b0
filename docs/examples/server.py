"""Serve many adapters of one language model over HTTP: requests for any of them share a batch.

`python docs/examples/server.py` serves 64 adapters of a tiny model with random weights, which speaks in bytes;
`--model` and `--adapters` take the directories of yours. Then

    curl -d '{"adapter": "tenant_7", "prompt": "Once", "max_new_tokens": 8}' http://127.0.0.1:8000/generate

One thread runs the model. It takes the requests that wait, as many as fit into a batch, and runs each row through its
own adapter; `randlora.serving.AdapterPool` loads those that are asked for. There is no encryption and there are no
accounts: put a proxy in front of it.
"""

import json
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import randlora
from randlora.serving import AdapterPool

LONGEST_BODY = 2**20  # bytes
FIELDS = ("adapter", "prompt", "max_new_tokens")
PATIENCE = 60.0  # seconds that a request waits for its answer
LOOK = 0.5  # seconds between two looks at whether its client still waits


@dataclass(frozen=True)
class Limits:
    """What a server takes on."""

    batch: int = 32  # requests in one batch, whatever their adapters
    adapters: int = 32  # that the model has at once
    waiting: int = 256  # requests; more are refused
    seconds: float = 0.005  # that a batch waits for more requests after its first
    prompt: int = 512  # tokens
    new_tokens: int = 128


class GivenUp(ConnectionError):  # noqa: N818 - it is the client's doing
    """The client of a request has gone, and gets no answer."""


class Refusal(Exception):  # noqa: N818 - it is the client's error, and an answer
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        """Make a refusal with the status of its answer, and what to do."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, the adapter that it is for, or ``None`` for the base model, and where the answer's tokens go."""

    adapter: str | None
    ids: list[int]
    max_new_tokens: int
    answer: Future[list[int]] = field(default_factory=Future)


class Batcher:
    """The thread that runs the model, and the requests that wait for it."""

    def __init__(self, model: nn.Module, pool: AdapterPool, limits: Limits) -> None:
        """Start the thread."""
        self.pool, self.limits, self.counts = pool, limits, Counter(batches=0, rows=0, tokens=0, given_up=0)
        self._model: Any = model
        self.waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="batcher")
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Let a request wait for a batch."""
        with self._changed:
            if self._is_closing:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down: ask another one")
            if len(self.waiting) >= self.limits.waiting:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"{len(self.waiting)} requests wait: try again later")
            self.waiting.append(request)
            self._changed.notify_all()

    def give_up(self, request: Request) -> None:
        """Take a request out of the line, unless its batch runs."""
        with self._changed:
            self.counts["given_up"] += 1
            if request.answer.cancel():
                self.waiting.remove(request)

    def close(self) -> None:
        """Refuse what comes, answer what waits, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self.waiting or not self._is_closing:
            self._serve(self._next_batch())

    def _serve(self, batch: list[Request]) -> None:
        """Answer the requests of a batch; if it fails, each alone, so that only those fail whose fault it is."""
        try:
            answers = self._generate(batch) if batch else []
            for request, answer in zip(batch, answers, strict=True):
                request.answer.set_result(answer)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            else:
                for request in batch:
                    self._serve([request])

    def _next_batch(self) -> list[Request]:
        """Wait for requests; return those of the next batch, which are none if all are given up or the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._is_closing)
            enough = time.monotonic() + self.limits.seconds
            while len(self.waiting) < self.limits.batch and not self._is_closing:
                if (left := enough - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            return list(self._taken())

    def _taken(self) -> Iterator[Request]:
        """Take requests in their order, but no more adapters than the model may have; the others stay in the line."""
        adapters: set[str] = set()
        later: list[Request] = []
        taken = 0
        while self.waiting and taken < self.limits.batch:
            request = self.waiting.popleft()
            wanted = adapters if request.adapter is None else adapters | {request.adapter}
            if len(wanted) > self.limits.adapters:
                later.append(request)
            else:
                request.answer.set_running_or_notify_cancel()  # from now on it is not given up
                adapters, taken = wanted, taken + 1
                yield request
        self.waiting.extendleft(reversed(later))

    @torch.inference_mode()
    def _generate(self, batch: list[Request]) -> list[list[int]]:
        """Continue all prompts of a batch greedily, each with its adapter; the shorter ones are padded on the left."""
        longest, device = max(len(request.ids) for request in batch), self._model.device
        ids = torch.tensor([[0] * (longest - len(request.ids)) + request.ids for request in batch])
        mask = torch.tensor([[0] * (longest - len(request.ids)) + [1] * len(request.ids) for request in batch])
        with self.pool.routed([request.adapter for request in batch]):
            found = self._model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(request.max_new_tokens for request in batch),
                do_sample=False,
                pad_token_id=0,
            )
        answers = [
            ended(row[: request.max_new_tokens], self._model.generation_config.eos_token_id)
            for row, request in zip(found[:, longest:].tolist(), batch, strict=True)
        ]
        self.counts.update(batches=1, rows=len(batch), tokens=sum(map(len, answers)))
        return answers


def ended(ids: list[int], eos: int | list[int] | None) -> list[int]:
    """Return an answer up to the first token that ends it, without that token."""
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


@dataclass(frozen=True)
class Text:
    """How text becomes tokens, and tokens text: byte by byte, or as the model's tokenizer does."""

    encode: Callable[[str], list[int]] = lambda text: list(text.encode(errors="replace"))
    decode: Callable[[list[int]], str] = lambda ids: bytes(ids).decode(errors="replace")


class Server(ThreadingHTTPServer):
    """The server: `POST /generate`, and `GET` of `/adapters`, `/metrics` and `/health`."""

    daemon_threads = False  # so that `server_close` waits for the answers that are being written
    request_queue_size = 128

    def __init__(self, model: nn.Module, pool: AdapterPool, limits: Limits, text: Text, port: int) -> None:
        """Bind to a port of this machine's loopback, and start the thread that runs the model."""
        super().__init__(("127.0.0.1", port), Handler)
        self.batcher, self.text = Batcher(model, pool, limits), text
        self.answers: Counter[int] = Counter()
        self.counting = threading.Lock()

    def close(self) -> None:
        """Take no more connections, answer all requests that are there, and end."""
        self.shutdown()
        self.batcher.close()
        self.server_close()

    def generate(self, body: object, is_gone: Callable[[], bool]) -> dict[str, Any]:
        """Answer a request, or raise a `Refusal`, or `GivenUp` if its client is gone."""
        request = self._request(body)
        self.batcher.submit(request)
        enough = time.monotonic() + PATIENCE
        while not wait([request.answer], min(LOOK, PATIENCE)).done:
            if is_gone():
                self.batcher.give_up(request)
                raise GivenUp
            if time.monotonic() >= enough:
                self.batcher.give_up(request)
                raise Refusal(HTTPStatus.GATEWAY_TIMEOUT, f"no answer after {PATIENCE:g} s: try again later")
        ids = request.answer.result()
        return {"adapter": request.adapter, "ids": ids, "text": self.text.decode(ids)}

    def _request(self, body: object) -> Request:
        """Check all of a request before anything is done for it."""
        limits, bad = self.batcher.limits, HTTPStatus.BAD_REQUEST
        if not isinstance(body, dict) or body.keys() - FIELDS or not isinstance(prompt := body.get("prompt"), str):
            raise Refusal(bad, f"expected an object with a prompt, which is text, of the fields {', '.join(FIELDS)}")
        adapter, count, ids = body.get("adapter"), body.get("max_new_tokens", 16), self.text.encode(prompt)
        if not isinstance(adapter, str | None) or not ids:
            raise Refusal(bad, "adapter must be a name or null, and prompt a token at least")
        if type(count) is not int or count < 1:
            raise Refusal(bad, f"max_new_tokens must be a positive integer, got {count!r:.80}")
        if len(ids) > limits.prompt or count > limits.new_tokens:
            message = f"expected a prompt of {limits.prompt} tokens and max_new_tokens of {limits.new_tokens} at most"
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{message}, got {len(ids)} and {count}")
        if adapter is not None and adapter not in self.batcher.pool.names:
            raise Refusal(HTTPStatus.NOT_FOUND, f"there is no adapter named {adapter!r:.80}: GET /adapters lists all")
        return Request(adapter, ids, count)

    def metrics(self) -> str:
        """Return all counters as Prometheus reads them."""
        counted = {**self.batcher.counts, "pool_loaded": len(self.batcher.pool.loaded)}
        counted["waiting"] = len(self.batcher.waiting)
        with self.counting:
            counted |= {f'answers{{status="{status:d}"}}': count for status, count in sorted(self.answers.items())}
        return "".join(f"randlora_{name} {value}\n" for name, value in counted.items())


class Handler(BaseHTTPRequestHandler):
    """Reads one request and writes its answer."""

    server: Server
    timeout = 10.0  # seconds that a client may be silent

    def do_GET(self) -> None:
        """Show what there is."""
        pages: dict[str, Callable[[], object]] = {
            "/adapters": lambda: {"adapters": list(self.server.batcher.pool.names)},
            "/health": lambda: {"status": "ok"},
            "/metrics": self.server.metrics,
        }
        page = pages.get(self.path, lambda: {"error": f"there is no page {self.path!r:.80}"})
        self._answer(HTTPStatus.OK if self.path in pages else HTTPStatus.NOT_FOUND, page())

    def do_POST(self) -> None:
        """Generate."""
        try:
            if self.path != "/generate":
                raise Refusal(HTTPStatus.NOT_FOUND, f"there is nothing to post to {self.path!r:.80}: post to /generate")
            self._answer(HTTPStatus.OK, self.server.generate(self._body(), self._is_gone))
        except GivenUp:
            self.close_connection = True
        except Refusal as refusal:
            self._answer(refusal.status, {"error": str(refusal)})
        except Exception as error:  # whatever the model raised
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"{type(error).__name__}: {error}"})

    def _is_gone(self) -> bool:
        """Whether the client has closed the connection, of which there is nothing to read then."""
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def _body(self) -> object:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "expected a body with its Content-Length")
        if len(length) > 9 or int(length) > LONGEST_BODY:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a body of at most {LONGEST_BODY} bytes")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None

    def _answer(self, status: HTTPStatus, content: object) -> None:
        """Write an answer: text as it is, all else as JSON."""
        kind, text = ("text/plain", content) if isinstance(content, str) else ("application/json", json.dumps(content))
        with self.server.counting:
            self.server.answers[status] += 1
        with suppress(ConnectionError):  # the client may be gone
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(raw := text.encode())))
            self.end_headers()
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Log nothing: `/metrics` counts."""


def tiny_model() -> LlamaForCausalLM:
    """Make a model of bytes, always with the same weights, in the place of one that you would load."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes)).eval()


def make_adapters(model: nn.Module, directory: Path, count: int) -> None:
    """Save adapters with random values, in the place of those that were trained, each in a directory of its name."""
    for number in range(count):
        name = f"tenant_{number}"
        randlora.inject(model, r=8, alpha=64, name=name)
        for parameter in randlora.trainable_parameters(model):
            nn.init.normal_(parameter, std=0.2)
        randlora.save(model, directory / name, name=name)
        randlora.remove(model, name)


@contextmanager
def serving(
    model: nn.Module, adapters: Path, limits: Limits = Limits(), text: Text = Text(), port: int = 0
) -> Iterator[Server]:
    """Serve inside a ``with`` block, on a port that is free unless one is given."""
    pool = AdapterPool(model, adapters, max_loaded=limits.adapters)
    server = Server(model, pool, limits, text, port)
    threading.Thread(target=server.serve_forever, name="server").start()
    try:
        yield server
    finally:
        server.close()


def main(
    model: Annotated[
        Path | None, typer.Option(exists=True, help="Directory of a model; a tiny one if left out.")
    ] = None,
    adapters: Annotated[Path | None, typer.Option(exists=True, help="Directory of adapters, each in its own.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 for any that is free.")] = 8000,
    batch: Annotated[int, typer.Option(help="Requests in one batch, at most.")] = Limits.batch,
    max_loaded: Annotated[int, typer.Option(help="Adapters in the model at once, at most.")] = Limits.adapters,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer what waits, and end."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    with tempfile.TemporaryDirectory() as made:
        network: Any = tiny_model() if model is None else AutoModelForCausalLM.from_pretrained(model).eval()
        tokenizer: Any = None if model is None else AutoTokenizer.from_pretrained(model)
        text = Text() if model is None else Text(tokenizer.encode, tokenizer.decode)
        if adapters is None:
            make_adapters(network, Path(made), 64)
        with serving(network, adapters or Path(made), Limits(batch, max_loaded), text, port) as server:
            print(f"serving at http://127.0.0.1:{server.server_port}", flush=True)
            asked.wait()


if __name__ == "__main__":
    typer.run(main)

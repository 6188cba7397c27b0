"""Chromium, and a server of the built site, both started once."""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.site.looks import SITE, Look

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


class Handler(SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("this machine has no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def contexts(browser: Browser) -> dict[Look, BrowserContext]:
    """The profiles by look: each keeps what the pages have in common."""
    return {}


@pytest.fixture
def look() -> Look:
    """The look of tests that do not range over looks."""
    return Look("light", "desktop")


@pytest.fixture
def page(look: Look, browser: Browser, address: str, contexts: dict[Look, BrowserContext]) -> Iterator[Page]:
    """An empty page with a look."""
    if look not in contexts:
        contexts[look] = look.context(browser, address)
    opened = contexts[look].new_page()
    yield opened
    opened.close()

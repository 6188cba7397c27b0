"""The site in a real browser: every page in every look, links, old addresses and search."""

import re
import runpy
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import NamedTuple

import pytest
from PIL import Image, ImageStat
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.pages import ROOT

SITE, SCREENSHOTS = ROOT / "build" / "site", ROOT / "build" / "site-screenshots"
MOVED = runpy.run_path(str(ROOT / "docs" / "assets" / "moved.py"))
GONE = {MOVED["folder"](old) + "/index.html" for old in MOVED["MOVED"] if "#" not in old}
FILES = {page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html")} - GONE
PAGES = sorted(file.removesuffix("index.html") for file in FILES)
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


class Look(NamedTuple):
    is_dark: bool
    is_phone: bool

    def __str__(self) -> str:
        return f"{'dark' if self.is_dark else 'light'}-{'phone' if self.is_phone else 'desktop'}"

    @property
    def width(self) -> int:
        return 390 if self.is_phone else 1280


LOOKS = [Look(is_dark, is_phone) for is_dark in (False, True) for is_phone in (True, False)]

# Elements of the text that stick out of the screen, and of no box that scrolls
STICKING_OUT = """width => [...document.querySelectorAll(".md-content *")].filter(element => {
    if (element.getBoundingClientRect().right <= width + 1) return false;
    for (let box = element.parentElement; box.matches(".md-content *"); box = box.parentElement)
        if (getComputedStyle(box).overflowX != "visible") return false;
    return true;
}).map(element => element.outerHTML.slice(0, 100))"""

# First cells that leave with the rest when their tables are scrolled to the end, and not just over the margin
SHIFTED = """() => [...document.querySelectorAll(".md-typeset__scrollwrap")].flatMap(box => {
    const cells = [...box.querySelectorAll("tr > :first-child")];
    const before = cells.map(cell => cell.getBoundingClientRect().left);
    box.scrollLeft = box.scrollWidth;
    return cells.filter((cell, i) => Math.abs(cell.getBoundingClientRect().left - before[i]) > box.clientWidth / 10);
}).map(cell => cell.textContent)"""

# Code that lies under a button
COVERED = """() => [...document.querySelectorAll(".md-code__button")].flatMap(button => {
    const box = button.getBoundingClientRect(), range = document.createRange();
    range.selectNodeContents(button.closest(".highlight").querySelector("code"));
    return [...range.getClientRects()].filter(text =>
        text.width && text.height < box.height && text.right > box.left + 4 && text.left < box.right
        && text.bottom > box.top + 4 && text.top < box.bottom - 4).map(() => range.toString().slice(0, 100));
})"""

# Words in tables that are broken over two lines, but for code and links
BROKEN = r"""() => [...document.querySelectorAll("table:not([class]) :is(th, td)")].flatMap(cell => {
    const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), range = document.createRange(), found = [];
    while (texts.nextNode()) {
        const text = texts.currentNode;
        if (text.parentElement.closest("code, a")) continue;
        for (const word of text.textContent.matchAll(/\w+/g)) {
            range.setStart(text, word.index);
            range.setEnd(text, word.index + word[0].length);
            if (range.getClientRects().length > 1) found.push(word[0]);
        }
    }
    return found;
})"""


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("this machine has no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("localhost", 0), partial(Handler, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def look() -> Look:
    return Look(is_dark=False, is_phone=False)


@pytest.fixture
def page(look: Look, browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(
        base_url=address,
        viewport={"width": look.width, "height": 844 if look.is_phone else 800},
        color_scheme="dark" if look.is_dark else "light",
        is_mobile=look.is_phone,
        has_touch=look.is_phone,
    )
    yield context.new_page()
    context.close()


def problems_of(page: Page) -> list[str]:
    """Return a list that grows by what goes wrong on a page: scripts, requests, and those that leave the machine."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    page.on("request", lambda request: None if "//localhost:" in request.url else problems.append(request.url))
    page.on("response", lambda response: None if response.ok else problems.append(f"{response.status}: {response.url}"))
    return problems


def is_dark(png: bytes) -> bool:
    return ImageStat.Stat(Image.open(BytesIO(png)).convert("L")).median[0] < 128


def test_the_site_is_built() -> None:
    assert {"", "404.html", "api/", "api/model/", "quickstart/"} <= {*PAGES}


@pytest.mark.parametrize("address_of_page", PAGES)
@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_a_page_fits_the_screen_in_its_palette_and_reports_no_error(
    address_of_page: str, look: Look, page: Page
) -> None:
    problems = problems_of(page)
    page.goto(address_of_page)
    assert problems == []
    assert page.locator("h1").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= look.width
    assert page.evaluate(STICKING_OUT, look.width) == page.evaluate(COVERED) == page.evaluate(BROKEN) == []
    assert page.locator("img").evaluate_all("all => all.filter(image => !image.naturalWidth).length") == 0
    height = min(page.evaluate("document.documentElement.scrollHeight"), 4000)  # enough to look at
    name = address_of_page.strip("/").replace("/", "-") or "index"
    shot = page.screenshot(
        path=SCREENSHOTS / str(look) / f"{name}.png",
        full_page=True,
        animations="disabled",
        clip={"x": 0, "y": 0, "width": look.width, "height": height},
    )
    for png in (shot, *(figure.screenshot() for figure in page.locator(".md-content img").all())):
        assert is_dark(png) == look.is_dark
    assert page.evaluate(SHIFTED) == []
    assert page.locator("math").filter(has_text="\\").all_text_contents() == []


def test_every_link_leads_to_a_page_and_to_an_anchor_on_it(page: Page, address: str) -> None:
    links: dict[str, list[str]] = {}
    anchors: dict[str, set[str]] = {}
    for each in PAGES:
        page.goto(each)
        links[each] = page.locator("a[href]").evaluate_all("all => all.map(link => link.href)")
        anchors[each] = {*page.locator("[id]").evaluate_all("all => all.map(element => element.id)"), ""}
    for target in (target for targets in links.values() for target in targets if target.startswith(address)):
        path, _, anchor = target.removeprefix(address).partition("#")
        assert anchor in anchors.get(path, {""} if (SITE / path).is_file() else {}), target
    assert any("#" in target for target in links["api/"])


def test_anchors_of_the_api_when_it_was_one_page_lead_to_the_page_of_the_topic(page: Page, address: str) -> None:
    page.goto("api/#randlora.model.merge.merge")
    expect(page).to_have_url(f"{address}api/model/#randlora.model.merge.merge")
    page.goto("api/#merging")
    expect(page).to_have_url(f"{address}api/#merging")


@pytest.mark.parametrize(("old", "new"), MOVED["MOVED"].items())
def test_an_old_address_leads_to_where_its_text_is_now(old: str, new: str, page: Page, address: str) -> None:
    page.goto(MOVED["address"](old, "index.md"))
    expect(page).to_have_url(address + MOVED["address"](new, "index.md").removeprefix("./"))
    assert "#" not in new or page.locator(f"[id='{new.split('#')[1]}']").count() == 1


FOUND = {
    "merging/": ["merge"],
    "serving/": ["serve", "vllm"],
    "saving/": ["save", "checkpoint"],
    "scale/": ["memory"],
    "recipes/quantized/": ["qlora"],
    "recipes/axolotl/": ["axolotl", "yaml"],
    "recipes/preferences/": ["dpo", "grpo"],
    "converting/": ["ollama", "llama.cpp"],
    "troubleshooting/": ["OOM", "CUDA out of memory", "VRAM", "NaN", "loss does not decrease"],
    "training/": ["resume"],
    "from_peft/": ["peft"],
    "targets/": ["target_modules"],
    "learning_rate/": ["learning rate"],
}


@pytest.mark.parametrize(("words", "found"), [(each, found) for found, words in FOUND.items() for each in words])
def test_the_search_finds_the_page_of_the_guide_first(words: str, found: str, page: Page, address: str) -> None:
    page.goto("")
    page.get_by_role("textbox", name="Search").fill(words)
    first = page.locator(".md-search-result__item > .md-search-result__link").first
    expect(first).to_have_attribute("href", re.compile(rf"^{address}{found}"))

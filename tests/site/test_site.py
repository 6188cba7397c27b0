"""The site in a real browser: every page in every look, links, search, and the buttons that copy."""

import re
from io import BytesIO

import pytest
from PIL import Image, ImageStat
from playwright.sync_api import Page, expect

from tests.site.looks import LOOKS, PAGES, SCREENSHOTS, SITE, Look, problems_of

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


def test_the_site_is_built() -> None:
    assert {"", "404.html", "api/", "api/inject/", "quickstart/"} <= {*PAGES}


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
    assert page.evaluate(STICKING_OUT, look.width) == []
    assert page.evaluate(COVERED) == []
    assert page.evaluate(BROKEN) == []
    assert page.locator("img").evaluate_all("all => all.filter(image => !image.naturalWidth).length") == 0
    height = min(page.evaluate("document.documentElement.scrollHeight"), 4000)  # enough to look at
    name = address_of_page.strip("/").replace("/", "-") or "index"
    shot = page.screenshot(
        path=SCREENSHOTS / str(look) / f"{name}.png",
        full_page=True,
        animations="disabled",
        clip={"x": 0, "y": 0, "width": look.width, "height": height},
    )
    assert is_dark(shot) == (look.scheme == "dark")
    for figure in page.locator(".md-content img").all():
        assert is_dark(figure.screenshot()) == (look.scheme == "dark")
    assert page.evaluate(SHIFTED) == []
    assert page.locator("math").filter(has_text="\\").all_text_contents() == []


@pytest.mark.parametrize("address_of_page", [each for each in PAGES if each.startswith("results")])
def test_tables_of_results_show_metric_and_drift_without_scrolling(address_of_page: str, page: Page) -> None:
    page.goto(address_of_page)
    for cell in page.locator("th", has_text=re.compile("^drift$")).all():
        box = cell.locator("xpath=ancestor::*[@class='md-typeset__scrollwrap']")
        seen, wanted = box.bounding_box(), cell.bounding_box()
        assert seen
        assert wanted
        assert wanted["x"] + wanted["width"] <= seen["x"] + seen["width"]


def is_dark(png: bytes) -> bool:
    return ImageStat.Stat(Image.open(BytesIO(png)).convert("L")).median[0] < 128


def test_every_link_leads_to_a_page_and_to_an_anchor_on_it(page: Page, address: str) -> None:
    links: dict[str, list[str]] = {}
    anchors: dict[str, set[str]] = {}
    for each in PAGES:
        page.goto(each)
        links[each] = page.locator("a[href]").evaluate_all("all => all.map(link => link.href)")
        anchors[each] = {*page.locator("[id]").evaluate_all("all => all.map(element => element.id)"), ""}
    broken = []
    for each, targets in links.items():
        for target in targets:
            path, _, anchor = target.removeprefix(address).partition("#")
            if target.startswith(address) and anchor not in anchors.get(path, {""} if (SITE / path).is_file() else {}):
                broken.append(f"{each}: {target}")
    assert broken == []
    assert any("#" in target for target in links["api/"])


def test_anchors_of_the_api_when_it_was_one_page_lead_to_the_page_of_the_topic(page: Page, address: str) -> None:
    page.goto("api/#randlora.model.merge.merge")
    expect(page).to_have_url(f"{address}api/merging/#randlora.model.merge.merge")
    page.goto("api/#merging")
    expect(page).to_have_url(f"{address}api/#merging")


@pytest.mark.parametrize("look", LOOKS[:2], ids=str)
def test_the_search_finds_inject(look: Look, page: Page) -> None:
    page.goto("")
    if look.device == "phone":
        page.locator(".md-header__button[for=__search]").click()
    page.get_by_role("textbox", name="Search").fill("inject")
    found = page.locator(".md-search-result__link[href*='api/'][href*='.inject']").first
    expect(found).to_contain_text("inject")
    found.click()
    expect(page.locator("h3[id$='.inject']")).to_be_in_viewport()


@pytest.mark.parametrize("address_of_page", ["", "quickstart/"])
def test_the_buttons_copy_the_code_beside_them(address_of_page: str, page: Page) -> None:
    page.goto(address_of_page)
    blocks = page.locator(".highlight:has(pre):not(.language-text)").all()
    assert blocks
    for block in blocks:
        block.hover()
        block.locator("button[data-md-type=copy]").click()
        page.wait_for_function(
            "text => navigator.clipboard.readText().then(copied => copied.trim() == text)",
            arg=block.locator("code").text_content().strip(),
        )


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("merge", "merging/"),
        ("serve", "serving/"),
        ("vllm", "serving/"),
        ("save", "saving/"),
        ("checkpoint", "saving/"),
        ("memory", "scale/"),
        ("qlora", "recipes/quantized/"),
        ("axolotl", "other_trainers/"),
        ("resume", "training/"),
        ("peft", "from_peft/"),
        ("target_modules", "targets/"),
        ("learning rate", "learning_rate/"),
    ],
)
def test_the_search_finds_the_page_of_the_guide_first(words: str, found: str, page: Page, address: str) -> None:
    page.goto("")
    page.get_by_role("textbox", name="Search").fill(words)
    first = page.locator(".md-search-result__item > .md-search-result__link").first
    expect(first).to_have_attribute("href", re.compile(rf"^{address}{found}"))

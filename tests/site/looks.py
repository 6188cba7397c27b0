"""The looks in which each page of the site is opened, and what a page that is open went wrong with."""

from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(__file__).parent.parent.parent
SITE = ROOT / "build" / "site"
SCREENSHOTS = ROOT / "build" / "site-screenshots"
PAGES = sorted(page.relative_to(SITE).as_posix().removesuffix("index.html") for page in SITE.rglob("*.html"))


@dataclass(frozen=True)
class Look:
    """A palette and a size of screen."""

    scheme: str
    device: str

    def __str__(self) -> str:
        return f"{self.scheme}-{self.device}"

    @property
    def width(self) -> int:
        return {"phone": 390, "desktop": 1280}[self.device]

    def context(self, browser: Browser, address: str) -> BrowserContext:
        """Open a browser's profile that has this look."""
        is_phone = self.device == "phone"
        return browser.new_context(
            base_url=address,
            viewport={"width": self.width, "height": 844 if is_phone else 800},
            color_scheme="dark" if self.scheme == "dark" else "light",
            is_mobile=is_phone,
            has_touch=is_phone,
            permissions=["clipboard-read", "clipboard-write"],
        )


LOOKS = [Look(scheme, device) for scheme in ("light", "dark") for device in ("phone", "desktop")]


def problems_of(page: Page) -> list[str]:
    """Return a list that grows by what goes wrong on a page: scripts, requests, and those that leave the machine."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
    page.on("request", lambda request: None if "//localhost:" in request.url else problems.append(request.url))
    page.on("response", lambda response: None if response.ok else problems.append(f"{response.status}: {response.url}"))
    return problems

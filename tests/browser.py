"""A headless Chromium for tests of pages: Debian's, driven by Playwright. It may reach this machine only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

HERE = ("127.0.0.1", "localhost")
OWN_SCHEMES = ("file", "data", "blob")  # what a page brings along itself
WIDTHS = (1280, 420)  # of a screen and of a telephone, pixels

OpenPage = Callable[..., object]


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """The browser, for the tests of one file; REQUIRE_BROWSER=1 makes its absence a failure."""
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("REQUIRE_BROWSER is set, but Debian's package chromium is missing")
        pytest.skip("needs Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium) -> Iterator[OpenPage]:
    """A function of address, width and theme that opens a page.

    At its end the test fails if a page asked another machine for anything, or if a script failed.
    """
    foreign: list[str] = []
    errors: list[str] = []
    pages = []

    def note(request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in OWN_SCHEMES and address.hostname not in HERE:
            foreign.append(request.url)

    def open_it(address: str, width: int = WIDTHS[0], dark: bool = False, height: int = 900):
        scheme = "dark" if dark else "light"
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(120_000)
        page.on("request", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert not foreign, f"a page asked other machines: {foreign}"
    assert not errors, f"a script of a page failed: {errors}"


def assert_fits(page) -> None:
    """Nothing is wider than the window, so nobody has to scroll sideways."""
    wide, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, f"the page is {wide} pixels wide in a window of {window}"

"""Headless Chromium, driven by selenium through the system's chromedriver, without a network."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

DRIVER = "chromedriver"
REQUIRED = "DIFFSYNTH_REQUIRE_BROWSER"
"""An environment variable: when it is set, a missing browser is a failure."""
SECONDS = 30
"""How long an element is waited for: a change of the address behind `#` comes some time after the click."""
OPTIONS = (
    *("--headless", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"),
    *("--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
"""Every request over a network, of the page or of the browser itself, ends at a closed port."""


def missing() -> bool:
    """Whether there is no browser to test with."""
    return shutil.which(DRIVER) is None


@contextmanager
def browser(width: int = 1440, height: int = 1200) -> Iterator[Chrome]:
    """A browser for the length of the block."""
    options = ChromeOptions()
    for argument in (*OPTIONS, f"--window-size={width},{height}"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with mock.patch.dict(os.environ, no_proxy="*"):  # the driver listens at 127.0.0.1
        window = Chrome(options, ChromeService(shutil.which(DRIVER)))  # given no path, selenium downloads a driver
    try:
        window.implicitly_wait(SECONDS)
        yield window
    finally:
        window.quit()


def open_page(window: Chrome, address: str) -> None:
    """Load a page, also if only the part of its address behind `#` is another."""
    window.get("about:blank")
    window.get(address)


def use_color_scheme(window: Chrome, scheme: str) -> None:
    """Show pages as to a user who prefers `light` or `dark`."""
    preference = {"name": "prefers-color-scheme", "value": scheme}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})


def console(window: Chrome) -> list[str]:
    """Messages of the console since it was last asked for, violations of the policy among them."""
    return [entry["message"] for entry in window.get_log("browser")]

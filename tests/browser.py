"""Headless Chromium, driven by selenium through the system's chromedriver, without a network."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

DRIVER = "chromedriver"
REQUIRED = "DIFFSYNTH_REQUIRE_BROWSER"
"""Environment variable that turns a missing browser into a failure."""
SECONDS = 30
"""Timeout for elements: a fragment changes some time after the click."""
OPTIONS = (
    *("--headless", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"),
    *("--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
"""Every network request, by the page or by the browser itself, ends at a closed port."""

LOW_CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = (color) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, place) => {
  const value = rgb(color)[place] / 255;
  return sum + weight * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
}, 0);
function ground(element) {
  const color = getComputedStyle(element).backgroundColor;
  return rgb(color)[3] === 0 && element.parentElement ? ground(element.parentElement) : color;
}
const low = [];
const seen = new Set();
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement;
  if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest("title, script, style")) continue;
  const style = getComputedStyle(element);
  const color = element instanceof SVGElement ? style.fill : style.color;
  const [dark, light] = [luminance(color), luminance(ground(element))].sort((one, other) => one - other);
  seen.add(texts.currentNode.data.trim());
  if ((light + 0.05) / (dark + 0.05) < 4.5) low.push([texts.currentNode.data.trim(), color, ground(element)]);
}
return [low, seen.size, getComputedStyle(document.body).backgroundColor];
"""
"""Visible texts with a contrast below WCAG's level AA."""


def missing() -> bool:
    """Return whether there is no browser to test with."""
    return shutil.which(DRIVER) is None


@contextmanager
def browser(width: int = 1440, height: int = 1200) -> Iterator[Chrome]:
    """Start a browser for the length of the block."""
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
    """Load a page, even if only the fragment of its address changed."""
    window.get("about:blank")
    window.get(address)


def use_color_scheme(window: Chrome, scheme: str) -> None:
    """Display pages as for a user who prefers `light` or `dark`."""
    preference = {"name": "prefers-color-scheme", "value": scheme}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})


def console(window: Chrome) -> list[str]:
    """Return new messages of the console, including violations of the content security policy."""
    return [entry["message"] for entry in window.get_log("browser")]

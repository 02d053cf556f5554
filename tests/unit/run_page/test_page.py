"""The page of a run: what it shows, what it prevents, how large it is, and what a browser makes of it."""

import json
import os
import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from diffsynth_core.checkpoints.run_folder import METRICS, PREVIEW_LIST, PREVIEWS, RECORD, PreviewImage
from diffsynth_core.run_page import thumbnails as thumbnails_module
from diffsynth_core.run_page.charts import nice_ticks
from diffsynth_core.run_page.facts import read_run
from diffsynth_core.run_page.page import check_is_ours, page_html, write_page
from diffsynth_core.run_page.previews import PromptImages
from diffsynth_core.run_page.thumbnails import MAX_BYTES, MAX_THUMBNAILS, Thumbnails, shown_images, thumbnail
from tests.browser import LOW_CONTRAST, REQUIRED, browser, console, missing, open_page, use_color_scheme
from tests.clips import numbered, write_clip
from tests.run_folders import PROMPTS, metric_lines, write_previews, write_run

HOSTILE = (
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=document.title='taken'>",
    '"><svg onload="document.title=1">',
    "' onmouseover='document.title=1",
    "<!--",
    "-->",
    "]]>",
    "<![CDATA[",
    "&lt;b&gt; &amp;amp;",
    "${document.title=1} $title $$ %s {0}",
    "\\u003c/script>\\",
    "`backticks` <b>bold",
    "javascript:document.title=1",
    "\u202egnitide\u2066 right to left",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u2028line\u2029separators",
    "\x1b[31m\x07\x00controls",
    "\U0001f9d1\u200d\U0001f680 \ud83d unpaired",
    "a" * 5000,
    "</style></title></textarea></noscript><plaintext>",
)
"""Texts of a run that must not become anything but text."""


def _data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def _page(folder: Path, thumbnails: Thumbnails | None = None) -> str:
    return page_html(read_run(folder), thumbnails or Thumbnails(), time.time())


def _write(folder: Path) -> Path:
    write_page(folder / "report.html", read_run(folder), Thumbnails(), time.time())
    return folder / "report.html"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that goes on, with three previews of four prompts."""
    folder = write_run(tmp_path / "my run", 400, 600, every=100)
    for place, step in enumerate((0, 200, 400)):
        write_previews(folder, step, 0.9 - 0.4 * place, size=(64, 48))
    return folder


def test_the_page_has_what_is_known_of_the_run(folder):
    page = unescape(_page(folder))
    for part in (
        "Running: 400 of 600 (67%), about", "qwen-image-lora", "step-400.safetensors", '<span class="best">lowest</span> 0.1',
        "data/my images", "transformer/diffusion_pytorch_model-00001-of-00009.safetensors", "--follow", "generate --run",
        "Where the time went", "waiting for data", "400 steps; all 12 previews", *PROMPTS,
    ):  # fmt: skip
        assert part in page, part
    assert list(_data(page)["charts"]) == ["loss", "bands", "lr", "norm", "seconds"]
    assert page.count("<figure") == 5 and page.count("<li data-prompt") == 4


def test_a_run_without_anything_yet(tmp_path):
    folder = write_run(tmp_path / "run", 0, 600)
    page = _page(folder)
    assert "<figure" not in page and "Running: 0 of 600" in page and "Checkpoints" not in page


def test_a_page_that_goes_on_is_refreshed_and_one_that_has_ended_is_not(folder):
    running = _page(folder)
    assert _data(running)["refresh"] == 10 and '<noscript><meta http-equiv="refresh"' in running
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | {"status": "completed"}))
    ended = _page(folder)
    assert _data(ended)["refresh"] is None and 'http-equiv="refresh"' not in ended


def test_spikes_are_stated_and_do_not_flatten_the_curve(folder):
    lines = metric_lines(1, 400, 600)
    spike = json.loads(lines[150]) | {"loss": 3.0}
    (folder / METRICS).write_text("\n".join([*lines[:150], json.dumps(spike), *lines[151:], ""]))
    page = _page(folder)
    assert "spikes up to 3 are beyond the chart" in page
    labels = [float(text) for text in re.findall(r'<text x="0" y="[\d.]+">([^<]+)', page.split("</figure>")[0])]
    assert max(labels) < 1
    assert max(high for *_, high in _data(page)["charts"]["loss"]["curves"][0]["points"]) == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 0.093, [0, 0.025, 0.05, 0.075, 0.1]), (2, 2, [2, 2.5, 3, 3.5, 4]),
     (-3, 5, [-4, -2, 0, 2, 4, 6]), (0, 1e-4, [0, 2.5e-05, 5e-05, 7.5e-05, 1e-4])],
)  # fmt: skip
def test_lines_of_a_chart_are_at_round_numbers(low, high, expected):
    assert nice_ticks(low, high, 4) == pytest.approx(expected)


def test_thumbnails_are_made_once(folder, monkeypatch):
    made = []
    monkeypatch.setattr(
        thumbnails_module, "thumbnail", lambda path, image: made.append(path) or "data:image/webp;base64,"
    )
    thumbnails = Thumbnails()
    _page(folder, thumbnails)
    write_previews(folder, 300, 0.1, size=(64, 48))
    _page(folder, thumbnails)
    assert len(made) == len({*made}) == 16


def test_what_cannot_be_read_has_no_thumbnail(folder):
    images = folder / PREVIEWS / "step-400"
    (images / "0001.png").write_bytes(b"not an image")
    (images / "0002.png").unlink()
    page = _page(folder)
    assert len(re.findall(r'<span class="nothing">', page)) == 2


def test_the_first_frame_of_a_clip_is_shown(tmp_path):
    write_clip(tmp_path / "0001.mp4", numbered(9))
    data = thumbnail(tmp_path / "0001.mp4", PreviewImage("0001.mp4", "a clip", 0, 48, 64, 9))
    assert data.startswith("data:image/webp;base64,")


def test_a_thumbnail_of_noise_is_bounded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "0001.png", compress_level=0)
    data = thumbnail(tmp_path / "0001.png", PreviewImage("0001.png", "noise", 0, 1024, 1024, 1))
    assert 0 < len(data) <= MAX_BYTES * 4 / 3 + 40


@pytest.mark.parametrize(("prompts", "steps"), [(1, 5000), (4, 1000), (100, 50), (300, 3)])
def test_images_are_thinned_out_from_the_middle(prompts, steps):
    image = PreviewImage("0001.png", "", 0, 1, 1, 1)
    shown = shown_images(
        [PromptImages(str(number), 0, dict.fromkeys(range(steps), image)) for number in range(prompts)]
    )
    later = shown_images(
        [PromptImages(str(number), 0, dict.fromkeys(range(steps + 7), image)) for number in range(prompts)]
    )
    assert sum(len(one.images) for one in shown) <= MAX_THUMBNAILS
    for one, other in zip(shown, later, strict=True):
        assert {0, steps - 1} <= set(one.images)
        assert set(other.images) - {steps + 6} <= set(one.images) | set(range(steps, steps + 7)), "none comes back"


def test_another_file_is_not_overwritten(folder):
    check_is_ours(folder / "report.html")
    check_is_ours(_write(folder))
    (folder / "report.html").write_text("<title>mine</title>")
    with pytest.raises(Exception, match="is not overwritten"):
        check_is_ours(folder / "report.html")


@pytest.mark.slow
def test_a_long_run_with_many_previews_is_at_most_10_mb(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", 100_000, every=500)
    for step in range(0, 100_000, 5_000):
        write_previews(folder, step, 0.5, [f"prompt {number}" for number in range(100)], (16, 16))
    monkeypatch.setattr(
        thumbnails_module, "thumbnail", lambda path, image: "data:image/webp;base64," + "A" * (MAX_BYTES * 4 // 3)
    )
    facts, thumbnails = read_run(folder), Thumbnails()
    page = page_html(facts, thumbnails, 0.0)
    assert 6_000_000 < len(page) <= 10_000_000
    assert "100,000 steps; 600 of 2,000 previews" in page
    begun = time.perf_counter()
    page_html(read_run(folder), thumbnails, 0.0)
    assert time.perf_counter() - begun < 20


def _hostile_run(tmp_path: Path) -> Path:
    """A run whose prompts, parameters, failure, files and name are hostile."""
    folder = write_run(tmp_path / "a'\"<b>&", 40, 60, "failed", every=10)
    write_previews(folder, 40, 0.5, [text.replace("\ud83d", "") for text in HOSTILE], (16, 16))
    content = json.loads((folder / RECORD).read_text())
    parameters = content["parameters"] | {"dataset_base_path": HOSTILE[0], "recipe": HOSTILE[1], HOSTILE[2]: HOSTILE[3]}
    checkpoints = [entry | {"file": HOSTILE[number % 20][:90]} for number, entry in enumerate(content["checkpoints"])]
    changed = {"parameters": parameters, "checkpoints": checkpoints, "failure": HOSTILE[0], "family": HOSTILE[1],
               "components": {HOSTILE[2]: {HOSTILE[3]: HOSTILE[4]}}, "versions": {HOSTILE[1]: HOSTILE[5]},
               "mixed_precision": HOSTILE[0], "started": HOSTILE[1], "best_checkpoint": checkpoints[0]["file"]}  # fmt: skip
    (folder / RECORD).write_text(json.dumps(content | changed))
    listed = folder / PREVIEWS / "step-40" / PREVIEW_LIST
    images = json.loads(listed.read_text())
    for image in images["images"][:3]:
        name = """it's "a" <b>&#.png""" if image["seed"] == 0 else f"javascript:alert({image['seed']}).png"
        (listed.parent / image["file"]).rename(listed.parent / name)
        image["file"] = name
    listed.write_text(json.dumps(images))
    return folder


def test_texts_of_the_run_are_no_markup(tmp_path):
    page = _page(_hostile_run(tmp_path))
    assert page.count("<script") == page.count("</script>") == 2 and page.count("</style>") == 1
    for part in ("<img src=x", "<svg onload", "<b>bold", "<plaintext", "onmouseover='"):
        assert part not in page
    assert 'href="samples/step-40/it%27s%20%22a%22%20%3Cb%3E%26%23.png"' in page
    assert not re.search(r'href="(?!samples/|#)[^"]*:', page)


@pytest.fixture(scope="module")
def window() -> Iterator[Chrome]:
    if missing():
        if os.environ.get(REQUIRED):
            pytest.fail("chromium and chromium-driver are not installed")
        pytest.skip("needs chromium and chromium-driver")
    with browser() as opened:
        yield opened


def _find(window: Chrome, selector: str) -> WebElement:
    return window.find_element(By.CSS_SELECTOR, selector)


def _wait_until(window: Chrome, script: str) -> None:
    deadline = time.monotonic() + 60
    while not window.execute_script(f"return {script}"):
        assert time.monotonic() < deadline, script
        time.sleep(0.1)


def _slide(window: Chrome, selector: str, place: int) -> None:
    window.execute_script(
        "const input = document.querySelector(arguments[0]);"
        "input.value = arguments[1]; input.dispatchEvent(new Event('input', { bubbles: true }))",
        selector,
        place,
    )


FIRST, SECOND = "[data-prompt='0']", "[data-prompt='1']"
SHOWN = "[...document.querySelectorAll('.at output')].map((one) => one.textContent).join()"


@pytest.mark.browser
def test_a_page_is_refreshed_and_keeps_what_was_chosen(window, folder, monkeypatch):
    monkeypatch.setattr("diffsynth_core.run_page.page.REFRESH_SECONDS", 2)
    open_page(window, _write(folder).as_uri())
    _slide(window, f"{FIRST} input", 1)
    window.execute_script("document.querySelector('details summary').click(); scrollTo(0, 300)")
    assert window.execute_script(f"return {SHOWN}") == "200,400,400,400"
    with (folder / METRICS).open("a") as stream:
        stream.writelines(f"{line}\n" for line in metric_lines(401, 500, 600))
    write_previews(folder, 500, 0.0, size=(64, 48))
    _write(folder)
    _wait_until(window, "document.querySelector('.verdict').textContent.startsWith('Running: 500 of 600')")
    assert window.execute_script(f"return {SHOWN}") == "200,500,500,500", "what was the latest follows"
    assert window.execute_script("return [scrollY, document.querySelector('details').open]") == [300, True]
    window.execute_script("document.getElementById('refresh').click(); window.same = true")
    time.sleep(4)
    assert window.execute_script("return window.same"), "it stays while it is paused"
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | {"status": "completed"}))
    _write(folder)
    window.execute_script("document.getElementById('refresh').click()")
    _wait_until(window, "document.querySelector('.verdict').textContent.startsWith('Completed')")
    assert not _find(window, "#refreshing").is_displayed() and not _find(window, "#stale").is_displayed()
    window.execute_script("window.same = true")
    time.sleep(4)
    assert window.execute_script("return window.same"), "a run that has ended is not loaded again"


@pytest.mark.browser
def test_a_page_that_is_no_longer_written_says_so(window, folder):
    write_page(folder / "report.html", read_run(folder), Thumbnails(), time.time() - 3600)
    open_page(window, (folder / "report.html").as_uri())
    assert _find(window, "#stale").is_displayed() and "60 min ago" in _find(window, ".written").text


@pytest.mark.browser
def test_previews_are_turned_over_together_and_alone(window, folder):
    page = _write(folder)
    open_page(window, page.as_uri())
    window.execute_script("sessionStorage.clear()")
    open_page(window, page.as_uri())
    sources = "[...document.querySelectorAll('.previews img')].map((one) => one.src)"
    latest = window.execute_script(f"return {sources}")
    _slide(window, "#all-steps", 0)
    assert window.execute_script(f"return {SHOWN}") == "0,0,0,0"
    assert not {*window.execute_script(f"return {sources}")} & {*latest}
    assert _find(window, f"{SECOND} a").get_attribute("href").endswith("/samples/step-0/0002.png")
    _slide(window, f"{SECOND} input", 2)
    assert window.execute_script(f"return {SHOWN}") == "0,400,0,0"
    assert window.execute_script(f"return {sources}")[1] == latest[1]
    assert window.execute_script("return [...document.images].every((one) => one.complete && one.naturalWidth)")


@pytest.mark.browser
def test_a_chart_is_read_out_at_a_step(window, folder):
    open_page(window, _write(folder).as_uri())
    readout = "document.querySelector('[data-chart=loss] .readout').textContent"
    window.execute_script("document.querySelector('[data-chart=loss] .plot').focus()")
    plot = _find(window, "[data-chart=loss] .plot")
    plot.send_keys("\ue011")  # Home
    assert window.execute_script(f"return {readout}").startswith("step 0: each step 0.")
    plot.send_keys("\ue010\ue012")  # End, Left
    text = window.execute_script(f"return {readout}")
    assert text.startswith("step 396: each step 0.") and "average 0." in text and "validation 0." in text


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_texts_run_nothing_and_ask_for_nothing(window, tmp_path, scheme):
    folder = _hostile_run(tmp_path)
    use_color_scheme(window, scheme)
    console(window)
    open_page(window, _write(folder).as_uri())
    assert window.title == f"{folder.name} - failed"
    assert window.execute_script("return performance.getEntriesByType('resource').length") == 0
    prompts = window.execute_script("return [...document.querySelectorAll('.prompt')].map((one) => one.textContent)")
    assert len(prompts) == len(HOSTILE) and prompts[:4] == list(HOSTILE[:4])
    assert console(window) == []


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(246, 246, 244)"), ("dark", "rgb(22, 23, 24)")])
@pytest.mark.parametrize("status", ["running", "completed", "interrupted", "failed"])
def test_all_text_can_be_read_in_light_and_dark(window, folder, scheme, ground, status):
    content = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(content | {"status": status, "failure": "it failed"}))
    use_color_scheme(window, scheme)
    open_page(window, _write(folder).as_uri())
    window.execute_script("document.querySelector('details').open = true")
    low, seen, shown = window.execute_script(LOW_CONTRAST)
    assert (low, shown) == ([], ground)
    assert seen > 100


@pytest.mark.browser
@pytest.mark.parametrize(
    "attempt",
    [
        "const image = new Image(); image.onerror = () => done('refused'); image.src = 'http://127.0.0.1:9/a.png'",
        "fetch('http://127.0.0.1:9/').catch(() => done('refused'))",
    ],
)
def test_the_policy_forbids_requests(window, folder, attempt):
    open_page(window, _write(folder).as_uri())
    assert window.execute_script(f"return new Promise((done) => {{ {attempt} }})") == "refused"
    assert any("Content Security Policy" in message for message in console(window))


@pytest.mark.browser
@pytest.mark.parametrize("hostile", [False, True])
def test_a_phone_scrolls_in_one_direction_only(window, folder, tmp_path, hostile):
    page = _write(_hostile_run(tmp_path) if hostile else folder)
    window.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        open_page(window, page.as_uri())
        assert window.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    finally:
        window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

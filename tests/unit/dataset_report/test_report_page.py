"""The report page of a dataset: its content, what it prevents, and how a browser renders it."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from diffsynth_core.data.images import SizeRule
from diffsynth_core.data.media import MediaRule
from diffsynth_core.dataset_report import report_data
from diffsynth_core.dataset_report.report_figures import bucket_lines, histograms
from diffsynth_core.dataset_report.report_page import THUMBNAIL_SIDE, page_html, write_page
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.progress import SilentReporter
from tests.browser import LOW_CONTRAST, REQUIRED, browser, console, missing, open_page, use_color_scheme

ROOT = Path(__file__).parents[3]
PARTS = (
    "html_page/base.css",
    *(f"dataset_report/page/report.{suffix}" for suffix in ("html", "css", "js")),
    *(f"run_page/page/run.{suffix}" for suffix in ("html", "css", "js")),
)
EVIL = (
    """</script><script>document.title = "taken"</script><img src=x onerror='document.title="taken"'><!-- "a" & 'b'"""
)
EVIL_NAME = """a"'><b onclick=alert(1)>&.png"""
SQUARE = Rules(media=MediaRule(SizeRule(64, 64, 4096, 16)), batch_size=2)


def _examine(folder: Path, rules: Rules = SQUARE, depth="files"):
    return validate(folder, rules, CheckOptions(depth, 1, THUMBNAIL_SIDE), SilentReporter())


def _data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three valid images, one of them with a malicious name and caption; a truncated one, and a missing one."""
    folder = tmp_path_factory.mktemp("reported") / "photos <i>&amp;"
    folder.mkdir()
    for number, name in enumerate(("wide.png", "high.png", EVIL_NAME)):
        size = ((200, 100), (100, 200), (128, 128))[number]
        Image.effect_noise(size, 60 + 40 * number).convert("RGB").save(folder / name)
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:9000])
    rows = [("wide.png", "one"), ("high.png", "nan"), (EVIL_NAME, EVIL), ("cut.png", "four"), ("gone.png", "five")]
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("image", "prompt"), *rows])
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, *_examine(folder))
    return path


def test_the_crops_are_those_of_training(page: Path) -> None:
    samples = {sample["row"]: sample for sample in _data(page.read_text())["samples"]}
    assert samples[1]["crop"] == [0.25, 0, 0.5, 1] and samples[1]["lost"] == 0.5
    assert samples[2]["crop"] == [0, 0.25, 1, 0.5] and samples[2]["size"] == [64, 64, 1]
    assert samples[3]["crop"] == [0, 0, 1, 1] and samples[3]["lost"] == 0
    assert "crop" not in samples[4] and "width" not in samples[5]


def test_samples_with_errors_come_first(page: Path) -> None:
    assert [sample["row"] for sample in _data(page.read_text())["samples"]] == [2, 4, 5, 1, 3]


def test_texts_of_the_dataset_are_no_markup(page: Path) -> None:
    text = page.read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert "<b onclick" not in text and "<img" not in text and "photos <i>" not in text
    assert _data(text)["samples"][-1]["caption"] == EVIL
    assert _data(text)["samples"][-1]["files"] == [["image", EVIL_NAME]]


def test_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"a\xff.png")).write_bytes(b"")
    (tmp_path / os.fsdecode(b"a\xff.txt")).write_text("a caption")
    write_page(tmp_path / "report.html", *_examine(tmp_path))
    assert _data((tmp_path / "report.html").read_text())["samples"][0]["files"] == [["image", "a\udcff.png"]]


def test_the_page_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, dataset = _examine(folder)
    thumbnails = _data(page_html(report, dataset))["thumbnails"]
    first = thumbnails["high.png"]
    monkeypatch.setattr(report_data, "THUMBNAILS_BYTES", len(first) + 20)
    monkeypatch.setattr(report_data, "FINDINGS_BYTES", 400)
    text = page_html(report, dataset)
    data = _data(text)
    assert list(data["thumbnails"]) == ["high.png"]
    assert 0 < len(data["findings"]) < len(report.findings)
    assert {finding["level"] for finding in data["findings"]} == {"error"}
    held = f"{len(data['findings'])} of {len(report.findings)} findings, all 5 samples and 1 of 3 thumbnails"
    assert held in text and "samples with findings come first" in text


def test_buckets_and_histograms_count_everything(folder: Path) -> None:
    _, dataset = _examine(folder)
    (line,) = bucket_lines(dataset)
    assert (line.shape, line.samples, line.batches, line.last) == ((1, 64, 64), 3, 2, 1)
    size, aspect, captions = histograms(dataset)
    assert {bar.tick: bar.count for bar in aspect.bars if bar.count} == {"1:2": 1, "1:1": 1, "2:1": 1}
    assert [(bar.meaning, bar.count) for bar in size.bars] == [("0 to less than 0.1 megapixels", 3)]
    assert sum(bar.count for bar in captions.bars) == 5


@pytest.mark.parametrize("depth", ["metadata", "paths"])
def test_without_looking_into_files(folder: Path, depth: str) -> None:
    text = page_html(*_examine(folder, depth=depth))
    assert "all 5 samples; files were not decoded" in text and "No training sizes are known" in text
    assert len(_data(text)["samples"]) == 5


def test_the_wheel_carries_the_templates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"diffsynth_core/{part}" for part in PARTS} <= set(names)


@pytest.fixture(scope="module")
def window() -> Iterator[Chrome]:
    if missing():
        if os.environ.get(REQUIRED):
            pytest.fail("chromium and chromium-driver are not installed")
        pytest.skip("needs chromium and chromium-driver")
    with browser() as opened:
        yield opened


@pytest.fixture
def opened(window: Chrome, page: Path) -> Chrome:
    console(window)
    open_page(window, page.as_uri())
    return window


def _find(window: Chrome, selector: str) -> WebElement:
    return window.find_element(By.CSS_SELECTOR, selector)


def _turn_to(opened: Chrome, view: str) -> None:
    _find(opened, f"[data-view={view}]").click()
    _find(opened, f"[data-view={view}][aria-current]")


@pytest.mark.browser
def test_a_browser_asks_for_nothing_and_runs_nothing_else(opened: Chrome) -> None:
    for view in ("findings", "samples"):
        _turn_to(opened, view)
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.execute_script("return document.title") == "photos <i>&amp; - dataset report"
    assert console(opened) == []


@pytest.mark.browser
@pytest.mark.parametrize(
    "attempt",
    [
        "const image = new Image(); image.onerror = () => done('refused'); image.src = 'http://127.0.0.1:9/a.png'",
        "fetch('http://127.0.0.1:9/').catch(() => done('refused'))",
    ],
)
def test_the_policy_forbids_requests(opened: Chrome, attempt: str) -> None:
    assert opened.execute_script(f"return new Promise((done) => {{ {attempt} }})") == "refused"
    assert any("Content Security Policy" in message for message in console(opened))


@pytest.mark.browser
def test_filters_count(opened: Chrome) -> None:
    every = opened.execute_script("return report.findings.length")
    assert _find(opened, "#count").text == f"{every} of {every} findings"
    _find(opened, "[data-code=IMAGE_TRUNCATED]").click()
    assert _find(opened, "#count").text == f"1 of {every} findings"
    _find(opened, "[data-code=CAPTION_NAN]").click()
    assert _find(opened, "#count").text == f"2 of {every} findings"
    _find(opened, "#search").send_keys("HIGH.p")
    assert _find(opened, "#count").text == f"1 of {every} findings"
    _turn_to(opened, "samples")
    assert _find(opened, "#count").text == "1 of 5 samples"
    _find(opened, "#reset").click()
    assert _find(opened, "#count").text == "5 of 5 samples"
    _find(opened, "[data-level=error]").click()
    assert _find(opened, "#count").text == "3 of 5 samples"


@pytest.mark.browser
def test_thumbnails_are_drawn_with_their_crops(opened: Chrome) -> None:
    _turn_to(opened, "samples")
    drawn = opened.execute_script(
        """
        const frame = document.querySelector('#samples-view img[alt="wide.png"]').parentElement;
        const image = frame.firstChild;
        await image.decode();
        const crop = frame.querySelector(".crop");
        return [image.naturalWidth, frame.offsetWidth, crop.offsetLeft, crop.offsetWidth, crop.offsetHeight];
        """
    )
    assert drawn == [160, 160, 40, 80, 80]


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(246, 246, 244)"), ("dark", "rgb(22, 23, 24)")])
def test_all_text_can_be_read_in_light_and_dark(opened: Chrome, scheme: str, ground: str) -> None:
    use_color_scheme(opened, scheme)
    for view in ("findings", "samples"):
        _turn_to(opened, view)
        for state in ("", "[data-code=CAPTION_NAN]"):
            if state:
                _find(opened, state).click()
            low, seen, shown = opened.execute_script(LOW_CONTRAST)
            assert (low, shown) == ([], ground)
            assert seen > 40
        _find(opened, "#reset").click()


@pytest.mark.browser
def test_what_has_no_thumbnail_says_why(window: Chrome, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(report_data, "THUMBNAILS_BYTES", 0)
    write_page(tmp_path / "report.html", *_examine(folder))
    open_page(window, (tmp_path / "report.html").as_uri() + "#samples")
    told = "return [...document.querySelectorAll('#samples-view .nothing')].map((one) => one.textContent)"
    left_out, none = "thumbnail omitted", "no image"
    assert window.execute_script(told) == [left_out, none, none, left_out, left_out]


@pytest.mark.slow
@pytest.mark.browser
def test_many_rows_are_shown_a_page_at_a_time(window: Chrome, tmp_path: Path) -> None:
    rows = [(f"missing/{number}.png", f"caption {number}") for number in range(20_000)]
    with (tmp_path / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "prompt"), *rows])
    path = tmp_path / "report.html"
    write_page(path, *_examine(tmp_path, depth="paths"))
    assert path.stat().st_size < 12_000_000
    open_page(window, path.as_uri())
    assert _find(window, "#count").text.startswith("20,000 of 20,00")
    assert window.execute_script("return document.querySelectorAll('#findings-view li').length") == 50
    _find(window, "#next").click()
    assert _find(window, "#page").text.startswith("2 of 40")
    spent = window.execute_script(
        "const before = performance.now(); change({ words: 'g/1234' }); return performance.now() - before"
    )
    assert _find(window, "#count").text.startswith("11 of 20,00")
    assert spent < 1000

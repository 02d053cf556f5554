"""Take the images of a run's page for the README: the tiny model learns a word, its page in headless Chromium.

Usage: python -m docs.make_run_images FOLDER
Needs Debian's packages chromium and chromium-driver; takes a few minutes on two cores.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from docs.make_report_images import save
from tests.browser import browser, open_page
from tests.shapes.concept import concept_rows
from tests.shapes.datasets import write_dataset

PROMPTS = ("a red keyhole on yellow", "a white keyhole on blue", "a blue cross left of a red circle on white")
EVERY = 25
"""Steps from one validation, and from one preview, to the next."""
WIDTH = 1280
CURVES_HEIGHT, PREVIEWS_HEIGHT = 1500, 680
"""Of the window, in pixels."""


def train(folder: Path) -> Path:
    """Teach the tiny model a word, and return the page of the run."""
    write_dataset(folder / "images", concept_rows())
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "diffsynth_cli", "train", "--recipe", "shapes-lora", "--device", "cpu"),
        *("--dataset_base_path", "images", "--output_path", "keyhole", "--validation_split", "0.05"),
        *("--validate_every", str(EVERY), "--preview_prompts", "prompts.txt", "--preview_every", str(EVERY)),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder / "keyhole" / "report.html"


def take(page: Path, target: Path) -> None:
    """Take the images of a page: its beginning, and the previews. The run's folder is shown as a user has it."""
    shown = page.read_text(encoding="utf-8").replace(str(page.parent.parent), "/home/me/runs")
    page.write_text(shown, encoding="utf-8")
    with browser() as window:
        window.set_window_size(WIDTH, CURVES_HEIGHT)
        open_page(window, page.as_uri())
        save(window.get_screenshot_as_png(), target / "run-page.webp")
        window.set_window_size(WIDTH, PREVIEWS_HEIGHT)
        window.execute_script("document.querySelector('.previews').scrollIntoView()")
        save(window.get_screenshot_as_png(), target / "run-previews.webp")


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        take(train(Path(name)), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

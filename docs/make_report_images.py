"""Take the images of a dataset report for the README: a made dataset with faults, its page in headless Chromium.

Usage: python -m docs.make_report_images FOLDER
Needs Debian's packages chromium and chromium-driver.
"""

import csv
import io
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import skimage
from PIL import Image

from tests.browser import browser, open_page

BATCH_SIZE = 4
QUALITY = 82
CAPTIONS = {
    "astronaut.png": "an astronaut in an orange suit before a flag and a model of the shuttle",
    "chelsea.png": "a ginger cat with green eyes looking past the camera",
    "coffee.png": "a cup of coffee with a spoon on a wooden table, seen from above",
    "rocket.jpg": "a rocket on its launch pad at night, lit from below",
    "hubble_deep_field.jpg": "galaxies of many shapes and colors on a black sky",
    "motorcycle_left.png": "a motorcycle in a workshop, its front wheel turned to the left",
    "retina.jpg": "the back of an eye with its blood vessels",
    "ihc.png": "brown and blue stained tissue under a microscope",
}
MORE_WORDS = (
    "soft light from the left",
    "a blurred background",
    "muted colors",
    "a little grain",
    "sharp to the edges",
)
SHAPES = ((3, 2), (3, 2), (3, 2), (2, 3), (4, 3), (1, 1), (16, 9))
"""Width to height of what is cut out of each photograph."""
PIXELS = 1_500_000
"""About how many each image has; photographs are scaled up to what cameras make."""
WIDTH = 1280
OVERVIEW_HEIGHT, CROPS_HEIGHT = 1500, 1200
"""Of the window, in pixels."""
MOST_CUT_FIRST = """
const order = document.getElementById("order");
order.value = "lost";
order.dispatchEvent(new Event("change"));
"""


def write_dataset(folder: Path) -> None:
    """Photographs cut to many shapes with captions, and among them one of each of the commonest faults."""
    draw = random.Random(3)
    rows = []
    for name, caption in CAPTIONS.items():
        photograph = Image.open(Path(skimage.data_dir) / name).convert("RGB")
        for number, (wide, high) in enumerate(SHAPES):
            share = min(photograph.width / wide, photograph.height / high) * draw.uniform(0.85, 1)
            width, height = int(wide * share), int(high * share)
            left = draw.randint(0, photograph.width - width)
            top = draw.randint(0, photograph.height - height)
            scale = (PIXELS / width / height) ** 0.5
            cut = photograph.crop((left, top, left + width, top + height))
            path = f"{Path(name).stem}_{number}.jpg"
            cut.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC).save(folder / path)
            rows.append((path, ", ".join((caption, *draw.sample(MORE_WORDS, draw.randint(0, 3))))))
    rows += _plant_faults(folder)
    draw.shuffle(rows)
    write_metadata(folder / "metadata.csv", "image", rows)
    write_metadata(folder / "for_video.csv", "video", rows)


def write_metadata(path: Path, column: str, rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([(column, "prompt"), *rows])


def _plant_faults(folder: Path) -> list[tuple[str, str]]:
    whole = (folder / "chelsea_0.jpg").read_bytes()
    (folder / "cut_off.jpg").write_bytes(whole[: len(whole) // 2])
    coffee = Image.open(folder / "coffee_0.jpg")
    coffee.crop((0, 450, coffee.width, 700)).save(folder / "panorama.jpg", quality=92)
    coffee.save(folder / "not_a.jpg", "PNG")
    coffee.resize((14, 10)).save(folder / "tiny.png")
    Image.new("RGB", (512, 512), (120, 30, 60)).save(folder / "blank.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    coffee.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", quality=92, exif=turned)
    rocket = Image.open(folder / "rocket_0.jpg").convert("RGBA")
    rocket.putalpha(Image.linear_gradient("L").resize(rocket.size))
    rocket.save(folder / "see_through.png")
    (folder / "astronaut_again.jpg").write_bytes((folder / "astronaut_0.jpg").read_bytes())
    return [
        ("cut_off.jpg", "a cat"),
        ("panorama.jpg", "a strip of a table with a cup"),
        ("not_a.jpg", "a cup of coffee"),
        ("tiny.png", "a very small cup"),
        ("blank.png", "dark red"),
        ("turned.jpg", "a cup of coffee, photographed with a telephone"),
        ("see_through.png", "a rocket fading into the sky"),
        ("astronaut_again.jpg", "an astronaut"),
        ("ihc_1.jpg", "nan"),
        ("gone.jpg", "an image that was deleted"),
    ]


def write_page(page: Path, *arguments: str) -> None:
    """The page of a dataset, whose path is relative to the folder of the page."""
    command = [sys.executable, "-m", "diffsynth_cli", "dataset", "validate", *arguments, "--report", page.name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    outcome = subprocess.run(command, cwd=page.parent, env=environment, stdout=subprocess.DEVNULL)
    if outcome.returncode != 1:
        sys.exit("the faults were not found")


def save(image: bytes, target: Path) -> None:
    Image.open(io.BytesIO(image)).convert("RGB").save(target, quality=QUALITY, method=6)


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name, browser() as window:
        dataset, page = Path(name) / "my_images", Path(name) / "report.html"
        dataset.mkdir()
        write_dataset(dataset)
        write_page(page, dataset.name, "--batch_size", str(BATCH_SIZE))
        window.set_window_size(WIDTH, OVERVIEW_HEIGHT)
        open_page(window, page.as_uri())
        save(window.get_screenshot_as_png(), target / "report-overview.webp")
        write_page(page, f"{dataset.name}/for_video.csv", "--recipe", "wan2.1-t2v-1.3b-lora")
        window.set_window_size(WIDTH, CROPS_HEIGHT)
        open_page(window, f"{page.as_uri()}#samples")
        window.execute_script(MOST_CUT_FIRST)
        save(window.get_screenshot_as_png(), target / "report-crops.webp")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

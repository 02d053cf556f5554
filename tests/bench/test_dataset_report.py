"""Time of the dataset checks relative to bare loops: decoding with Pillow, reading rows and looking up files."""

import csv
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.validate import CheckOptions, validate
from diffsynth_core.progress import SilentReporter

ROUNDS = 5
SIDE = 1024
GRAIN = 6
"""Standard deviation of sensor noise, of 255: enlarged photographs without it decode much faster than real ones."""
QUALITY = 91
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "cat")
WORDS = [
    "photograph",
    "of",
    "two",
    "people",
    "under",
    "an",
    "umbrella",
    "near",
    "the",
    "window",
    "in",
    "evening",
    "light",
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory, bench) -> Path:
    """2,000 JPEGs of one megapixel (20 without `--measure`): rotated and enlarged parts of photographs with noise,
    about 280 kB each.
    """
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    originals = [Image.fromarray(getattr(skimage.data, name)()[..., :3]) for name in PHOTOGRAPHS]
    noise = generator.normal(0, GRAIN, (SIDE * 2, SIDE * 2, 3)).astype(np.int16)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "prompt"])
        for number in range(bench.size(2000, 20)):
            _photograph(originals[number % len(originals)], noise, generator).save(
                folder / f"{number:04}.jpg", quality=QUALITY
            )
            writer.writerow([f"{number:04}.jpg", f"photograph {number}"])
    return folder


def _photograph(original: Image.Image, noise: np.ndarray, generator: np.random.Generator) -> Image.Image:
    side = int(min(original.size) * generator.uniform(0.6, 1.0))
    left, top = (int(generator.integers(0, length - side + 1)) for length in original.size)
    part = original.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if generator.integers(0, 2):
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x, y = generator.integers(0, SIDE, 2)
    values = np.asarray(part, np.int16) + noise[y : y + SIDE, x : x + SIDE]
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, bench) -> Path:
    """A metadata.csv of 200,000 rows (2,000 without `--measure`), and the (empty) files in it."""
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "prompt"])
        for number in range(bench.size(200_000, 2_000)):
            if number % 1000 == 0:
                (folder / f"{number // 1000:03}").mkdir()
            name = f"{number // 1000:03}/{number % 1000:03}.jpg"
            (folder / name).touch()
            writer.writerow([name, f"{' '.join(generator.choice(WORDS, 18))}, {number}"])
    return folder


def test_checking_images_takes_at_most_1_3_of_decoding_them(photographs, bench):
    sizes = [path.stat().st_size for path in photographs.glob("*.jpg")]
    print(f"\n{len(sizes)} JPEGs of {SIDE} x {SIDE}, {statistics.mean(sizes) / 1000:.0f} kB each")
    assert 250e3 < statistics.mean(sizes) < 310e3
    ratio, detail = _ratio(
        lambda: validate(photographs, Rules(), CheckOptions("files", workers=2), SilentReporter()),
        lambda: _decode_all(photographs),
        bench.rounds(ROUNDS),
    )
    bench.at_most("all checks of images / decoding them in two processes", ratio, 1.3, detail)


def test_checking_rows_takes_less_than_twice_reading_them(rows, bench):
    ratio, detail = _ratio(
        lambda: validate(rows, Rules(), CheckOptions("metadata"), SilentReporter()),
        lambda: _read_rows(rows),
        bench.rounds(ROUNDS),
    )
    bench.at_most("all checks of rows / csv.reader and os.stat", ratio, 2, detail)


def _ratio(ours: Callable[[], object], bare: Callable[[], object], rounds: int) -> tuple[float, str]:
    """Return the ratio of the median times, measured alternately, and all times."""
    times = [(_seconds(ours), _seconds(bare)) for _ in range(rounds)]
    ratio = statistics.median(one for one, _ in times) / statistics.median(other for _, other in times)
    return ratio, ", ".join(f"{one:.2f} s by {other:.2f} s" for one, other in times)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _decode_all(folder: Path) -> None:
    paths = sorted(folder.glob("*.jpg"))
    with ProcessPoolExecutor(2) as pool:
        assert sum(pool.map(_decode, paths, chunksize=16)) == len(paths) * SIDE * SIDE


def _decode(path: Path) -> int:
    with Image.open(path) as image:
        image.load()
        return image.width * image.height


def _read_rows(folder: Path) -> None:
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as stream:
        reader = csv.reader(stream)
        next(reader)
        for row in reader:
            os.stat(os.path.join(folder, row[0]))  # noqa: PTH116, PTH118 - the barest loop

"""Valid datasets into which tests plant faults: photographs and moving clips with captions, without a download."""

import csv
import io
import json
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffsynth_core.config.resolve import resolve
from diffsynth_core.dataset_report.recipe_rules import rules_of_run
from diffsynth_core.dataset_report.rules import Rules
from diffsynth_core.dataset_report.thresholds import Thresholds
from tests.clips import write_clip

IMAGES, CLIPS = 200, 20
SOURCES = ("astronaut", "coffee", "chelsea", "rocket", "stereo_motorcycle", "retina", "immunohistochemistry", "camera")
SIZES = ((192, 128), (128, 192), (160, 160), (224, 128), (144, 192), (256, 160))
"""(width, height) in pixels, multiples of 16 like the training sizes of all families."""
ENDINGS = (".jpg", ".png", ".webp", ".jpg", ".jpeg", ".bmp", ".png", ".tif")
FRAMES, FRAME_RATE = 81, 16
"""What Wan is trained on."""
H264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p")
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
CONTAINERS = ((".mp4", H264), (".mkv", H264), (".mov", H264), (".mp4", H264), (".webm", VP9))


def rules_of_recipe(recipe: str, thresholds: Thresholds | None = None) -> Rules:
    """Return the requirements of a recipe's run for its dataset."""
    return rules_of_run(resolve({"recipe": recipe}), thresholds or Thresholds())


@cache
def sources() -> tuple[Image.Image, ...]:
    """The photographs from which the images of the corpus are cropped."""
    import skimage.data

    arrays = [getattr(skimage.data, name)() for name in SOURCES]
    return tuple(Image.fromarray(array[0] if isinstance(array, tuple) else array).convert("RGB") for array in arrays)


def photograph(number: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Return image number n: each is another crop of another photograph, rotated differently."""
    chance = np.random.default_rng(number)
    source = sources()[number % len(SOURCES)]
    width, height = size or SIZES[number % len(SIZES)]
    scale = chance.uniform(0.3, 0.6) * min(source.width / width, source.height / height)
    part = (width * scale, height * scale)
    left, top = chance.uniform(0, source.width - part[0]), chance.uniform(0, source.height - part[1])
    cut = source.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + part[0], top + part[1]))
    turned = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else cut
    return turned.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if chance.random() < 0.5 else turned


def frames_of(number: int, frames: int = FRAMES, size: tuple[int, int] = (160, 96)) -> np.ndarray:
    """Return frames `[F, H, W, 3]` of a camera that pans over a photograph."""
    width, height = size
    steps = np.arange(frames)
    image = np.asarray(photograph(1000 + number, (width + frames, height + frames // 2)))
    return np.stack([image[step // 2 : step // 2 + height, step : step + width] for step in steps])


def caption(number: int) -> str:
    """Return a caption that is unique for a number."""
    place = ("on the left", "in the middle", "on the right", "far away")[number % 4]
    return f"a detail of the {SOURCES[number % len(SOURCES)].replace('_', ' ')} photograph, {place}, part {number}"


@dataclass
class Draft:
    """A dataset under construction: files are written at once, the rows by `write`.

    Attributes:
        rows: cells by column, or a raw line of the metadata.
        target: column of the target.
    """

    folder: Path
    target: str = "image"
    rows: list[dict[str, Any] | str] = field(default_factory=list)
    more_columns: list[str] = field(default_factory=list)
    numbers: Any = field(default_factory=count)

    def photograph(self, size: tuple[int, int] | None = None) -> Image.Image:
        """Return an image that is unique in the set."""
        return photograph(next(self.numbers), size)

    def frames(self, frames: int = FRAMES) -> np.ndarray:
        """Return frames `[F, H, W, 3]` of a clip that is unique in the set."""
        return frames_of(next(self.numbers), frames)

    def row(self, cell: Any, text: Any = None, **others: Any) -> int:
        """Add a row with `cell` as the target; by default with a unique caption."""
        number = len(self.rows) + 1
        self.rows.append({self.target: cell, "prompt": caption(number) if text is None else text, **others})
        return number

    def line(self, text: str) -> int:
        """Add a raw line."""
        self.rows.append(text)
        return len(self.rows)

    def sound_row(self, text: Any = None, **others: Any) -> tuple[int, str]:
        """Add a valid row with a unique image; return its number and the path of the image."""
        name = f"sound_{len(self.rows) + 1}.png"
        self.photograph().save(self.folder / name)
        return self.row(name, text, **others), name

    @property
    def columns(self) -> list[str]:
        """The columns of the metadata."""
        of_rows = [name for row in self.rows if isinstance(row, dict) for name in row]
        return list(dict.fromkeys([self.target, "prompt", *of_rows, *self.more_columns]))

    def write(self, form: str = "csv") -> Path:
        """Write the metadata and return its path."""
        path = self.folder / f"metadata.{form}"
        path.write_text(self.text(form), encoding="utf-8", newline="")
        return path

    def text(self, form: str = "csv") -> str:
        """The content of the metadata file."""
        if form == "json":
            return json.dumps(self.rows)
        stream = io.StringIO()
        writer = csv.DictWriter(stream, self.columns)
        if form == "csv":
            writer.writeheader()
        for row in self.rows:
            if isinstance(row, str):
                stream.write(f"{row}\n")
            elif form == "csv":
                writer.writerow(row)
            else:
                stream.write(json.dumps(row) + "\n")
        return stream.getvalue()

    def write_beside(self) -> None:
        """Write captions to text files next to the images instead."""
        for row in self.rows:
            assert isinstance(row, dict)
            (self.folder / row[self.target]).with_suffix(".txt").write_text(row["prompt"], encoding="utf-8")


def add_images(draft: Draft, number: int) -> None:
    """Add rows with valid images of many sizes, suffixes and harmless oddities, in folders."""
    for place in range(number):
        folder = f"part {place // 50 + 1}"
        (draft.folder / folder).mkdir(exist_ok=True)
        name = f"{folder}/{'photo' if place % 7 else 'Löwe'} {place:03}{ENDINGS[place % len(ENDINGS)]}"
        image = draft.photograph()
        if place % 16 == 9:
            image = image.convert("L")
        elif place % 16 == 6:
            image.putalpha(255)
        image.save(draft.folder / name)
        draft.row(name)


def add_clips(draft: Draft, number: int, containers: int = len(CONTAINERS)) -> None:
    """Add rows with valid clips."""
    for place in range(number):
        ending, coding = CONTAINERS[place % containers]
        name = f"clip_{place:02}{ending}"
        write_clip(draft.folder / name, draft.frames(), *coding, rate=FRAME_RATE)
        draft.row(name)
